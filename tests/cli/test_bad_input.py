"""Images that cannot be read, odd names and full disks: what can be done is done, the rest told in one line."""

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
from safetensors.torch import load_file

import allmlp
from allmlp.data.loader import PADDING, evaluation_batches, training_batches
from allmlp.data.sources import load_source
from allmlp.data.transforms import EvaluationTransform, TrainingTransform

SMALL = ("--image-size", "16", "--patch-size", "8", "--epochs", "1", "--compile", "off")
MANY = {"train/red": 60, "train/blue": 60, "val/red": 3, "val/blue": 3, "test/red": 3, "test/blue": 3}


@pytest.fixture
def train(mixer, tiny, tmp_path):
    """``mixer train --data SOURCE`` of a tiny model into ``tmp_path/out/run``."""
    return lambda source, *words: mixer(
        "train", "--data", source, *SMALL, *tiny, "--out", tmp_path / "out" / "run", *words
    )


def assert_one_line(answer, *said: str, status: int = 2) -> None:
    assert answer.status == status
    assert answer.errors == [answer.last]
    assert "Traceback" not in answer.err
    assert [words for words in said if words not in answer.last] == [], answer.last


@pytest.mark.parametrize("seed", [2**40, 2**64], ids=["2**40", "2**64"])
def test_large_seeds_work_or_are_refused(mixer, tiny, tmp_path, seed) -> None:
    answer = mixer("train", "--epochs", 0.05, *tiny, "--seed", seed, "--out", tmp_path / "run", "--json")
    if answer.status:
        assert_one_line(answer, "--seed", str(seed))
    else:
        assert json.loads(answer.out)["seed"] == seed


def test_names_that_are_no_utf8(mixer, train, color_weights, pictures, tmp_path, monkeypatch) -> None:
    data = pictures(tmp_path / "data", {"red": 4, "blue": 4})
    try:
        shutil.copy(data / "red" / "000.png", os.fsencode(data / "red") + b"/caf\xe9.png")
    except OSError as error:
        pytest.skip(f"this file system takes no such name: {error}")
    assert train(data).status == 0
    monkeypatch.setattr(contextlib, "redirect_stdout", lambda _: contextlib.nullcontext())
    for form in ("table", "csv", "jsonl"):
        file = io.BytesIO()
        out = io.TextIOWrapper(file, encoding="utf-8", write_through=True)  # as the process would have it
        monkeypatch.setattr(sys, "stdout", out)
        assert mixer("predict", color_weights, data, "--format", form).status == 0
        assert b"caf" in file.getvalue()


# Images that cannot be read


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
    assert_one_line(answer, file, said, "; ")  # after the semicolon, the remedy
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
    assert summary["images"] == {"train": 121, "val": 7, "test": 7}
    assert summary["unreadable_images"] == 3
    assert summary["unreadable"] == [folder + file for folder in bad]
    assert round(summary["test_top1"] * 6, 6).is_integer()  # of the six that can be read, not of seven
    assert answer.last == f"3 unreadable image(s): {', '.join(folder + file for folder in bad)}"
    (told,) = [line for line in answer.err.splitlines() if "left out of its batch" in line]  # though two epochs met it
    assert f"train/red/{file}" in told
    assert said in told


def test_training_stops_above_one_percent(train, pictures, bad_picture, tmp_path) -> None:
    file, data, said = bad_picture
    root = pictures(tmp_path / "data", {"train/red": 60, "train/blue": 60, "val/red": 2, "val/blue": 2})
    for name in ("a", "b"):
        (root / "train" / "red" / f"{name}-{file}").write_bytes(data)
    assert_one_line(train(root), "2 of 122 images", "0.01", "--max-unreadable-fraction", file, said)
    assert not (tmp_path / "out" / "run").exists()
    answer = train(root, "--max-unreadable-fraction", "0.02", "--json")
    assert json.loads(answer.out)["unreadable_images"] == 2


def test_evaluation_goes_on_without_an_unreadable_image(mixer, color_weights, pictures, bad_picture, tmp_path) -> None:
    file, data, said = bad_picture
    root = pictures(tmp_path / "data", {"red": 60, "blue": 60})
    words = ("evaluate", color_weights, "--data", root, "--part", "all")
    clean = json.loads(mixer(*words, "--json").out)
    (root / "red" / file).write_bytes(data)
    answer = mixer(*words, "--json")
    found = json.loads(answer.out)
    assert found["unreadable_images"] == 1
    assert list(found["unreadable"]) == [f"red/{file}"]
    assert said in found["unreadable"][f"red/{file}"]
    assert answer.last == f"1 unreadable image(s): red/{file}"
    for key in ("images", "top1", "per_class", "confusion_counts"):  # it counts neither as right nor as wrong
        assert found[key] == clean[key]
    assert found["loss"] == pytest.approx(clean["loss"], rel=1e-5)
    table = mixer(*words)
    assert (table.status, table.last) == (0, answer.last)
    assert "120 images" in table.out


def test_prediction_goes_on_without_an_unreadable_image(mixer, color_weights, pictures, bad_picture, tmp_path) -> None:
    file, data, said = bad_picture
    root = pictures(tmp_path / "data", {"red": 55, "blue": 55})
    clean = json.loads(mixer("predict", color_weights, root, "--json").out)["predictions"]
    (root / "blue" / f"020-{file}").write_bytes(data)
    answer = mixer("predict", color_weights, root, "--json")
    assert answer.status == 0
    shown = f"{root}/blue/020-{file}"
    assert answer.err.splitlines() == [f"1 unreadable image(s): {shown}"]
    rows = json.loads(answer.out)["predictions"]
    bad = rows.pop(20)
    assert (bad["image"], bad.keys()) == (shown, {"image", "problem"})
    assert said in bad["problem"]
    for row, expected in zip(rows, clean, strict=True):
        assert row["image"] == expected["image"]
        assert [c["class"] for c in row["predictions"]] == [c["class"] for c in expected["predictions"]]


def test_a_place_is_masked_and_filled_by_no_other_image(pictures, bad_picture, tmp_path) -> None:
    _, data, _ = bad_picture
    root = pictures(tmp_path / "data", {"red": 6, "blue": 6})
    view = {"image_size": (16, 16), "preprocessing": allmlp.metadata.Preprocessing()}
    train_view = TrainingTransform(**view, crop="inception", crop_padding=0, flip=True)

    def batches():
        part = load_source(str(root), val_fraction=0, test_fraction=0).split("train")
        yield from training_batches(part, train_view, batch_size=5, steps=5, seed=3)
        yield from evaluation_batches(part, EvaluationTransform(**view), batch_size=5)

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


def test_random_bytes_as_images_end_in_one_line(mixer, color_weights, tmp_path) -> None:
    rng = np.random.default_rng(0)
    for i, start in enumerate((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"RIFF1234WEBP")):
        (tmp_path / f"{i}.png").write_bytes(start + rng.bytes(500))
    answer = mixer("predict", color_weights, tmp_path, "--format", "jsonl")
    assert_one_line(answer, "6 unreadable image(s)")
    assert len([json.loads(line)["problem"] for line in answer.out.splitlines()]) == 6


# A full disk


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
        assert_one_line(answer, "No space left on device", status=1)
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
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", at], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no small file system to fill: {error}")
    yield at
    subprocess.run(["umount", at], check=True)


@pytest.mark.parametrize("filler", [0, 192, 200], ids=["at the weights", "at the metrics", "from the start"])
def test_a_full_disk(mixer, tiny, small_disk, filler) -> None:
    (small_disk / "filler").write_bytes(bytes(filler * 1024))
    out = small_disk / "run"
    larger = ("--hidden-dim", "128", "--channels-mlp-dim", "512")
    answer = mixer("train", "--epochs", "0.2", "--log-every-steps", 1, *tiny, *larger, "--out", out, "--json")
    assert_one_line(answer, str(out), status=1)
    assert answer.out == ""
    assert "Exception" not in answer.err
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("words", [["info", "B/16", "--json"], ["--help"], ["info", "--help"]], ids=" ".join)
def test_a_full_disk_below_standard_output(words) -> None:
    command = [sys.executable, "-c", "import sys; from allmlp.cli import main; sys.exit(main())"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*command, *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("mixer: ")
