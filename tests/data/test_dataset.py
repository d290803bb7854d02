"""A dataset of one's own: what has the ``Dataset`` protocol is loaded, evaluated and reported."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from allmlp.data.dataset import Dataset, describe_left_out
from allmlp.data.decode import UnreadableImage
from allmlp.data.loader import UnreadableImages, evaluation_batches, training_batches
from allmlp.data.transforms import EvaluationTransform, TrainingTransform
from allmlp.evaluation.classification import classify
from allmlp.evaluation.pages.examples import choose_examples, make_example
from allmlp.metadata import Metadata, Preprocessing

EXACT = Preprocessing(crop_ratio=1.0)
EVALUATION = EvaluationTransform(image_size=(2, 2), preprocessing=EXACT)
TRAINING = TrainingTransform(image_size=(2, 2), preprocessing=EXACT, crop="none", crop_padding=0, flip=False)


class Squares:
    """Six generated images: image i has the level 10 · i. Image 4 is unreadable."""

    __slots__ = ("classes", "in_memory", "labels", "names")

    def __init__(self) -> None:
        self.classes, self.labels = ["even", "odd"], np.arange(6) % 2
        self.names, self.in_memory = [f"image {i}" for i in range(6)], True

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


SQUARES: Dataset = Squares()


def test_ignored_files_are_one_line_whatever_their_names() -> None:
    left_out = {".txt": 2, "a\x1b[31m\nmixer: done": 1, **{f".{i}": 1 for i in range(5000)}, "hidden files": 9}
    text = describe_left_out(left_out)
    assert text.startswith("5,012 files left out: 9 hidden files, 2 .txt, 1 a")
    assert text.endswith(", 4,998 of 4,998 other kinds")
    assert text.isprintable()


def test_a_protocol_is_all_that_batches_evaluation_and_report_need() -> None:
    for workers in (None, 2):
        (batch,) = evaluation_batches(SQUARES, EVALUATION, batch_size=6, workers=workers)
        assert batch.images[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 0, 50]
        assert batch.labels.tolist() == [0, 1, 0, 1, 0, 1]
        assert batch.problems == [(4, "image 4 is missing")]
    for batch in training_batches(SQUARES, TRAINING, batch_size=3, steps=4, seed=0):
        assert batch.images[batch.valid][:, 0, 0, 0].tolist() == (10 * batch.indices[batch.valid]).tolist()
    result = classify(Parity(), SQUARES, device=torch.device("cpu"), precision=torch.float32, batch_size=4)
    assert (result.top1, result.indices.tolist()) == (1, [0, 1, 2, 3, 5])
    assert result.unreadable == {"image 4": "image 4 is missing"}
    assert [row.name for row in result.per_class()] == ["even", "odd"]
    examples = [make_example(result, row, SQUARES.read(int(result.indices[row]))) for row in choose_examples(result)]
    assert [(e.name, e.label) for e in examples[:3]] == [("image 0", "even"), ("image 1", "odd"), ("image 2", "even")]
    unreadable = UnreadableImages(SQUARES, limit=1.0)
    unreadable.add([(4, "image 4 is missing")])
    assert unreadable.names == ["image 4"]
