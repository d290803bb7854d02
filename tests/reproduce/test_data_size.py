"""Figure 2 (right) as an experiment: its data sets, its runs, and what is repeated when it is resumed."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from allmlp.errors import Stopped, UserError
from allmlp.factory import create
from allmlp.flops import cost
from allmlp.reproduce import data_size
from allmlp.reproduce.data_size import SMALL_MODELS, DataSizeSettings, nested_order, run_data_size
from allmlp.reproduce.figures.data_size import data_size_table, draw_data_size

SETTINGS = DataSizeSettings(
    percent=(20, 100), epochs=0.5, batch_size=8, evaluations=2, finetune_steps=2, image_size=16, device="cpu",
    precision="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes, 60 training and 10 test images each."""
    from conftest import write_pictures

    root = tmp_path_factory.mktemp("source")
    for part, count in (("train", 60), ("test", 10)):
        write_pictures(root / part, dict.fromkeys(("blue", "green", "plain", "red"), count))
    return root


def names(path: str) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def contents(path: str, part: str) -> set[bytes]:
    with zipfile.ZipFile(path) as archive:
        return {archive.read(name) for name in archive.namelist() if name.startswith(f"{part}/")}


def test_the_models_are_of_like_cost() -> None:
    macs = []
    for sizes in SMALL_MODELS.values():
        options = dict(sizes)
        with torch.device("meta"):
            counted = cost(create(options.pop("model", None), num_classes=5, image_size=32, **options))
        assert counted.parameters <= 300_000
        macs.append(counted.macs)
    assert max(macs) <= 1.05 * min(macs)


def test_smaller_sets_are_parts_of_larger_ones_with_all_classes(source: Path, tmp_path: Path) -> None:
    sets = data_size.write_sets(str(source), tmp_path, SETTINGS)
    assert sets["classes"] == {"upstream": ["blue", "green"], "downstream": ["plain", "red"]}
    assert sets["images"] == 108  # of 120, of which a tenth is for validation
    small, whole = (names(sets["upstream"][percent]) for percent in SETTINGS.percent)
    for part, counts in (("train", (22, 108)), ("val", (12, 12)), ("test", (20, 20))):
        assert tuple(sum(name.startswith(f"{part}/") for name in found) for found in (small, whole)) == counts
    classes = [name.split("/")[1] for name in small if name.startswith("train/")]
    assert classes.count("blue") == classes.count("green") == 11
    first, last = (contents(sets["upstream"][percent], "train") for percent in SETTINGS.percent)
    assert first < last
    assert not last & contents(sets["upstream"][100], "val")
    assert {name.split("/")[1] for name in names(sets["downstream"])} == {"plain", "red"}


def test_an_order_of_which_any_part_has_all_classes() -> None:
    labels = np.array([0] * 60 + [1] * 30 + [2] * 10)
    order = nested_order(labels, seed=3)
    assert sorted(order) == list(range(100))
    for part in (10, 30, 70):
        assert np.bincount(labels[order[:part]], minlength=3) == pytest.approx(np.array([6, 3, 1]) * part / 10, abs=1)
    assert not np.array_equal(order, nested_order(labels, seed=4))


def test_the_experiment_and_its_repetition(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []
    out = tmp_path / "experiment"

    def run() -> dict:
        return run_data_size(
            str(source),
            out,
            ["Mixer", "ResNet"],
            SETTINGS,
            lambda row: seen.append((row["model"], row["percent"])),
            False,
        )

    result = run()
    assert seen == [("Mixer", 20), ("ResNet", 20), ("Mixer", 100), ("ResNet", 100)]
    assert {row["steps"] for row in result["rows"]} == {7}  # half an epoch of 108 images in eights
    for row in result["rows"]:
        assert row["images"] == {20: 22, 100: 108}[row["percent"]]
        assert row["epochs"] == pytest.approx(7 * 8 / row["images"])
        assert row["kept_step"] <= row["steps"]
        for key in ("pretraining_val_top1", "pretraining_test_top1", "fewshot_top1", "finetuned_top1"):
            assert 0 <= row[key] <= 1
    assert (out / "figure2-right.json").exists()
    table = data_size_table(result)
    assert table.to_csv().count("\n") == 5
    assert len(draw_data_size(result["rows"]).axes) == 3
    weights = {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}
    assert len(weights) == 8
    again = run()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")} == weights  # nothing was repeated
    keys = ("fewshot_top1", "finetuned_top1", "pretraining_test_top1", "kept_step")
    assert [[row[key] for key in keys] for row in again["rows"]] == [
        [row[key] for key in keys] for row in result["rows"]
    ]
    with pytest.raises(UserError, match="holds this experiment with another source or other settings"):
        run_data_size(str(source), out, ["Mixer"], DataSizeSettings(), progress=False)


def test_a_signal_says_how_to_resume(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*words: object, **options: object) -> None:
        raise Stopped("stopped by SIGTERM after step 3: resume with allmlp.train(…)", 143)

    monkeypatch.setattr(data_size, "train", stopped)
    with pytest.raises(Stopped, match="repeat the same command to resume in") as caught:
        run_data_size(str(source), tmp_path / "out", ["Mixer"], SETTINGS, progress=False)
    assert caught.value.status == 143


def test_bad_input(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--models B/16: this experiment has Mixer, ViT, ResNet"):
        run_data_size(str(source), tmp_path, ["B/16"], SETTINGS)
    two = tmp_path / "two"
    from conftest import write_pictures

    write_pictures(two / "train", {"red": 4, "blue": 4})
    with pytest.raises(UserError, match="needs at least 4 classes, and test images"):
        run_data_size(str(two), tmp_path / "out", ["Mixer"], SETTINGS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--models", "Mixer"), "give --data for the right"),
        (("--data", "nowhere/"), "nowhere"),
        (("--data", "digits", "--models", "B/16"), "--models B/16: this experiment has"),
        (("--data", "digits", "--real-labels", "x.json"), "--real-labels x.json: figure2 does not use them"),
    ],
)
def test_mistakes_on_the_command_line(mixer, words: tuple, said: str, tmp_path: Path) -> None:
    done = mixer("reproduce", "figure2", *words, "--out", tmp_path / "out")
    assert done.status == 2
    assert len(done.errors) == 1
    assert said in done.errors[0]
