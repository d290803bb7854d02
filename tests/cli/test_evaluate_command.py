"""``mixer evaluate`` as users call it: several models, several sources, both crops, several processes, many classes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import allmlp
from allmlp.errors import UserError
from allmlp.weights.published import synset_names

SIZES = {"num_blocks": 1, "hidden_dim": 8, "tokens_mlp_dim": 4, "channels_mlp_dim": 8, "patch_size": 4}


@pytest.fixture(scope="module")
def colors(pictures, tmp_path_factory) -> Path:
    """Eleven red, five green and one blue picture, so that the last batch of four holds one image."""
    return pictures(tmp_path_factory.mktemp("colors"), {"red": 11, "green": 5, "blue": 1})


def constant(path: Path, answer: int, classes: list[str]) -> Path:
    """Weights that always give the same answer."""
    model = allmlp.create(num_classes=len(classes), image_size=16, **SIZES)
    model.head.weight.data.fill_(1e-9)  # a head of zeros is refused
    model.head.bias.data[answer] = 1.0
    allmlp.save(model, path, classes=classes)
    return path


def test_several_models_on_the_same_images(mixer, colors, color_weights, tmp_path) -> None:
    red, green = (
        constant(tmp_path / f"{name}.safetensors", i, ["red", "green", "blue"]) for i, name in enumerate("rg")
    )
    words = ("evaluate", color_weights, red, green, "--data", colors, "--part", "all")
    answer = mixer(*words, "--json", "--page", tmp_path / "page.html")
    assert answer.status == 0, answer.err
    found = json.loads(answer.out)
    assert [model["top1"] for model in found["models"]] == pytest.approx([1, 11 / 17, 5 / 17])
    assert [model["balanced_accuracy"] for model in found["models"]] == pytest.approx([1, 1 / 3, 1 / 3])
    assert found["models"][0]["majority"]["top1"] == pytest.approx(11 / 17)
    assert [(pair["only_first"], pair["only_second"]) for pair in found["pairs"]] == [(6, 0), (12, 0), (11, 5)]
    assert found["pairs"][0]["p_value"] == pytest.approx(2 / 2**6)
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "3 models on the same images" in page
    text = mixer(*words).out
    assert f"B  {red}\n" in text
    assert "B is no better than always answering 'red', which scores 0.6471" in text
    assert "A is " not in text
    assert re.search(r"\+0\.3529 .* 0\.031", text)


def test_a_source_for_each_model(mixer, colors, color_weights, pictures, tmp_path) -> None:
    other = pictures(tmp_path / "other", {"red": 3, "green": 3})
    red = constant(tmp_path / "red.safetensors", 0, ["red", "green", "blue"])
    words = ("evaluate", color_weights, red, "--data", colors, other, "--part", "all")
    found = json.loads(mixer(*words, "--json").out)
    assert [task["top1"] for task in found["tasks"]] == [1.0, 0.5]
    assert found["mean_top1"] == 0.75
    assert found["average_of_five"] is None
    assert "mean of 2 sources: top-1 0.7500" in mixer(*words).out
    single = json.loads(mixer("evaluate", red, "--data", colors, other, "--part", "all", "--json").out)
    assert [task["top1"] for task in single["tasks"]] == pytest.approx([11 / 17, 0.5])


def test_both_crops_and_other_sizes(mixer, tmp_path) -> None:
    """Of wide noise, "resmall" sees the center alone, and "resize" all of it."""
    data = tmp_path / "data"
    for name in ("red", "green"):
        (data / name).mkdir(parents=True)
        pixels = np.random.default_rng(len(name)).integers(0, 256, (20, 64, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(data / name / "1.png")
    model = allmlp.create(num_classes=2, image_size=16, **SIZES)
    weights = tmp_path / "w.safetensors"
    model.head.weight.data.normal_()
    allmlp.save(model, weights, classes=["red", "green"])
    losses = {}
    for options in ((), ("--crop", "resmall"), ("--crop", "resize"), ("--crop-ratio", 1), ("--image-size", 32)):
        answer = mixer("evaluate", weights, "--data", data, "--part", "all", "--json", *options)
        assert answer.status == 0, answer.err
        losses[options] = json.loads(answer.out)["loss"]
    assert losses[()] == losses["--crop", "resmall"]
    assert len(set(losses.values())) == 4
    assert allmlp.evaluate(allmlp.load(weights), data, part="all", crop="resize").loss == pytest.approx(
        losses["--crop", "resize"]
    )
    with pytest.raises(UserError, match="crop = 'center': must be one of resmall, resize"):
        allmlp.evaluate(allmlp.load(weights), data, crop="center")


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "allmlp.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_three_processes_say_what_one_says(colors, color_weights, tmp_path) -> None:
    (tmp_path / "colors").symlink_to(colors)
    damaged = tmp_path / "data"
    shutil.copytree(colors, damaged)
    (damaged / "red" / "001.png").write_bytes(b"no picture")
    words = ("evaluate", color_weights, "--data", damaged, "--part", "all", "--batch-size", 3, "--device", "cpu")
    one, three = run(*words, "--json"), run(*words, "--json", "--processes", 3)
    assert (one.returncode, three.returncode) == (0, 0), three.stderr
    assert json.loads(one.stdout) == json.loads(three.stdout)
    assert json.loads(three.stdout)["images"] == 16
    assert three.stderr.count("1 unreadable image(s)") == 1


def test_real_labels_of_imagenet(mixer, tmp_path) -> None:
    pytest.importorskip("timm")
    synsets = list(synset_names(1000))
    labels: list[list[int]] = [[] for _ in range(50_000)]
    for number, synset, right in ((1, 0, [0, 1]), (2, 1, [1]), (3, 2, []), (4, 1, [0])):
        folder = tmp_path / "val" / synsets[synset]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(folder / f"ILSVRC2012_val_{number:08d}.png")
        labels[number - 1] = right
    (tmp_path / "real.json").write_text(json.dumps(labels))
    weights = constant(tmp_path / "w.safetensors", 0, list(synset_names(1000).values()))
    words = ("evaluate", weights, "--data", tmp_path / "val", "--part", "all", "--real-labels")
    answer = mixer(*words, tmp_path / "real.json", "--json")
    assert answer.status == 0, answer.err
    found = json.loads(answer.out)
    assert found["top1"] == 1 / 4
    assert found["real"] == {"top1": 2 / 3, "images": 3, "without_label": 1}
    text = mixer(*words, tmp_path / "real.json").out
    assert "ReaL top-1 0.6667" in text
    assert "ReaL has no label for 1 of the images" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("WEIGHTS", "WEIGHTS", "WEIGHTS", "--data", "A", "A"), "2 sources for 3 weights: give --data one source"),
        (
            ("WEIGHTS", "WEIGHTS", "--data", "A", "A", "--page", "p.html"),
            "--page p.html: a page shows models on the same",
        ),
        (("WEIGHTS", "WEIGHTS", "--data", "A", "A", "--page", "p.html"), "give one source"),
        (("WEIGHTS", "--data", "A", "--page", "no/p.html"), "there is no folder no; create it"),
        (("WEIGHTS", "--data", "A", "--crop-ratio", 2), "--crop-ratio 2.0: must be a number above 0 and at most 1"),
        (("WEIGHTS", "--data", "A", "--real-labels", "real.json"), "not ImageNet's validation images"),
        (("WEIGHTS", "--data", "A", "--part", "test", "--batch-size", 0), "--batch-size 0"),
        (("--data", "A"), "0 weights and 1 sources"),
        (("WEIGHTS", "--data", "A", "--processes", 0), "must be at least 1"),
    ],
)
def test_mistakes(words, said, mixer, colors, color_weights) -> None:
    named = {"WEIGHTS": color_weights, "A": colors}
    answer = mixer("evaluate", *(named.get(word, word) for word in words))
    assert answer.status == 2
    assert len(answer.errors) == 1
    assert said in answer.last


def test_training_says_that_it_learned_nothing(mixer, pictures, tiny, tmp_path) -> None:
    """With a learning rate next to zero, a model from scratch answers what its fresh head says."""
    data = pictures(tmp_path / "data", {"red": 60, "green": 20})
    words = ("train", "--data", data, "--steps", 1, "--learning-rate", 1e-20, *tiny, "--out", tmp_path / "run")
    answer = mixer(*words)
    assert answer.status == 0, answer.err
    assert "(commonest class 0.7500)" in answer.out
    assert re.search(r"test: this model is (no|not certainly) better than always answering 'red'", answer.out)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["test_majority"], summary["val_majority"]) == (0.75, pytest.approx(0.75, abs=0.1))
    assert "always answering" in summary["verdicts"]["test"]
    assert 'id="verdict"' in (tmp_path / "run" / "report.html").read_text("utf-8")


MANY_CLASSES = """
import sys
from pathlib import Path
import numpy as np, torch
from made_results import Gray
import allmlp
from allmlp.data.dataset import ImageDataset
from allmlp.evaluation.classification import classify
from allmlp.evaluation.comparison import compare_all
from allmlp.evaluation.pages.evaluation_report import Evaluated, write_evaluation_report
from allmlp.evaluation.scores import to_json_object
K, N = 21_843, 2_000
classes = tuple(f"n{i:08d}" for i in range(K))
data = ImageDataset(store=Gray(), names=tuple(f"{i}.png" for i in range(N)), classes=classes,
                    labels=np.random.default_rng(0).integers(0, K, N))
model = allmlp.create(num_classes=K, image_size=4, patch_size=4, num_blocks=1, hidden_dim=8, tokens_mlp_dim=4,
                      channels_mlp_dim=8)
found = [classify(model, data, device=torch.device("cpu"), precision=torch.float32, workers=0) for _ in range(2)]
assert found[0].top5 is not None and len(to_json_object(found[0])["per_class"]) == K
named = [Evaluated(name, result) for name, result in zip("ab", found)]
write_evaluation_report(Path(sys.argv[1]), named, compare_all(found), "test")
peak = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(int(peak[0].split()[1]) * 1024)  # getrusage counts the process that this one was forked from
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory from /proc")
def test_the_classes_of_imagenet21k_take_little_memory(tmp_path) -> None:
    environment = {"PYTHONPATH": str(Path(__file__).parents[1] / "evaluation"), "PATH": "", "OMP_NUM_THREADS": "1"}
    source = str(Path(allmlp.__file__).parents[1])
    environment["PYTHONPATH"] += f":{source}"
    done = subprocess.run(
        [sys.executable, "-c", MANY_CLASSES, tmp_path / "page.html"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 10**9
