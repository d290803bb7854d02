"""``mixer data inspect`` and ``mixer data dedup`` as users call them, and training without what they list."""

import csv
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("imagehash")


@pytest.fixture
def data(pictures, tmp_path) -> Path:
    """A training image that is also a test image, under another class."""
    folders = {f"{part}/{color}": count for part, count in (("train", 12), ("test", 4)) for color in ("red", "blue")}
    root = pictures(tmp_path / "data", folders)
    for path in root.rglob("*.png"):  # the fixture draws the same noise for names of the same length
        path.rename(path.with_name(f"{path.parent.parent.name}-{path.name}"))
    shutil.rmtree(root / "test")
    pictures(tmp_path / "other", {"longer/test/red": 4, "longer/test/blue": 4})
    shutil.copytree(tmp_path / "other" / "longer" / "test", root / "test")
    shutil.copy(root / "train" / "red" / "train-003.png", root / "test" / "blue" / "copy.png")
    return root


def test_inspect(mixer, data, tmp_path) -> None:
    answer = mixer("data", "inspect", data, "--json", "--page", tmp_path / "page.html")
    assert answer.status == 0, answer.err
    found = json.loads(answer.out)
    assert found["parts"]["test"] == {"blue": 5, "red": 4}
    exact = [pair for pair in found["duplicates"]["pairs"] if pair["kind"] == "same file"]
    assert {"part": "test", "class": "blue", "name": "test/blue/copy.png"} in [pair["second"] for pair in exact]
    assert (tmp_path / "page.html").is_file()
    text = mixer("data", "inspect", data).out
    assert "33 images (24 train, 9 test) of 2 classes" in text
    assert "same file" in text
    assert "no duplicates" in mixer("data", "inspect", "digits", "--exclude", every_near_digit(mixer, tmp_path)).out


def every_near_digit(mixer, tmp_path) -> Path:
    """A list of the digits that look like others."""
    found = json.loads(mixer("data", "inspect", "digits", "--json").out)
    assert found["images"] == 1797
    path = tmp_path / "near.txt"
    path.write_text("\n".join({pair["second"]["name"] for pair in found["duplicates"]["pairs"]}))
    return path


def test_dedup_and_training_without_what_it_lists(mixer, data, tiny, tmp_path) -> None:
    answer = mixer("data", "dedup", data, "--against", data, "--exact", "--out", tmp_path / "gone.csv")
    assert answer.status == 0, answer.err
    with (tmp_path / "gone.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {
        "name": "train/red/train-003.png",
        "reason": "same file",
        "source": str(data),
        "match": "test/blue/copy.png",
    } in rows
    words = ("train", "--data", data, "--steps", 1, *tiny)
    before = mixer(*words, "--out", tmp_path / "one")
    assert f"{len(rows)} test images are train images too" in before.err
    assert "images are under two classes" in before.err
    after = mixer(*words, "--exclude", tmp_path / "gone.csv", "--out", tmp_path / "two")
    assert after.status == 0, after.err
    assert "are train images too" not in after.err
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["left_out"] == {f"listed in {tmp_path / 'gone.csv'}": len(rows)}
    assert summary["images"]["train"] + summary["images"]["val"] == 24 - len(rows)
    weights = tmp_path / "two" / "model.safetensors"
    for verb in ("evaluate", "fewshot"):
        answer = mixer(verb, weights, "--data", data, "--part", "test", "--exclude", tmp_path / "gone.csv", "--json")
        assert answer.status == 0, answer.err
        assert f"{len(rows)} listed in" in answer.err
    words = ("finetune", weights, "--data", data, "--steps", 1, "--learning-rate", 0.1)
    tuned = mixer(*words, "--exclude", tmp_path / "gone.csv", "--out", tmp_path / "tuned")
    assert tuned.status == 0, tuned.err
    assert "are train images too" not in tuned.err


def test_other_sources(mixer, data, tmp_path) -> None:
    answer = mixer("data", "dedup", data, "--against", "digits", data, "--json", "--out", tmp_path / "gone.csv")
    assert answer.status == 2
    assert "--against digits: it has no test part" in answer.last
    assert not (tmp_path / "gone.csv").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("data", "inpsect", "digits"), "mixer data inpsect: did you mean inspect?"),
        (("data", "inspect"), "required"),
        (("data", "inspect", "digits", "--page", "no/page.html"), "there is no folder no"),
        (("data", "dedup", "digits"), "against"),
        (
            ("data", "dedup", "DATA", "--against", "DATA", "--part", "test"),
            "each test image would be its own duplicate",
        ),
        (
            ("data", "dedup", "DATA", "--against", "DATA", "--out", "no/list.csv"),
            "--out no/list.csv: there is no folder",
        ),
        (("data", "inspect", "nothing-here"), "no data at 'nothing-here'"),
        (("train", "--data", "DATA", "--exclude", "no.csv"), "--exclude no.csv"),
    ],
)
def test_mistakes(words, said, mixer, data) -> None:
    answer = mixer(*(data if word == "DATA" else word for word in words))
    assert answer.status == 2
    assert len(answer.errors) == 1
    assert said in answer.last


def test_help(mixer) -> None:
    assert "mixer data dedup SOURCE --against" in mixer("data", "--help").out
    assert "mixer data inspect photos/" in mixer("data", "inspect", "--help").out
