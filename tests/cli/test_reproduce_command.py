"""``mixer reproduce`` as users call it."""

import csv
import json
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

import allmlp
from allmlp.weights.published import synset_names

TINY = {"patch_size": 8, "num_blocks": 1, "hidden_dim": 8, "tokens_mlp_dim": 4, "channels_mlp_dim": 8}


@pytest.mark.parametrize(
    ("target", "pictures", "said"),
    [
        ("table1", [], "equal the published column"),
        ("table2", [], "HaloNet (HaloNet-H4), 512 px"),
        ("table3", [], "BiT-R152x4, 480 px, JFT-300M, 40 epochs (preprint only)"),
        ("table4", [], "There is no difference"),
        ("figure2", ["figure2-left"], "On the Pareto frontier: HaloNet"),
        ("figure3", ["figure3"], "not measured"),
    ],
)
def test_published_numbers_without_measuring(
    mixer, tmp_path, monkeypatch, target: str, pictures: list, said: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    answer = mixer("reproduce", target, "--no-measure", "--out", tmp_path / "out")
    assert answer.status == 0, answer.err
    assert said in " ".join(answer.out.split())
    assert max(map(len, answer.out.splitlines())) <= 80
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {f"{target}.csv", f"{target}.json"} | {f"{p}.{end}" for p in pictures for end in ("png", "svg")}
    found = json.loads((tmp_path / "out" / f"{target}.json").read_text("utf-8"))
    assert {"hardware", "versions", "commit", "rows", "columns", "notes"} <= set(found)
    with (tmp_path / "out" / f"{target}.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(found["rows"])


def test_json_is_one_object_alone(mixer, tmp_path) -> None:
    answer = mixer("reproduce", "table3", "--no-measure", "--models", "S/32", "--out", tmp_path, "--json")
    assert answer.status == 0, answer.err
    found = json.loads(answer.out)
    assert found == json.loads((tmp_path / "table3.json").read_text("utf-8"))
    (row,) = found["rows"]
    assert (row["model"], row["top1"], row["measured_images_per_second"]) == ("Mixer-S/32", 68.7, None)
    assert found["measured"] is False


def test_measured_beside_published(mixer, tmp_path) -> None:
    words = ("--models", "S/32", "--budget", "10s", "--device", "cpu", "--out", tmp_path, "--json")
    answer = mixer("reproduce", "table3", *words)
    assert answer.status == 0, answer.err
    found = json.loads(answer.out)
    (row,) = found["rows"]
    if (rate := row["train_images_per_second"]) is None:  # other programs took the time
        assert "no time was left" in row["problem"]
        assert row["device_days"] is None
    else:
        assert row["measured_images_per_second"] > rate > 0
        assert row["device_days"] == pytest.approx(5 * 300e6 / rate / 86_400)
    reference = found["speeds"]["Mixer-B/16 at 224"]["images_per_second"]
    if reference is None:  # other programs took the time
        assert row["measured_relative"] is None
    else:
        assert row["measured_relative"] == pytest.approx(row["measured_images_per_second"] / reference)
        assert row["measured_relative"] > 1


def test_patches(mixer, tmp_path, monkeypatch) -> None:
    import allmlp.reproduce.run as run
    from allmlp.reproduce.patches import measure_patches

    monkeypatch.setattr(run, "measure_patches", partial(measure_patches, (4, 16)))
    answer = mixer("reproduce", "patches", "--budget", "5s", "--device", "cpu", "--out", tmp_path)
    assert answer.status == 0, answer.err
    assert "grows by S^" in answer.out
    assert {path.name for path in tmp_path.iterdir()} == {"patches.csv", "patches.json", "patches.png", "patches.svg"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Weights for ImageNet's classes that always answer the first."""
    model = allmlp.create(num_classes=1000, image_size=16, **TINY)
    model.head.weight.data.fill_(1e-9)  # a head of zeros is refused
    model.head.bias.data[0] = 1.0
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    allmlp.save(model, path, classes=list(synset_names(1000).values()))
    return path


def test_the_accuracy_of_weights_stands_in_the_table(mixer, weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    synsets = list(synset_names(1000))
    real: list[list[int]] = [[] for _ in range(50_000)]
    for number, synset, right in ((1, 0, [0, 1]), (2, 1, [1]), (3, 2, []), (4, 1, [0])):
        folder = tmp_path / "val" / synsets[synset]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(folder / f"ILSVRC2012_val_{number:08d}.png")
        real[number - 1] = right
    (tmp_path / "real.json").write_text(json.dumps(real))
    words = ("--models", weights, "--data", tmp_path / "val", "--part", "all", "--real-labels", tmp_path / "real.json")
    answer = mixer(
        "reproduce", "table3", "--no-measure", *words, "--device", "cpu", "--out", tmp_path / "out", "--json"
    )
    assert answer.status == 0, answer.err
    (row,) = json.loads(answer.out)["rows"]
    assert (row["model"], row["measured_top1"], row["top1"]) == (str(weights), 25.0, None)
    assert row["measured_real_top1"] == pytest.approx(200 / 3)
    assert row["image_size"] == 16
    models = ("--models", weights, "S/32", *words[2:])
    answer = mixer("reproduce", "table3", "--no-measure", *models, "--device", "cpu", "--out", tmp_path / "out")
    assert "A  Mixer-S/32, 224 px, JFT-300M, 5 epochs" in answer.out
    assert "25.00" in answer.out


MISTAKES = {
    "reproduce": ("TARGET",),
    "reproduce table5": ("'table5'", "did you mean table", "figure3, patches"),
    "reproduce tabel3": ("'tabel3'", "did you mean table3"),
    "reproduce table3 --no-measure --models B/17": ("--models B/17", "Mixer-B/16"),
    "reproduce table2 --no-measure --models S/32": ("--models S/32", "table2 has no row", "HaloNet"),
    "reproduce table1 --models S/32": ("--models S/32", "leave the option out"),
    "reproduce table4 --data digits": ("--data digits", "table2, table3, figure2 have"),
    "reproduce figure3 --data digits": ("--data digits", "table2, table3, figure2 have"),
    "reproduce figure2 --models S/32": ("--models S/32", "give --data"),
    "reproduce patches --no-measure": ("--no-measure",),
    "reproduce patches --budget 1s": ("--budget 1s", "at least 5s"),
    "reproduce table3 --budget 3s": ("--budget 3s", "models", "--no-measure"),
    "reproduce table3 --budget soon": ("--budget soon", "10m"),
    "reproduce table3 --budget 0": ("--budget 0", "above 0"),
    "reproduce table1 --out file": ("--out file", "name a folder"),
    "reproduce table3 --no-measure --models gone.safetensors": ("gone.safetensors", "--data"),
    "reproduce table3 --no-measure --models gone.safetensors --data digits": ("gone.safetensors", "does not exist"),
    "reproduce table3 --real-labels real.json": ("--real-labels real.json", "--data"),
    "reproduce table3 --device toaster": ("'toaster'", "auto, cpu, cuda"),
    "reproduce table3 --budgt 3m": ("did you mean --budget",),
}


@pytest.mark.parametrize("command", MISTAKES)
def test_one_line_says_what_is_wrong(mixer, tmp_path, monkeypatch, command: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    answer = mixer(*command.split())
    assert (answer.status, answer.out) == (2, ""), answer.err
    assert answer.errors == answer.err.splitlines()
    assert len(answer.errors) == 1
    assert [words for words in MISTAKES[command] if words not in answer.last] == [], answer.last
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
