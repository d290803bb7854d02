"""Mistakes and damaged files: the right exit status, one line that says what and what to do, nothing half-written."""

import contextlib
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import allmlp
from allmlp.data.loader import PADDING, evaluation_batches, training_batches
from allmlp.data.sources import load_source
from allmlp.data.transforms import EvaluationTransform, TrainingTransform

SMALL = ("--image-size", "16", "--patch-size", "8", "--epochs", "1", "--compile", "off")
MANY = {"train/red": 60, "train/blue": 60, "val/red": 3, "val/blue": 3, "test/red": 3, "test/blue": 3}


@pytest.fixture
def train(mixer, tiny, tmp_path):
    """``mixer train --data SOURCE`` of a tiny model into ``tmp_path/out/run``; nothing may be there after a mistake."""
    return lambda source, *words: mixer(
        "train", "--data", source, *SMALL, *tiny, "--out", tmp_path / "out" / "run", *words
    )


def assert_mistake(answer, *said: str, status: int = 2) -> None:
    assert answer.status == status
    assert len(answer.errors) == 1, answer.err
    assert answer.last == answer.errors[0]
    assert "Traceback" not in answer.err
    for words in said:
        assert words in answer.last


def assert_only_mistake(answer, *said: str) -> None:
    """One line and no other, as for every mistake that is found before the work begins."""
    assert_mistake(answer, *said)
    assert len(answer.err.splitlines()) == 1
    assert answer.out == ""


def leftovers(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# what is not there, or not what it should be


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_no_such_folder(mixer, train, color_weights, tmp_path, command) -> None:
    gone = tmp_path / "gone"
    answer = {
        "train": lambda: train(gone),
        "evaluate": lambda: mixer("evaluate", color_weights, "--data", gone),
        "predict": lambda: mixer("predict", color_weights, gone),
    }[command]()
    assert_only_mistake(answer, str(gone), "give")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_a_folder_without_images(mixer, train, color_weights, tmp_path, command) -> None:
    bare = tmp_path / "bare"
    (bare / "red").mkdir(parents=True)
    (bare / "red" / "notes.txt").write_text("none")
    answer = {
        "train": lambda: train(bare),
        "evaluate": lambda: mixer("evaluate", color_weights, "--data", bare),
        "predict": lambda: mixer("predict", color_weights, bare),
    }[command]()
    assert_only_mistake(answer, str(bare), "holds no images", "give")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_an_empty_class(mixer, train, color_weights, pictures, tmp_path, command) -> None:
    data = pictures(tmp_path / "data", {"red": 5, "blue": 5, "green": 0})
    answer = train(data) if command == "train" else mixer("evaluate", color_weights, "--data", data)
    assert_only_mistake(answer, "'green'", "holds no images", "remove the folder")
    assert not (tmp_path / "out").exists()


def test_near_names(mixer, train, tmp_path) -> None:
    assert_only_mistake(train("digitz"), "'digitz'", "did you mean digits?")
    assert_only_mistake(mixer("train", "cifar", "--out", tmp_path / "out"), "'cifar'", "did you mean cifar10?")
    assert_only_mistake(mixer("trian"), "'trian'", "did you mean train?", "mixer --help")
    assert_only_mistake(mixer("xyzzy"), "'xyzzy'", "train, finetune, status, evaluate, predict, info, resize, convert")
    assert_only_mistake(mixer("info", "B/17"), "'B/17'", "B/16")
    assert_mistake(mixer("train", "--model", "B/61", "--out", tmp_path / "out"), "'B/61'", "B/16")
    assert_only_mistake(mixer("train", "--epoch", 3), "--epoch", "did you mean --epochs")
    assert_only_mistake(mixer("train", "--learning_rat=3"), "did you mean --learning-rate")
    assert_only_mistake(mixer("evaluate", "w", "--dta", "x"), "--data")
    assert_only_mistake(mixer("predict", "w", "a.jpg", "--topp", 3), "did you mean --top")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--epochs", "many"], ["many"]),
        (["--epochs", "-1"], ["--epochs", "-1", "above 0"]),
        (["--precision", "float8"], ["float8", "bfloat16"]),
        (["--val-fraction", "1.5"], ["--val-fraction", "1.5", "below 1"]),
        (["--device", "toaster"], ["'toaster'", "auto, cpu, cuda"]),
        (["--image-size", "15", "--patch-size", "4"], ["15×15", "4×4", "use 16×16"]),
    ],
)
def test_impossible_values(mixer, tmp_path, words, said) -> None:
    answer = mixer("train", *words, "--out", tmp_path / "out" / "run")
    assert_mistake(answer, *said)
    assert answer.out == ""
    assert not (tmp_path / "out").exists()


def test_image_size_of_info(mixer) -> None:
    assert_only_mistake(mixer("info", "B/16", "--image-size", 230), "230×230", "16×16", "use 224×224")


def test_recipe_files(mixer, digits_run, tmp_path) -> None:
    whole = json.loads((digits_run.out / "recipe.json").read_text())
    path, out = tmp_path / "recipe.json", tmp_path / "out"
    for change, said in (
        ({"epoch": 3}, ["'epoch'", "epochs"]),
        ({"epochs": "three"}, ["epochs", "'three'", "float"]),
        ({"decay": "exponential"}, ["'exponential'", "'linear', 'cosine'"]),
    ):
        path.write_text(json.dumps(whole | {"optimization": whole["optimization"] | change}))
        assert_only_mistake(mixer("train", "--recipe-file", path, "--out", out), str(path), *said)
    path.write_text("{")
    assert_only_mistake(mixer("train", "--recipe-file", path, "--out", out), str(path), "recipe.json")
    assert_only_mistake(mixer("train", "digits", "--recipe-file", path, "--out", out), "'digits'", "one of them")
    assert not out.exists()


@pytest.mark.parametrize("command", ["evaluate", "predict", "info"])
@pytest.mark.parametrize("kind", ["gone", "folder", "text", "cut short", "changed", "another's"])
def test_a_weights_file_that_is_none(mixer, color_weights, pictures, tmp_path, command, kind) -> None:
    path = tmp_path / "w.safetensors"
    whole = color_weights.read_bytes()
    {
        "gone": lambda: None,
        "folder": path.mkdir,
        "text": lambda: path.write_text("no weights"),
        "cut short": lambda: path.write_bytes(whole[:-100]),
        "changed": lambda: path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1])),
        "another's": lambda: save_file({"a": torch.zeros(2)}, path),
    }[kind]()
    data = pictures(tmp_path / "data", {"red": 2, "blue": 2})
    rest = {"evaluate": ["--data", data], "predict": [data], "info": []}[command]
    assert_only_mistake(mixer(command, path, *rest), str(path))


def test_the_folder_of_a_run_is_never_overwritten(train, pictures, tmp_path) -> None:
    data = pictures(tmp_path / "data", {"red": 5, "blue": 5})
    there = tmp_path / "out" / "run"
    there.mkdir(parents=True)
    (there / "precious.txt").write_text("keep")
    assert_only_mistake(train(data), str(there), "exists", "--out")
    assert leftovers(tmp_path / "out") == ["run/precious.txt"]
    assert (there / "precious.txt").read_text() == "keep"


def test_classes_that_the_model_does_not_know(mixer, color_weights, pictures, tmp_path) -> None:
    data = pictures(tmp_path / "data", {"red": 5, "mauve": 5})
    assert_only_mistake(mixer("evaluate", color_weights, "--data", data), "'mauve'", "'red'", "rename")


def test_one_class_is_too_few(train, pictures, tmp_path) -> None:
    assert_mistake(train(pictures(tmp_path / "data", {"red": 5})), "one class, red", "at least two")
    assert not (tmp_path / "out").exists()


def test_a_damaged_zip(mixer, train, color_weights, tmp_path) -> None:
    path = tmp_path / "photos.zip"
    path.write_bytes(b"PK\x03\x04 and no more")
    for answer in (
        train(path),
        mixer("evaluate", color_weights, "--data", path),
        mixer("predict", color_weights, path),
    ):
        assert_only_mistake(answer, str(path), "not a valid zip")


@pytest.mark.parametrize("words", [["--batch-size", "0"], ["--batch-size", "-1"], ["--workers", "-1"]])
def test_impossible_values_of_evaluate(mixer, color_weights, pictures, tmp_path, words) -> None:
    data = pictures(tmp_path / "data", {"red": 5, "blue": 5})
    assert_only_mistake(mixer("evaluate", color_weights, "--data", data, *words), words[1])


@pytest.mark.parametrize("words", [["--batch-size", "0"], ["--top", "0"], ["--device", "cuda:99"]])
def test_impossible_values_of_predict(mixer, color_weights, pictures, tmp_path, words) -> None:
    data = pictures(tmp_path / "data", {"red": 2})
    assert_only_mistake(mixer("predict", color_weights, data, *words), words[1])


def test_predict_needs_an_image(mixer, color_weights) -> None:
    assert_only_mistake(mixer("predict", color_weights), "mixer predict WEIGHTS a.jpg")


def test_predict_needs_a_trained_head(mixer, pictures, tmp_path) -> None:
    model = allmlp.create(
        num_classes=2, image_size=8, patch_size=8, num_blocks=1, hidden_dim=4, tokens_mlp_dim=2, channels_mlp_dim=4
    )
    allmlp.save(model, tmp_path / "fresh.safetensors")
    answer = mixer("predict", tmp_path / "fresh.safetensors", pictures(tmp_path / "data", {"red": 1}))
    assert_mistake(answer, "all zero", "train it first", "mixer finetune")


@pytest.mark.parametrize("seed", [2**40, 2**64], ids=["2**40", "2**64"])
def test_large_seeds(mixer, tiny, tmp_path, seed) -> None:
    """They work, or are refused as a mistake."""
    answer = mixer("train", "--epochs", 0.05, *tiny, "--seed", seed, "--out", tmp_path / "run", "--json")
    if answer.status:
        assert_mistake(answer, "--seed", str(seed))
    else:
        assert json.loads(answer.out)["seed"] == seed


@pytest.fixture
def odd_names(pictures, tmp_path) -> Path:
    """A folder of images of which one has a name that is no UTF-8, as an old camera or zip leaves them."""
    data = pictures(tmp_path / "data", {"red": 4, "blue": 4})
    try:
        shutil.copy(data / "red" / "000.png", os.fsencode(data / "red") + b"/caf\xe9.png")
    except OSError as error:
        pytest.skip(f"this file system takes no such name: {error}")
    return data


def test_training_on_names_that_are_no_utf8(train, odd_names) -> None:
    assert train(odd_names).status == 0


@pytest.mark.parametrize("form", ["table", "csv", "jsonl"])
def test_prediction_of_names_that_are_no_utf8(mixer, color_weights, odd_names, monkeypatch, form) -> None:
    file = io.BytesIO()
    out = io.TextIOWrapper(file, encoding="utf-8", write_through=True)  # as the process would have it
    monkeypatch.setattr(contextlib, "redirect_stdout", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(sys, "stdout", out)
    assert mixer("predict", color_weights, odd_names, "--format", form).status == 0
    assert b"caf" in file.getvalue()


# images that cannot be read


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_nothing_but_unreadable_images(mixer, train, color_weights, bad_picture, tmp_path, command) -> None:
    file, data, said = bad_picture
    for color in ("red", "blue"):
        (tmp_path / "data" / color).mkdir(parents=True)
        (tmp_path / "data" / color / file).write_bytes(data)
    answer = {
        "train": lambda: train(tmp_path / "data", "--json"),
        "evaluate": lambda: mixer("evaluate", color_weights, "--data", tmp_path / "data", "--part", "all", "--json"),
        "predict": lambda: mixer("predict", color_weights, tmp_path / "data" / "red" / file),
    }[command]()
    assert_mistake(answer, file, said)
    assert "; " in answer.last  # the remedy
    if command != "train":
        assert len(answer.err.splitlines()) == 1
    assert not (tmp_path / "out" / "run").exists()


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_training_goes_on_without_an_unreadable_image(train, pictures, bad_picture, tmp_path, kind) -> None:
    file, data, said = bad_picture
    if kind == "zip" and file != "truncated.jpg":
        pytest.skip("one kind of damage is enough for a zip")
    root = source = pictures(tmp_path / "data", MANY)
    bad = ["train/red/", "val/blue/", "test/blue/"]
    for folder in bad:
        (root / folder / file).write_bytes(data)
    if kind == "zip":
        source = tmp_path / "data.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for path in sorted(root.rglob("*.*")):
                archive.write(path, path.relative_to(root))
    answer = train(source, "--json", "--global-batch-size", 40, "--epochs", 2)
    assert answer.status == 0, answer.err
    summary = json.loads(answer.out)
    stored = json.loads((tmp_path / "out/run/summary.json").read_text())
    assert summary == {key: summary[key] for key in ("out", "weights", "report")} | stored
    assert summary["images"] == {"train": 121, "val": 7, "test": 7}
    assert summary["unreadable_images"] == 3
    assert summary["unreadable"] == [folder + file for folder in bad]
    assert round(summary["test_top1"] * 6, 6).is_integer()  # of the six that can be read, not of seven
    assert answer.last == f"3 unreadable image(s): {', '.join(folder + file for folder in bad)}"
    told = [line for line in answer.err.splitlines() if "left out of its batch" in line]
    assert len(told) == 1  # in training; once, though two epochs met it
    assert f"train/red/{file}" in told[0]
    assert said in told[0]


def test_training_stops_above_one_percent(train, pictures, bad_picture, tmp_path) -> None:
    file, data, said = bad_picture
    root = pictures(tmp_path / "data", {"train/red": 60, "train/blue": 60, "val/red": 2, "val/blue": 2})
    for name in ("a", "b"):
        (root / "train" / "red" / f"{name}-{file}").write_bytes(data)
    answer = train(root)
    assert_mistake(answer, "2 of 122 images", "0.01", "--max-unreadable-fraction", file, said)
    assert not (tmp_path / "out" / "run").exists()
    answer = train(root, "--max-unreadable-fraction", "0.02", "--json")
    assert answer.status == 0
    assert json.loads(answer.out)["unreadable_images"] == 2


def test_evaluation_goes_on_without_an_unreadable_image(mixer, color_weights, pictures, bad_picture, tmp_path) -> None:
    file, data, said = bad_picture
    root = pictures(tmp_path / "data", {"red": 60, "blue": 60})
    clean = json.loads(mixer("evaluate", color_weights, "--data", root, "--part", "all", "--json").out)
    (root / "red" / file).write_bytes(data)
    answer = mixer("evaluate", color_weights, "--data", root, "--part", "all", "--json")
    assert answer.status == 0
    found = json.loads(answer.out)
    assert found["unreadable_images"] == 1
    assert list(found["unreadable"]) == [f"red/{file}"]
    assert said in found["unreadable"][f"red/{file}"]
    assert answer.last == f"1 unreadable image(s): red/{file}"
    for key in ("images", "top1", "per_class", "confusion_counts"):  # it counts neither as right nor as wrong
        assert found[key] == clean[key]
    assert found["loss"] == pytest.approx(clean["loss"], rel=1e-5)
    table = mixer("evaluate", color_weights, "--data", root, "--part", "all")
    assert table.status == 0
    assert table.last == f"1 unreadable image(s): red/{file}"
    assert "120 images" in table.out


def test_prediction_goes_on_without_an_unreadable_image(mixer, color_weights, pictures, bad_picture, tmp_path) -> None:
    file, data, said = bad_picture
    root = pictures(tmp_path / "data", {"red": 55, "blue": 55})
    clean = json.loads(mixer("predict", color_weights, root, "--json").out)["predictions"]
    (root / "blue" / f"020-{file}").write_bytes(data)
    answer = mixer("predict", color_weights, root, "--json")
    assert answer.status == 0
    rows = json.loads(answer.out)["predictions"]
    shown = f"{root}/blue/020-{file}"
    assert answer.last == f"1 unreadable image(s): {shown}"
    assert len(answer.err.splitlines()) == 1
    place = [row["image"] for row in rows].index(shown)
    assert place == 20
    assert rows[place].keys() == {"image", "problem"}
    assert said in rows[place]["problem"]
    rest = rows[:place] + rows[place + 1 :]
    assert [row["image"] for row in rest] == [row["image"] for row in clean]
    for row, expected in zip(rest, clean, strict=True):
        assert [c["class"] for c in row["predictions"]] == [c["class"] for c in expected["predictions"]]


def test_a_place_is_masked_and_filled_by_no_other_image(pictures, bad_picture, tmp_path) -> None:
    _, data, _ = bad_picture
    root = pictures(tmp_path / "data", {"red": 6, "blue": 6})
    options = {"val_fraction": 0, "test_fraction": 0}
    model = allmlp.create(
        num_classes=2, image_size=16, patch_size=8, num_blocks=1, hidden_dim=4, tokens_mlp_dim=2, channels_mlp_dim=4
    )
    seen_by = {"image_size": (16, 16), "preprocessing": model.metadata.preprocessing}
    train_view = TrainingTransform(**seen_by, crop="inception", crop_padding=0, flip=True)

    def batches():
        part = load_source(str(root), **options).split("train")
        yield from training_batches(part, train_view, batch_size=5, steps=5, seed=3)
        yield from evaluation_batches(part, EvaluationTransform(**seen_by), batch_size=5)

    clean = list(batches())
    victim = root / "blue" / "003.png"
    victim.write_bytes(data)
    met = 0
    for batch, before in zip(batches(), clean, strict=True):
        assert torch.equal(batch.indices, before.indices)
        assert torch.equal(batch.labels, before.labels)
        bad = batch.indices == 3
        met += int(bad.sum())
        assert torch.equal(batch.valid, ~bad & (batch.indices != PADDING))
        assert not batch.images[bad].any()
        assert torch.equal(batch.images[~bad], before.images[~bad])
        assert all(index == 3 and str(victim) in problem for index, problem in batch.problems)
        assert len(batch.problems) == int(bad.sum())
    assert met == 3  # two epochs of training, one evaluation


# a full disk


def assert_nothing_half_written(out: Path) -> None:
    for path in out.rglob("*") if out.exists() else ():
        assert not path.name.startswith(".") or path.name == ".lock", f"{path} is a temporary file"
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            load_file(path) if path.name.startswith("shard-") else allmlp.load(path)
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")


def test_a_full_disk_simulated(train, pictures, tmp_path, monkeypatch) -> None:
    """The disk fills up before the first file is complete, then before the second, and so on to the last."""
    data = pictures(tmp_path / "data", {"red": 12, "blue": 12})
    fsync, calls, room = os.fsync, 0, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "out" / "run"
    for room in range(60):  # noqa: B007 (full reads it)
        calls = 0
        answer = train(data, "--json")
        if answer.status == 0:
            break
        assert_mistake(answer, "No space left on device", status=1)
        assert answer.out == ""
        assert_nothing_half_written(out)
        assert out.exists() == any((out / "checkpoints").iterdir() if out.exists() else [])
        assert out.exists() or not out.parent.exists()  # nor the folders made on the way
        shutil.rmtree(out.parent, ignore_errors=True)
    assert answer.status == 0
    assert room >= 5  # recipe, two checkpoints, weights, summary at least


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB."""
    at = tmp_path / "disk"
    at.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", at], capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no small file system to fill: {error}")
    if done.returncode:
        pytest.skip(f"no small file system to fill: {done.stderr.strip()}")
    yield at
    subprocess.run(["umount", at], check=True)


@pytest.mark.parametrize("filler", [0, 192, 200], ids=["at the weights", "at the metrics", "from the start"])
def test_a_full_disk(mixer, tiny, small_disk, filler) -> None:
    (small_disk / "filler").write_bytes(bytes(filler * 1024))
    out = small_disk / "run"
    larger = ("--hidden-dim", "128", "--channels-mlp-dim", "512")
    answer = mixer("train", "--epochs", "0.2", "--log-every-steps", 1, *tiny, *larger, "--out", out, "--json")
    assert_mistake(answer, str(out), status=1)
    assert answer.out == ""
    assert "Exception" not in answer.err
    assert not out.exists()
    assert leftovers(small_disk) == ["filler"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("words", [["info", "B/16", "--json"], ["--help"], ["info", "--help"]], ids=" ".join)
def test_a_full_disk_below_standard_output(words) -> None:
    command = [sys.executable, "-c", "import sys; from allmlp.cli import main; sys.exit(main())"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*command, *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("mixer: ")


def test_debug_shows_the_traceback(mixer, color_weights, tmp_path) -> None:
    answer = mixer("predict", color_weights, tmp_path / "gone.jpg", "--debug")
    assert answer.status == 2
    assert "Traceback" in answer.err
    assert len(answer.errors) == 1


def test_random_bytes_as_images_end_in_one_line(mixer, color_weights, tmp_path) -> None:
    rng = np.random.default_rng(0)
    for i, start in enumerate((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"RIFF1234WEBP")):
        (tmp_path / f"{i}.png").write_bytes(start + rng.bytes(500))
    answer = mixer("predict", color_weights, tmp_path, "--format", "jsonl")
    assert_mistake(answer, "6 unreadable image(s)")
    assert len([json.loads(line)["problem"] for line in answer.out.splitlines()]) == 6
