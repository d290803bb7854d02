"""The probe on the images of a source: only the images that are needed, once, with the same results as ``probe``."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import allmlp
from allmlp.api.fewshot import fewshot
from allmlp.data.dataset import ImageDataset
from allmlp.data.decode import UnreadableImage
from allmlp.data.stores import ArrayStore, FolderStore
from allmlp.errors import UserError
from allmlp.evaluation.features import FeatureTable, extract_features
from allmlp.evaluation.fewshot import probe
from allmlp.evaluation.fewshot_task import FewshotEvaluator, make_task, probe_preprocessing
from allmlp.metadata import Preprocessing

CLASSES = ("a", "b", "c", "d")
SIZES = {"num_blocks": 1, "hidden_dim": 12, "tokens_mlp_dim": 4, "channels_mlp_dim": 8, "patch_size": 4}
CPU: dict[str, Any] = {"device": torch.device("cpu"), "precision": torch.float32}


def images(count: int, seed: int) -> ImageDataset:
    """Noise of four classes, of which the last has two images, and "c" none."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1], count)
    labels[:2] = 3
    names = tuple(f"{i}.png" for i in range(count))
    pixels = rng.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
    return ImageDataset(store=ArrayStore(pixels, names), names=names, labels=labels, classes=CLASSES)


def model(num_classes: int = 0) -> allmlp.Mixer:
    return allmlp.create(num_classes=num_classes, image_size=8, seed=1, **SIZES)


def test_the_same_as_the_probe_on_all_features() -> None:
    train, test = images(80, 0), images(50, 1)
    preprocessing = probe_preprocessing(Preprocessing())
    asked: list[int] = []

    def extract(data: ImageDataset) -> FeatureTable:
        asked.append(len(data))
        return extract_features(model(), data, preprocessing=preprocessing, **CPU)

    task = make_task(train, test, [1, 5, 40], [0, 3])
    result = task.run(extract, 2.0**10)
    whole = [extract(data) for data in (train, test)]
    expected = probe(whole[0].features, train.labels, whole[1].features, test.labels, 4, shots=[1, 5, 40], seeds=[0, 3])
    assert result.accuracy == pytest.approx(expected)
    assert asked[0] == result.train_images <= 80
    assert result.small_classes == {1: 1, 5: 2, 40: 4 if (np.bincount(train.labels)[:2] < 40).all() else 3}
    counts = np.bincount(test.labels)
    assert result.commonest_top1 == counts.max() / 50
    assert result.mean(5) == pytest.approx(np.mean([expected[0, 5], expected[3, 5]]))
    assert result.std(5) == pytest.approx(np.std([expected[0, 5], expected[3, 5]], ddof=1))
    assert make_task(train, test, [1], [0]).run(extract, 1.0).std(1) is None
    assert asked[-2] == 3  # of 80: one each of the three classes that have any


def test_images_are_resized_on_both_sides() -> None:
    assert probe_preprocessing(Preprocessing(crop="resmall", crop_ratio=0.5)) == Preprocessing(
        crop="resize", crop_ratio=0.5
    )


class Damaged(ArrayStore):
    def open(self, name: str, max_pixels: int, min_side: int | None = None) -> Image.Image:
        if name == "4.png":
            raise UnreadableImage("4.png cannot be read: it is damaged; replace it")
        return super().open(name, max_pixels, min_side)


def test_unreadable_images_are_counted_and_left_out() -> None:
    train = images(30, 0)
    assert isinstance(train.store, ArrayStore)
    train = dataclasses.replace(train, store=Damaged(train.store.pixels, train.names))
    result = make_task(train, images(20, 1), [100], [0]).run(
        lambda data: extract_features(model(), data, preprocessing=Preprocessing(), **CPU), 1.0
    )
    assert result.train_images == 29
    readable = images(30, 0).subset(np.delete(np.arange(30), 4))
    tables = [
        extract_features(model(), data, preprocessing=Preprocessing(), **CPU) for data in (readable, images(20, 1))
    ]
    (expected,) = probe(
        *(part for table in tables for part in (table.features, table.labels)), 4, shots=[100], seeds=[0], l2=1.0
    ).values()
    assert result.accuracy == {(0, 100): pytest.approx(expected)}
    assert list(result.unreadable) == ["4.png"]


def test_nothing_to_probe_with() -> None:
    with pytest.raises(UserError, match="0 training and 20 test images"):
        make_task(images(20, 0).subset(np.array([], dtype=int)), images(20, 1), [1], [0])


class NotFinite(allmlp.Mixer):
    def features(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        found = super().features(images, keys)
        found[-1] = float("nan")
        return found


def test_features_that_are_not_finite() -> None:
    broken = NotFinite(num_classes=0, image_size=8, **SIZES)
    with pytest.raises(UserError, match=r"features of 2 of 10 images are not finite, the first of 4\.png.*float32"):
        extract_features(broken, images(10, 0), preprocessing=Preprocessing(), batch_size=5, **CPU)


def test_the_evaluator_of_a_training_run() -> None:
    task = make_task(images(60, 0), images(40, 1), [5], [0, 1, 2])
    evaluator = FewshotEvaluator("somewhere", task, 5, 2.0**10, **CPU)
    found = evaluator(model(num_classes=7))
    assert list(found) == ["fewshot_somewhere_5shot"] == [evaluator.name]
    assert evaluator.result is not None
    assert found[evaluator.name] == evaluator.result.mean(5)
    assert len(evaluator.result.accuracy) == 3


# The cache of features


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(8):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(path)
    return tmp_path / "data"


def dataset_of(folder: Path) -> ImageDataset:
    names = tuple(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png")))
    labels = np.array([int(name.startswith("b")) for name in names])
    return ImageDataset(store=FolderStore(folder), names=names, labels=labels, classes=("a", "b"))


def test_features_are_kept_by_content(folder: Path, tmp_path: Path) -> None:
    cache, mixer, calls = tmp_path / "cache", model(3), []
    progress = lambda done, total: calls.append(done)  # noqa: E731

    def table(mixer: allmlp.Mixer = mixer, **options: Any) -> FeatureTable:
        calls.clear()
        options = {"preprocessing": Preprocessing(), "workers": 0, **CPU} | options
        return extract_features(mixer, dataset_of(folder), cache=cache, on_progress=progress, **options)

    first = table()
    assert calls
    again = table()
    assert not calls
    assert np.array_equal(first.features, again.features)
    assert np.array_equal(first.labels, again.labels)
    with torch.no_grad():
        mixer.head.weight.add_(1)
    table()
    assert not calls  # features do not depend on the head
    changes: list[Any] = [
        lambda: mixer.blocks[0].norm1.bias.data.add_(1),
        lambda: Image.new("RGB", (8, 8)).save(folder / "a" / "0.png"),  # same name, other content
        lambda: (folder / "a" / "0.png").rename(folder / "b" / "0.png"),  # same content, other label
        lambda: (folder / "b" / "1.png").unlink(),
    ]
    for change in changes:
        change()
        table()
        assert calls
        table()
        assert not calls
    table(preprocessing=Preprocessing(crop_ratio=1.0))
    assert calls
    data = dataset_of(folder)
    other = dataclasses.replace(data, labels=1 - data.labels)
    options: dict[str, Any] = {"preprocessing": Preprocessing(), "cache": cache, **CPU}
    assert np.array_equal(extract_features(mixer, other, **options).labels, 1 - data.labels)
    table(precision=torch.bfloat16)
    assert calls


def test_a_damaged_cache_is_computed_again(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"preprocessing": Preprocessing(), "cache": tmp_path / "cache", **CPU}
    first = extract_features(model(), dataset_of(folder), **options)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:50])
    assert np.array_equal(extract_features(model(), dataset_of(folder), **options).features, first.features)
    assert "cannot be read" in caplog.text
    (tmp_path / "file").touch()
    extract_features(model(), dataset_of(folder), **options | {"cache": tmp_path / "file"})
    assert "the features are not kept" in caplog.text


def test_fewshot_in_python(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ALLMLP_DATA", str(tmp_path / "store"))
    for i in range(8):
        Image.new("RGB", (8, 8), (255 * (i % 2), 0, 255 - i)).save(folder / "ab"[i % 2] / f"{i}.png")
    found = fewshot(model(), folder, shots=[1, 2], seeds=[5], workers=0, device="cpu")
    assert list(found.accuracy) == [(5, 1), (5, 2)]
    assert found.mean(2) == 1.0
    assert len(list((tmp_path / "store" / "features").iterdir())) == 2
    with pytest.raises(UserError, match="shots = 0"):
        fewshot(model(), folder, shots=[0])
    with pytest.raises(UserError, match="model 3: give a Mixer"):
        fewshot(3, folder)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="data 3: give a name"):
        fewshot(model(), 3)  # type: ignore[arg-type]
