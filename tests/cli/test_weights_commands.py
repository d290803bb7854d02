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
    names.write_bytes(b"\xef\xbb\xbfazur\r\nvert\r\nrouge\r\n")  # as Notepad writes it, with a byte order mark
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


def test_evaluate_at_another_size_whatever_the_provenance(mixer, color_weights, pictures, tmp_path) -> None:
    odd = tmp_path / "odd.safetensors"
    allmlp.save(allmlp.load(color_weights), odd, source="my camera", recipe={"data": "mine"}, val_top1="high")
    assert_done(mixer("resize", odd, tmp_path / "big.safetensors", "--image-size", 32))
    data = pictures(tmp_path / "data", {"red": 4, "blue": 4, "green": 4})
    for size in ((16,), (32,), (24,), (8,), (16, 32)):
        answer = mixer("evaluate", odd, "--data", data, "--part", "all", "--json", "--image-size", *size)
        found = json.loads(answer.out)
        assert (found["image_size"], found["top1"]) == ([size[0], size[-1]], 1)  # plain colors look alike at all sizes
        assert json.loads(mixer("info", odd, "--json", "--image-size", *size).out)["image_size"] == found["image_size"]


def test_info_says_what_a_resize_costs(mixer, color_weights) -> None:
    resized = next(
        line for line in mixer("info", color_weights, "--image-size", 32).out.splitlines() if "resized" in line
    )
    assert all(word in resized for word in ("16×16 → 32×32", "parameters", "FLOPs ×", "D_S 8 → 32"))
    found = json.loads(mixer("info", color_weights, "--image-size", 32, "--json").out)
    assert found["tokens_mlp_dim"] == 32
    assert found["parameters"] == found["resize"]["to"]["parameters"] > found["resize"]["from"]["parameters"]
    supplement_c = json.loads(mixer("info", "B/16", "--image-size", 448, "--json").out)["resize"]
    assert supplement_c["to"]["tokens_mlp_dim"] == 4 * 384
    assert 5.2 < supplement_c["times"]["flops"] < 5.4  # as ../shared/paper/settings.md counts
    assert "resize" not in json.loads(mixer("info", color_weights, "--json").out)


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


@pytest.fixture(scope="module")
def tuned(mixer, color_weights, pictures, tmp_path_factory):
    """Color weights on two other classes, at twice the size."""
    folder = tmp_path_factory.mktemp("tuned")
    data = pictures(folder / "data", {"red": 12, "noise": 12})
    words = ("--epochs", 4, "--global-batch-size", 8, "--learning-rate", 0.1, "--val-fraction", 0.2, "--compile", "off")
    answer = mixer(
        "finetune", color_weights, "--data", data, "--image-size", 32, 48, *words, "--out", folder / "run", "--json"
    )
    assert_done(answer)
    return folder, answer


def test_one_learning_rate_is_one_run_on_other_classes_at_another_size(mixer, tuned, tmp_path) -> None:
    folder, answer = tuned
    run, summary = folder / "run", json.loads(answer.out)
    assert not {"search", "learning_rate", "test_top1s"} & summary.keys()
    assert not {"search", "seed-0"} & {path.name for path in run.iterdir()}
    assert "held-out" not in answer.err
    recipe = json.loads((run / "recipe.json").read_text())
    assert (recipe["name"], recipe["optimization"]["learning_rate"]) == ("finetune-photos", 0.1)
    model = allmlp.load(run / "model.safetensors")
    assert (model.metadata.classes, model.image_size) == (("noise", "red"), (32, 48))
    assert summary["started_from"].endswith("colors.safetensors")
    assert summary["test_top1"] == 1
    assert model.metadata.provenance["started_from"]["resized_from"] == [[16, 16]]
    predicted = mixer("predict", run / "model.safetensors", folder / "data" / "red" / "000.png", "--json")
    assert json.loads(predicted.out)["predictions"][0]["predictions"][0]["class"] == "red"
    assert_done(mixer("train", "--recipe-file", run / "recipe.json", "--out", tmp_path / "again"))
    assert same_tensors(tmp_path / "again" / "model.safetensors", run / "model.safetensors")


# finetune: the search, and the paper's recipes

QUICK = ("--compile", "off", "--precision", "float32", "--device", "cpu", "--workers", 0)


@pytest.fixture(scope="module")
def photographs(pictures, tmp_path_factory) -> Path:
    return pictures(tmp_path_factory.mktemp("photographs") / "data", {"red": 12, "noise": 12})


@pytest.fixture(scope="module")
def searched(mixer, color_weights, photographs, tmp_path_factory):
    """The head alone, on two other classes, by the rates of ``pets-small`` and with two seeds."""
    out = tmp_path_factory.mktemp("searched") / "run"
    words = ("finetune", color_weights, "pets-small", "--data", photographs, "--steps", 3, "--seeds", 2, "--frozen")
    words += ("--image-size", 16, "--out", out, *QUICK)
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
    mean, deviation = summary["test_top1_mean"], summary["test_top1_std"]
    assert f"test     top-1 {mean:.4f} ± {deviation:.4f} over 2 seeds" in answer.out
    assert same_tensors(out / "model.safetensors", out / "seed-0" / "model.safetensors")
    recipe = json.loads((out / "recipe.json").read_text())
    assert (recipe["name"], recipe["data"]["train_crop"]) == ("finetune-pets-small", "inception")


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
    assert summary["seeds"] == [0, 1]
    assert summary["test_top1s"][0] == summary["test_top1"]
    assert summary["test_top1_mean"] == pytest.approx(np.mean(summary["test_top1s"]))
    assert summary["images"] == {"train": 18, "test": 6}  # the held-out ones are trained on too, in the end
    assert summary["total_train_seconds"] > summary["train_seconds"]


def test_another_transfer_in_the_folder_is_refused(mixer, searched) -> None:
    out, words, _ = searched
    before = (out / "summary.json").read_bytes()
    assert_mistake(mixer(*words, "--learning-rates", 0.1, 0.2), str(out), "learning_rates differ", "--out")
    assert_mistake(mixer(*words, "--learning-rate", 0.1, "--seeds", 1), str(out), "exists", "--out")
    assert (out / "summary.json").read_bytes() == before


def with_zero_head(trained: Mixer, num_classes: int) -> Mixer:
    """What a run that starts from these weights starts from."""
    model = with_new_head(trained, num_classes).to_empty(device="cpu")
    load_weights(model, trained)
    return model


def changed_parameters(weights: Path, start: Mixer) -> set[str]:
    before = start.state_dict()
    return {name for name, value in allmlp.load(weights).state_dict().items() if not torch.equal(value, before[name])}


def test_frozen_leaves_all_but_the_head(mixer, color_weights, photographs, searched, tmp_path) -> None:
    """Bit for bit, in a search and at twice the size of the weights; the head starts at zero, and is trained."""
    start = with_zero_head(allmlp.load(color_weights), 2)
    assert not start.get_parameter("head.weight").any()
    for run in ("", "search/rate-0.01", "search/rate-0.03", "seed-0", "seed-1"):
        assert changed_parameters(searched[0] / run / "model.safetensors", start) == {"head.weight", "head.bias"}, run
    words = ("--data", photographs, "--frozen", "--learning-rate", 0.1, "--steps", 3, "--global-batch-size", 8, *QUICK)
    assert_done(mixer("finetune", color_weights, *words, "--image-size", 32, "--out", tmp_path / "run"))
    start = with_zero_head(resize(allmlp.load(color_weights), 32), 2)
    assert changed_parameters(tmp_path / "run" / "model.safetensors", start) == {"head.weight", "head.bias"}


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


def test_info_offers_no_published_file_for_weights_that_are_nobody_elses(mixer, tmp_path) -> None:
    model = allmlp.create("S/32")
    randomise(model, 0)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    answer = mixer("info", tmp_path / "plain.pth")
    assert_done(answer)
    assert "may be" not in answer.out
