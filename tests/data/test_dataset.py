"""Loaders, evaluation and the report ask of a dataset no more than the ``Dataset`` protocol."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from allmlp.data.dataset import Dataset, ImageDataset
from allmlp.data.decode import UnreadableImage
from allmlp.data.loader import UnreadableImages, default_workers, evaluation_batches, training_batches
from allmlp.data.stores import ArrayStore, FolderStore, ZipStore
from allmlp.data.transforms import EvaluationTransform, TrainingTransform
from allmlp.evaluation.classification import classify
from allmlp.evaluation.run_report import choose_examples, make_example
from allmlp.metadata import Metadata, Preprocessing

EXACT = Preprocessing(crop_ratio=1.0)
EVALUATION = EvaluationTransform(image_size=(2, 2), preprocessing=EXACT)
TRAINING = TrainingTransform(image_size=(2, 2), preprocessing=EXACT, crop="none", crop_padding=0, flip=False)


class Names(Sequence[str]):
    """A sequence of computed names, not a tuple of strings."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> str:
        return f"image {range(6)[index]}"


class Squares:
    """Six generated images: image i has the level 10 · i. Image 4 is unreadable."""

    __slots__ = ("classes", "in_memory", "labels", "names")

    def __init__(self) -> None:
        self.classes, self.labels = ["even", "odd"], np.arange(6) % 2
        self.names, self.in_memory = Names(), True

    def __len__(self) -> int:
        return 6

    def read(self, index: int, min_side: int | None = None) -> Image.Image:
        if index == 4:
            raise UnreadableImage("image 4 is missing")
        return Image.new("RGB", (3, 3), (10 * index,) * 3)


class Parity:
    """Classifies images by the parity of their level."""

    image_size, in_channels, num_classes = (2, 2), 3, 2
    metadata = Metadata(preprocessing=EXACT)

    def features(self, images: Tensor) -> Tensor:
        return ((images[:, 0, 0, 0] + 1) * 127.5).round() / 10

    def __call__(self, images: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(self.features(images).long() % 2, 2).float()


@pytest.fixture
def squares() -> Dataset:
    return Squares()


@pytest.mark.parametrize("workers", [None, 2])
def test_batches(squares: Dataset, workers: int | None) -> None:
    (batch,) = evaluation_batches(squares, EVALUATION, batch_size=6, workers=workers)
    assert batch.images[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 0, 50]
    assert batch.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert batch.problems == [(4, "image 4 is missing")]
    for batch in training_batches(squares, TRAINING, batch_size=3, steps=4, seed=0, workers=workers):
        assert batch.images[batch.valid][:, 0, 0, 0].tolist() == (10 * batch.indices[batch.valid]).tolist()


def test_evaluation_and_report(squares: Dataset) -> None:
    result = classify(Parity(), squares, device=torch.device("cpu"), precision=torch.float32, batch_size=4)
    assert result.top1 == 1
    assert result.indices.tolist() == [0, 1, 2, 3, 5]
    assert result.unreadable == {"image 4": "image 4 is missing"}
    assert [row.name for row in result.per_class()] == ["even", "odd"]
    examples = [make_example(result, row, squares.read(int(result.indices[row]))) for row in choose_examples(result)]
    assert [(example.name, example.label) for example in examples[:3]] == [
        ("image 0", "even"),
        ("image 1", "odd"),
        ("image 2", "even"),
    ]


def test_unreadable_images_have_names(squares: Dataset) -> None:
    unreadable = UnreadableImages(squares, limit=1.0)
    unreadable.add([(4, "image 4 is missing")])
    assert unreadable.names == ["image 4"]


def test_a_dataset_in_memory_needs_no_workers(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    names = tuple(map(str, range(200)))
    stores = {
        ArrayStore(np.zeros((200, 1, 1, 3), np.uint8), names): 0,
        FolderStore(tmp_path): 4,
        ZipStore(tmp_path / "a.zip"): 4,
    }
    for store, workers in stores.items():
        dataset: Dataset = ImageDataset(store=store, names=names, labels=np.zeros(200, np.int64), classes=("a",))
        assert dataset.in_memory is (workers == 0)
        assert default_workers(dataset) == workers
