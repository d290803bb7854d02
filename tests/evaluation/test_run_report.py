"""Which images a report shows, what it costs to read them, and the example files of a run."""

import csv
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_results import Gray, classified
from PIL import Image, ImageFilter

import allmlp
from allmlp.config.recipe import Recipe
from allmlp.data.dataset import ImageDataset
from allmlp.data.sources import load_source
from allmlp.data.stores import FolderStore
from allmlp.evaluation.classification import Classification, classify
from allmlp.evaluation.pages.examples import choose_examples, find_mistakes
from allmlp.evaluation.pages.run_report import write_run_report
from allmlp.metadata import Preprocessing

CPU = torch.device("cpu")
SIZES = {"patch_size": 16, "num_blocks": 1, "hidden_dim": 8, "tokens_mlp_dim": 4, "channels_mlp_dim": 8}


def report(folder: Path, result: Classification, model: Any = None) -> Path:
    """The folder of a run of the model, with its report."""
    folder.mkdir(parents=True)
    model = model or allmlp.create(num_classes=len(result.dataset.classes), image_size=32, **SIZES)
    run: Any = SimpleNamespace(
        folder=folder, recipe=Recipe(), summary={}, metrics=[], model=model, results={"val": result}
    )
    write_run_report(run)
    return folder


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_examples_take_each_class_in_turn(labels: list[int]) -> None:
    """The n-th image of every class comes before the n + 1-st of any, in order of the classes."""
    order = sorted(range(len(labels)), key=lambda i: (labels[:i].count(labels[i]), labels[i]))
    assert choose_examples(classified(labels, labels, classes="abcde")) == order[:24]


def test_the_most_confident_mistakes_come_first() -> None:
    result = classified([0, 0, 0, 1, 1, 2], [0, 1, 0, 1, 2, 0], [0.9, 0.6, 0.7, 0.8, 0.95, 0.6])
    assert find_mistakes(result) == [4, 1, 5]  # of 0.6 and 0.6, the earlier image first
    assert find_mistakes(result, 1) == [4]
    assert find_mistakes(classified([0, 1], [0, 1])) == []


def test_files_of_a_report(tmp_path: Path) -> None:
    classes = ("../up/and away", "ümlaut: " + "x" * 300, "=c\udcff,")
    result = classified([0, 1, 1], [0, 1, 0], classes=classes)
    folder = report(tmp_path / "run", result)
    files = sorted(path.name for path in (folder / "examples").iterdir())
    assert [name[:9] for name in files] == ["0-___up_a", "1-ümlaut_", "2-ümlaut_"]
    assert len(files[1].encode()) < 255
    with Image.open(folder / "examples" / files[1]) as image:
        assert (image.mode, image.size, np.asarray(image).max()) == ("RGB", (4, 4), 3)  # row 1 is image 3, in its size
    page = (folder / "report.html").read_text("utf-8")
    assert page.count('alt="5.png"') == 2  # an example and a mistake, but read once:
    assert isinstance(result.dataset, ImageDataset)
    assert isinstance(result.dataset.store, Gray)
    assert result.dataset.store.opened == {"1.png": 1, "3.png": 1, "5.png": 1}
    with (folder / "per_class.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["number", "name", "images", "recall", "precision"],
            ["0", classes[0], "1", "1.0", "0.5"],
            ["1", classes[1], "2", "0.5", "1.0"],
            ["2", "=c\\udcff,", "0", "", ""],
        ]


def photographs(folder: Path, kinds: list[str], size: tuple[int, int]) -> ImageDataset:
    """Smoothed noise, as detailed as a photograph that was scaled up, in two classes."""
    folder.mkdir()
    for i, kind in enumerate(kinds):
        noise = np.random.default_rng(i).integers(0, 256, (size[1] // 20, size[0] // 20, 3), dtype=np.uint8)
        image = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1)).resize(size)
        image.save(folder / f"{i}.{kind}", exif=image.getexif() if i % 2 else rotated(image))
    names = tuple(f"{i}.{kind}" for i, kind in enumerate(kinds))
    labels = np.arange(len(kinds)) % 2
    return ImageDataset(store=FolderStore(folder), names=names, labels=labels, classes=("a", "b"))


def rotated(image: Image.Image) -> Image.Exif:
    exif = image.getexif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize("crop", ["resmall", "resize"])
def test_the_model_predicts_the_same_for_saved_examples(crop: Any, tmp_path: Path) -> None:
    """They are small, whatever the size of the photographs, and after reading them the model has the same pixels."""
    dataset = photographs(tmp_path / "photos", ["jpg", "png", "webp", "jpg"], (903, 610))
    model = allmlp.create(num_classes=2, image_size=(64, 48), **SIZES)
    torch.nn.init.normal_(model.get_parameter("head.weight"))
    model.metadata = replace(model.metadata, classes=("a", "b"), preprocessing=Preprocessing(crop=crop))
    result = classify(model, dataset, device=CPU, precision=torch.float32, workers=0)
    folder = report(tmp_path / "run", result, model) / "examples"
    predictions = allmlp.predict(model, sorted(folder.iterdir()), device="cpu", precision="float32")
    assert len(predictions) == 4
    for prediction, row in zip(predictions, choose_examples(result), strict=True):
        best = [(dataset.classes[k], p) for k, p in zip(result.best[row], result.probabilities[row], strict=True)]
        assert [name for name, _ in prediction.classes] == [name for name, _ in best]
        assert [p for _, p in prediction.classes] == pytest.approx([p for _, p in best], abs=1e-6)
    for path in folder.iterdir():
        with Image.open(path) as image:
            assert min(image.size) <= 73  # 64 / (224 / 256)


class Large:
    """Images of 3 million pixels, of which at most one may be held at its full size."""

    in_memory = False

    def __init__(self) -> None:
        self.held: list[weakref.ref[Image.Image]] = []
        self.asked: set[int | None] = set()

    def open(self, name: str, max_pixels: int, min_side: int | None = None) -> Image.Image:
        assert all(max(image.size) <= 160 for held in self.held if (image := held()) is not None)
        image = Image.new("RGB", (2000, 1500))
        self.held.append(weakref.ref(image))
        self.asked.add(min_side)
        return image


def test_large_photographs_cost_neither_memory_nor_disk(tmp_path: Path) -> None:
    result = classified(np.arange(40) % 2, np.arange(40) // 20, classes=("a", "b"))
    assert isinstance(result.dataset, ImageDataset)
    folder = report(tmp_path / "run", replace(result, dataset=replace(result.dataset, store=(store := Large()))))
    assert len(store.held) == 32  # 24 examples and 20 mistakes, 12 of them both
    assert store.asked == {74}  # twice 32 / (224 / 256)
    assert sum(path.stat().st_size for path in (folder / "examples").iterdir()) < 100_000
    assert (folder / "report.html").stat().st_size < 1_000_000


def test_the_report_of_a_run_shows_its_test_images(digits_run) -> None:
    page = (digits_run.out / "report.html").read_text()
    source = load_source("digits")
    test = source.split("test")
    assert sum(name in page for name in test.names) >= 24
    assert not any(name in page for name in source.split("train").names)
    shown = {np.asarray(test.read(i)).tobytes(): test.labels[i] for i in range(len(test))}
    files = sorted((digits_run.out / "examples").iterdir())
    assert [path.name for path in files] == [f"{i}-{i}.png" for i in range(8)]
    for number, path in enumerate(files):
        with Image.open(path) as image:
            assert shown[np.asarray(image).tobytes()] == number
