"""``mixer fewshot``, the few-shot probe in training, and ``mixer finetune --head linear``."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import allmlp
from allmlp.errors import UserError


@pytest.fixture(autouse=True)
def own_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ALLMLP_DATA", str(tmp_path / "store"))


@pytest.fixture
def colors(pictures, tmp_path) -> Path:
    return pictures(tmp_path / "colors", {"red": 12, "green": 9, "blue": 2})


def test_fewshot(mixer, colors, color_weights, tmp_path) -> None:
    answer = mixer("fewshot", color_weights, "--data", colors, "--shots", 1, 5, "--json")
    assert answer.status == 0, answer.err
    found = json.loads(answer.out)
    assert found["top1"]["5"]["mean"] == pytest.approx(sum(found["top1"]["5"]["seeds"].values()) / 3)
    assert found["top1"]["5"]["mean"] > 0.7 > found["commonest_class"]["top1"]
    assert list(found["top1"]["1"]["seeds"]) == ["0", "1", "2"]
    assert found["commonest_class"]["class"] == "red"
    assert "1 class(es) have fewer than 5 training images" in answer.err
    text = mixer("fewshot", color_weights, color_weights, "--data", colors, "--shots", 5)
    assert text.out.count(f"{found['top1']['5']['mean']:.4f} ± {found['top1']['5']['std']:.4f}") == 2
    assert "always answering 'red'" in text.out
    assert "features of 6 images from" in text.err  # the test images
    fresh = mixer("fewshot", color_weights, "--data", colors, "--shots", 5, "--no-cache")
    assert "images from" not in fresh.err
    assert fresh.out == mixer("fewshot", color_weights, "--data", colors, "--shots", 5).out


def test_three_processes_say_what_one_says(colors, color_weights) -> None:
    words = ["fewshot", str(color_weights), "--data", str(colors), "--device", "cpu", "--no-cache", "--json"]
    command = [sys.executable, "-m", "allmlp.cli", *words, "--batch-size", "4"]
    one, three = (
        subprocess.run([*command, *more], capture_output=True, text=True, timeout=300)
        for more in ([], ["--processes", "3"])
    )
    assert (one.returncode, three.returncode) == (0, 0), three.stderr
    assert json.loads(one.stdout) == json.loads(three.stdout)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("WEIGHTS", "--data", "A", "--shots", 0), "--shots 0: must be a whole number, at least 1"),
        (("WEIGHTS", "--data", "A", "--shots"), "shots"),
        (("WEIGHTS", "--data", "A", "--l2", 0), "--l2 0.0: must be a positive number"),
        (("WEIGHTS", "--data", "A", "--part", "val"), "no val split"),
        (("--data", "A"), "no weights"),
        (("WEIGHTS", "--data", "A", "--image-size", 20), "20"),
    ],
)
def test_mistakes(words, said, mixer, colors, color_weights) -> None:
    named = {"WEIGHTS": color_weights, "A": colors}
    answer = mixer("fewshot", *(named.get(word, word) for word in words))
    assert answer.status == 2
    assert len(answer.errors) == 1
    assert said in answer.last


def test_a_training_run_probes_its_features(mixer, tiny, colors, tmp_path) -> None:
    words = (
        "train",
        "--steps",
        4,
        "--evaluate-every-steps",
        2,
        "--fewshot",
        "digits",
        colors,
        "--fewshot-shots",
        3,
        *tiny,
        "--out",
        tmp_path / "run",
    )
    answer = mixer(*words)
    assert answer.status == 0, answer.err
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    probed = {key for record in records for key in record if key.startswith("fewshot")}
    assert probed == {"fewshot_digits_3shot", "fewshot_colors_3shot"}
    assert len([record for record in records if "fewshot_digits_3shot" in record]) == 2
    assert "fewshot digits 3shot" in answer.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["fewshot"]) == probed
    assert 0.1 < summary["fewshot"]["fewshot_digits_3shot"] <= 1
    assert (tmp_path / "run" / "report.html").read_text("utf-8").count("Few-shot top-1") == 4  # captions and labels
    resumed = mixer(*words, "--resume", "auto")
    assert "nothing is left to do" in resumed.err


def test_sources_of_the_same_name(mixer, tiny, colors, tmp_path) -> None:
    answer = mixer("train", "--steps", 1, "--fewshot", colors, f"{colors}/../colors", *tiny, "--out", tmp_path / "run")
    assert answer.status == 2
    assert "two sources give fewshot_colors_5shot" in answer.last


def test_a_source_without_test_images_cannot_be_probed(mixer, tiny, pictures, tmp_path) -> None:
    data = pictures(tmp_path / "data", {"train/red": 3, "train/green": 3, "val/red": 1, "val/green": 1})
    answer = mixer("train", "--steps", 1, "--fewshot", data, *tiny, "--out", tmp_path / "run")
    assert answer.status == 2
    assert "no test split, which probes are tested on; name another source" in answer.last
    assert not (tmp_path / "run").exists()


def test_a_linear_head(mixer, pictures, color_weights, tmp_path) -> None:
    data = pictures(tmp_path / "data", {"red": 20, "blue": 20})
    words = ("finetune", color_weights, "--data", data, "--head", "linear", "--out", tmp_path / "run")
    answer = mixer(*words)
    assert answer.status == 0, answer.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["head"], summary["test_top1"], summary["val_top1"]) == ("linear", 1.0, 1.0)
    assert re.search(rf"strength {summary['strength']:g}: val top-1 1\.0000 \(chosen\)", answer.err)
    again = mixer("evaluate", tmp_path / "run", "--data", data, "--json")
    assert json.loads(again.out)["top1"] == 1.0
    before, after = allmlp.load(color_weights).state_dict(), allmlp.load(tmp_path / "run").state_dict()
    assert all(before[name].equal(after[name]) for name in before if not name.startswith("head."))
    assert after["head.bias"].abs().min() > 0
    assert (tmp_path / "run" / "report.html").is_file()
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert "nothing is left to do" in mixer(*words).err


def test_a_linear_head_stops_at_too_many_unreadable_images(mixer, pictures, color_weights, tmp_path) -> None:
    data = pictures(tmp_path / "data", {"train/red": 20, "train/blue": 20, "val/red": 3, "val/blue": 3})
    (data / "train" / "red" / "000.png").write_bytes(b"no picture")
    words = ("finetune", color_weights, "--data", data, "--head", "linear", "--out", tmp_path / "run")
    answer = mixer(*words)
    assert answer.status == 2
    assert "1 of 40 images cannot be read, more than the limit of 0.01" in answer.last
    assert not (tmp_path / "run").exists()
    assert mixer(*words, "--max-unreadable-fraction", 0.1).status == 0


def test_a_linear_head_in_python(pictures, color_weights, tmp_path) -> None:
    data = pictures(tmp_path / "data", {"red": 20, "blue": 20})
    run = allmlp.finetune(color_weights, data=data, head="linear", out=tmp_path / "run", device="cpu", workers=0)
    assert run.summary["test_top1"] == 1.0
    with pytest.raises(UserError, match="head = 'ridge': give 'trained' or 'linear'"):
        allmlp.finetune(color_weights, data=data, head="ridge")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--epochs", 3), "--epochs with a linear head (--head linear), which takes no steps"),
        (("--learning-rates", 0.1, 0.2), "--learning-rates with a linear head"),
        (("--val-fraction", 0), "--head linear needs validation images"),
    ],
)
def test_what_a_linear_head_refuses(words, said, mixer, pictures, color_weights, tmp_path) -> None:
    data = pictures(tmp_path / "data", {"red": 20, "blue": 20})
    out = tmp_path / "run"
    answer = mixer("finetune", color_weights, "--data", data, "--head", "linear", *words, "--out", out)
    assert answer.status == 2
    assert said in answer.last
    assert not out.exists()
