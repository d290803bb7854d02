"""finetune, resize, convert, and --image-size of evaluate and info, as a user calls them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import randomise
from safetensors.torch import load_file

import allmlp
from allmlp.model import Mixer
from allmlp.training.initialization import load_weights, with_new_head
from allmlp.weights.published import synset_names
from allmlp.weights.resize import resize

SMALL = {"patch_size": 8, "num_blocks": 1, "hidden_dim": 16, "tokens_mlp_dim": 8, "channels_mlp_dim": 32}


def assert_done(answer) -> None:
    assert (answer.status, answer.errors) == (0, []), answer.err


def assert_mistake(answer, *words: str) -> None:
    assert answer.status == 2
    assert len(answer.errors) == 1
    assert all(word in answer.last for word in words), answer.last


def same_tensors(a, b) -> bool:
    left, right = allmlp.load(a).state_dict(), allmlp.load(b).state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# convert


def test_around_through_every_format_and_back_bit_for_bit(mixer, color_weights, tmp_path) -> None:
    steps = [
        (color_weights, "a.npz", ()),
        ("a.npz", "b.safetensors", ("--to", "timm")),
        ("b.safetensors", "c.npz", ()),
    ]
    steps += [("c.npz", "d.safetensors", ())]
    for read, write, more in steps:
        assert_done(mixer("convert", tmp_path / read, tmp_path / write, *more))
    assert same_tensors(tmp_path / "d.safetensors", color_weights)
    with np.load(tmp_path / "a.npz") as first, np.load(tmp_path / "c.npz") as second:
        assert {*first} == {*second}
        assert "MixerBlock_0/token_mixing/Dense_0/kernel" in first
        assert all(np.array_equal(first[name], second[name]) for name in first)
    assert "blocks.0.mlp_tokens.fc1.weight" in load_file(tmp_path / "b.safetensors")


def test_what_the_npz_cannot_hold_is_said(mixer, color_weights, tmp_path) -> None:
    answer = mixer("convert", color_weights, tmp_path / "a.npz", "--json")
    assert_done(answer)
    assert "class names" in answer.err
    assert json.loads(answer.out)["to"] == "npz"


def test_classes_and_normalization_from_the_command_travel(mixer, color_weights, pictures, tmp_path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("azur\nvert\nrouge\n")
    out = tmp_path / "named.safetensors"
    assert_done(mixer("convert", color_weights, out, "--classes", names, "--mean", 0, "--std", 0.2, 0.3, 0.4))
    metadata = allmlp.load(out).metadata
    assert metadata.classes == ("azur", "vert", "rouge")
    assert (metadata.preprocessing.mean, metadata.preprocessing.std) == ((0, 0, 0), (0.2, 0.3, 0.4))
    answer = mixer("predict", out, pictures(tmp_path / "data", {"red": 1}), "--json")
    named = {row["class"] for row in json.loads(answer.out)["predictions"][0]["predictions"]}
    assert named == {"azur", "vert", "rouge"}


def test_a_rectangular_npz_needs_its_size_and_takes_it(mixer, tmp_path) -> None:
    model = allmlp.create(num_classes=2, image_size=(8, 24), **SMALL)
    randomise(model, 0)
    allmlp.save(model, tmp_path / "wide.safetensors")
    told = mixer("convert", tmp_path / "wide.safetensors", tmp_path / "wide.npz")
    assert_done(told)
    assert "image_size=(8, 24)" in told.err
    assert_mistake(mixer("convert", tmp_path / "wide.npz", tmp_path / "b.safetensors"), "image_size=")
    assert_done(mixer("convert", tmp_path / "wide.npz", tmp_path / "b.safetensors", "--image-size", 8, 24))
    assert allmlp.load(tmp_path / "b.safetensors").image_size == (8, 24)


# resize, and --image-size elsewhere


def test_resize_writes_what_the_function_makes(mixer, color_weights, tmp_path) -> None:
    answer = mixer("resize", color_weights, tmp_path / "big.safetensors", "--image-size", 24, 32, "--json")
    assert_done(answer)
    model, told = allmlp.load(tmp_path / "big.safetensors"), json.loads(answer.out)
    expected = resize(allmlp.load(color_weights), (24, 32))
    assert model.image_size == (24, 32)
    assert model.metadata.classes == ("blue", "green", "red")
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert told["from"]["image_size"] == [16, 16]
    assert told["to"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert told["to"]["tokens_mlp_dim"] == model.config["tokens_mlp_dim"] == 16
    assert told["times"]["flops"] == told["to"]["flops"] / told["from"]["flops"]


def test_evaluate_at_another_size(mixer, color_weights, pictures, tmp_path) -> None:
    data = pictures(tmp_path / "data", {"red": 4, "blue": 4, "green": 4})
    for size in (16, 32, 24, 8):
        answer = mixer("evaluate", color_weights, "--data", data, "--part", "all", "--image-size", size, "--json")
        assert_done(answer)
        assert json.loads(answer.out)["image_size"] == [size, size]
        assert json.loads(answer.out)["top1"] == 1  # plain colors look alike at every size
    assert_mistake(mixer("evaluate", color_weights, "--data", data, "--image-size", 20), "20×20")


def test_info_says_what_a_resize_costs(mixer, color_weights) -> None:
    answer = mixer("info", color_weights, "--image-size", 32)
    assert_done(answer)
    resized = next(line for line in answer.out.splitlines() if "resized" in line)
    assert all(word in resized for word in ("16×16 → 32×32", "parameters", "FLOPs ×", "D_S 8 → 32"))
    found = json.loads(mixer("info", color_weights, "--image-size", 32, "--json").out)
    assert found["tokens_mlp_dim"] == 32
    assert found["parameters"] == found["resize"]["to"]["parameters"] > found["resize"]["from"]["parameters"]
    assert "resize" not in json.loads(mixer("info", color_weights, "--json").out)


def test_info_of_b16_at_448_is_the_papers_supplement_c(mixer) -> None:
    found = json.loads(mixer("info", "B/16", "--image-size", 448, "--json").out)
    assert found["resize"]["to"]["tokens_mlp_dim"] == 4 * 384
    assert 5.2 < found["resize"]["times"]["flops"] < 5.4  # as ../shared/paper/settings.md counts


def test_info_names_the_published_files_that_these_may_be(mixer, tmp_path) -> None:
    model = allmlp.create("S/32")
    randomise(model, 0)
    allmlp.save(model, tmp_path / "a.safetensors")
    assert_done(mixer("convert", tmp_path / "a.safetensors", tmp_path / "b.npz"))
    own, npz = (mixer("info", tmp_path / name) for name in ("a.safetensors", "b.npz"))
    assert "gsam/Mixer-S_32.npz" in npz.out
    assert "may be" not in own.out
    assert json.loads(mixer("info", tmp_path / "b.npz", "--json").out)["variant"] == "S/32"


def test_imagenet_folders_named_by_synset_are_matched(mixer, pictures, tmp_path) -> None:
    """The authors' weights, and ImageNet's validation images in folders such as n01440764."""
    synsets = list(synset_names(1000))
    model = allmlp.create(num_classes=1000, image_size=16, **SMALL)
    with torch.no_grad():
        model.head.bias[7] = 1.0  # it always answers the cock
        model.head.weight[0, 0] = 1e-6
    allmlp.save(model, tmp_path / "a.safetensors")
    mixer("convert", tmp_path / "a.safetensors", tmp_path / "b.npz")
    data = pictures(tmp_path / "data", {f"val/{synsets[7]}": 3, f"val/{synsets[0]}": 1, "train/" + synsets[0]: 1})
    answer = mixer("evaluate", tmp_path / "b.npz", "--data", data / "val", "--part", "all", "--json")
    assert_done(answer)
    assert json.loads(answer.out)["top1"] == 0.75


# finetune


def test_finetune_to_a_rectangle(mixer, color_weights, pictures, tmp_path) -> None:
    data = pictures(tmp_path / "data", {"red": 6, "blue": 6})
    words = ("--steps", 2, "--global-batch-size", 4, "--compile", "off", "--out", tmp_path / "run")
    words += ("--learning-rate", 0.01)
    assert_done(mixer("finetune", color_weights, "--data", data, "--image-size", 16, 24, *words))
    assert allmlp.load(tmp_path / "run" / "model.safetensors").image_size == (16, 24)


@pytest.fixture(scope="module")
def tuned(mixer, color_weights, pictures, tmp_path_factory):
    """Color weights on two other classes, at twice the size."""
    folder = tmp_path_factory.mktemp("tuned")
    data = pictures(folder / "data", {"red": 12, "noise": 12})
    words = ("--epochs", 4, "--global-batch-size", 8, "--learning-rate", 0.1, "--val-fraction", 0.2, "--compile", "off")
    answer = mixer(
        "finetune", color_weights, "--data", data, "--image-size", 32, *words, "--out", folder / "run", "--json"
    )
    assert_done(answer)
    return folder, answer


def test_one_learning_rate_is_one_plain_run(tuned) -> None:
    folder, answer = tuned
    summary = json.loads(answer.out)
    assert {path.name for path in (folder / "run").iterdir()} == {
        *("recipe.json", "metrics.jsonl", "tensorboard", "checkpoints", "starts.json", "model.safetensors"),
        *("report.html", "per_class.csv", "examples", "summary.json", "consumed.jsonl", ".lock"),
    }
    assert not {"search", "learning_rate", "test_top1s"} & summary.keys()
    recipe = json.loads((folder / "run" / "recipe.json").read_text())
    assert recipe["name"] == "finetune-photos"
    assert recipe["optimization"]["learning_rate"] == 0.1
    assert "held-out" not in answer.err


def test_finetune_learns_other_classes_at_another_size(tuned) -> None:
    folder, answer = tuned
    summary, model = json.loads(answer.out), allmlp.load(folder / "run" / "model.safetensors")
    assert model.metadata.classes == ("noise", "red")
    assert model.image_size == (32, 32)
    assert summary["started_from"].endswith("colors.safetensors")
    assert summary["test_top1"] == 1
    assert (folder / "run" / "report.html").stat().st_size > 10_000
    assert model.metadata.provenance["started_from"]["resized_from"] == [[16, 16]]


def test_the_run_again_from_its_recipe(mixer, tuned, tmp_path) -> None:
    folder, _ = tuned
    assert_done(mixer("train", "--recipe-file", folder / "run" / "recipe.json", "--out", tmp_path / "again"))
    assert same_tensors(tmp_path / "again" / "model.safetensors", folder / "run" / "model.safetensors")


def test_predict_with_what_was_tuned(mixer, tuned) -> None:
    folder, _ = tuned
    answer = mixer("predict", folder / "run" / "model.safetensors", folder / "data" / "red" / "000.png", "--json")
    assert json.loads(answer.out)["predictions"][0]["predictions"][0]["class"] == "red"


# finetune: the search, and the paper's recipes

QUICK = ("--compile", "off", "--precision", "float32", "--device", "cpu", "--workers", 0)


@pytest.fixture(scope="module")
def photographs(pictures, tmp_path_factory) -> Path:
    return pictures(tmp_path_factory.mktemp("photographs") / "data", {"red": 12, "noise": 12})


@pytest.fixture(scope="module")
def searched(mixer, color_weights, photographs, tmp_path_factory):
    """Color weights on two other classes, by the rates of ``photos``."""
    out = tmp_path_factory.mktemp("searched") / "run"
    words = ("finetune", color_weights, "--data", photographs, "--steps", 3, "--global-batch-size", 8, *QUICK)
    words += ("--out", out)
    return out, words, mixer(*words)


def test_finetune_searches_the_rate_and_prints_the_rates(searched) -> None:
    out, _, answer = searched
    assert_done(answer)
    lines = [line.split() for line in answer.out.splitlines() if line.startswith("rate ")]
    assert [line[1] for line in lines] == ["0.003:", "0.01:", "0.03:", "0.06:"]
    (chosen,) = (line[1].rstrip(":") for line in lines if "(chosen)" in line)
    summary = json.loads((out / "summary.json").read_text())
    assert float(chosen) == summary["learning_rate"]
    assert [float(line[4]) for line in lines] == [pytest.approx(top1, abs=5e-5) for top1 in summary["search"].values()]
    assert {path.name for path in (out / "search").iterdir()} == {f"rate-{rate}" for rate in summary["search"]}
    assert f"weights  {out}/model.safetensors" in answer.out
    assert f"report   {out}/report.html" in answer.out
    assert "±" not in answer.out  # of one seed
    assert same_tensors(out / "model.safetensors", out / "seed-0" / "model.safetensors")


def test_the_same_command_prints_the_same_and_trains_no_more(mixer, searched) -> None:
    out, words, first = searched
    answer = mixer(*words, "--json")
    assert_done(answer)
    assert "resuming the fine-tuning" in answer.err
    assert "warm-up" not in answer.err  # of any run
    summary = json.loads(answer.out)
    files = {"out": out, "weights": out / "model.safetensors", "report": out / "report.html"}
    stored = json.loads((out / "summary.json").read_text())
    assert summary == {name: str(path) for name, path in files.items()} | stored
    assert mixer(*words).out == first.out
    rates = [0.003, 0.01, 0.03, 0.06]
    assert list(summary["search"]) == [str(rate) for rate in rates]
    best = max(summary["search"].values())
    assert summary["learning_rate"] == min(rate for rate in rates if summary["search"][str(rate)] == best)
    assert (summary["seeds"], summary["test_top1s"]) == ([0], [summary["test_top1"]])
    assert (summary["test_top1_mean"], summary["test_top1_std"]) == (summary["test_top1"], None)
    assert summary["images"] == {"train": 18, "test": 6}  # the held-out ones are trained on too, in the end
    assert summary["total_train_seconds"] > summary["train_seconds"]


def test_another_transfer_in_the_folder_is_refused(mixer, searched) -> None:
    out, words, _ = searched
    before = (out / "summary.json").read_bytes()
    assert_mistake(mixer(*words, "--learning-rates", 0.1, 0.2), str(out), "learning_rates differ", "--out")
    assert_mistake(mixer(*words, "--learning-rate", 0.1), str(out), "exists", "--out")
    assert (out / "summary.json").read_bytes() == before


def test_a_twin_of_a_fine_tuning_recipe(mixer, color_weights, photographs, tmp_path) -> None:
    """All of it: four rates, three seeds."""
    words = ("--data", photographs, "--steps", 1, *QUICK, "--out", tmp_path / "run")
    answer = mixer("finetune", color_weights, "pets-small", *words)
    assert_done(answer)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["search"]) == 4
    assert summary["seeds"] == [0, 1, 2]
    mean, deviation = summary["test_top1_mean"], summary["test_top1_std"]
    assert f"test     top-1 {mean:.4f} ± {deviation:.4f} over 3 seeds" in answer.out
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (recipe["name"], recipe["optimization"]["global_batch_size"]) == ("finetune-pets-small", 16)
    assert recipe["data"]["train_crop"] == "inception"


def with_zero_head(trained: Mixer, num_classes: int) -> Mixer:
    """What a run that starts from these weights starts from."""
    model = with_new_head(trained, num_classes).to_empty(device="cpu")
    load_weights(model, trained)
    return model


def test_frozen_leaves_all_but_the_head(mixer, color_weights, photographs, tmp_path) -> None:
    """Bit for bit, at the size of the weights and at twice that; the head starts at zero, and is trained."""
    words = ("--data", photographs, "--frozen", "--learning-rate", 0.1, "--steps", 3, "--global-batch-size", 8, *QUICK)
    for size in (16, 32):
        out = tmp_path / str(size)
        assert_done(mixer("finetune", color_weights, *words, "--image-size", size, "--out", out))
        tuned = allmlp.load(out / "model.safetensors").state_dict()
        start = with_zero_head(resize(allmlp.load(color_weights), size), 2).state_dict()
        assert tuned.keys() == start.keys()
        changed = {name for name, tensor in tuned.items() if not torch.equal(tensor, start[name])}
        assert changed == {"head.weight", "head.bias"}
        assert not start["head.weight"].any()


def test_classes_of_one_image_leave_none_to_choose_by(mixer, color_weights, pictures, tmp_path) -> None:
    data = pictures(tmp_path / "data", {"train/red": 1, "train/blue": 1, "test/red": 1, "test/blue": 1})
    words = ("finetune", color_weights, "--data", data, "--steps", 1, "--global-batch-size", 2, *QUICK)
    answer = mixer(*words, "--out", tmp_path / "run")
    assert_mistake(answer, "of 2 images leaves none to choose by", "give one --learning-rate")
    assert not (tmp_path / "run").exists()
    assert_done(mixer(*words, "--learning-rate", 0.1, "--out", tmp_path / "run"))


# train: the paper's recipes


def test_a_twin_of_a_pretraining_recipe_trains(mixer, tmp_path) -> None:
    answer = mixer("train", "imagenet-b16-small", "--steps", 2, *QUICK, "--out", tmp_path / "run", "--json")
    assert_done(answer)
    summary = json.loads(answer.out)
    assert (summary["data"], summary["steps"]) == ("digits", 2)
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert recipe["name"] == "imagenet-b16-small"
    assert (recipe["data"]["randaugment"], recipe["data"]["mixup"], recipe["optimization"]["loss"]) == (
        *(15, 0.5, "sigmoid"),
    )
