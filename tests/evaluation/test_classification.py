"""Metrics against values computed by hand, with a model whose predictions are prescribed."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import allmlp
from allmlp.data.dataset import ImageDataset
from allmlp.data.decode import UnreadableImage
from allmlp.errors import UserError
from allmlp.evaluation.classification import SplitEvaluator, classify
from allmlp.metadata import Metadata, Preprocessing

# true class of each image (None: unreadable, of class 4), and the ranking of the classes that the model predicts
IMAGES = [
    (0, (0, 1, 2, 3, 4, 5, 6)),
    (1, (2, 1, 0, 3, 4, 5, 6)),
    (2, (2, 1, 0, 3, 4, 5, 6)),
    (2, (3, 4, 5, 6, 0, 1, 2)),
    (None, (4, 3, 2, 1, 0, 5, 6)),
    (6, (6, 5, 4, 3, 2, 1, 0)),
    (3, (0, 1, 2, 4, 5, 3, 6)),
]
CLASSES = tuple("abcdefg")


class PrescribedModel(nn.Module):
    """Reads an image's number from its red channel and returns the logits 7, 6, … 1 in the order of its ranking."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes, self.in_channels, self.image_size = 7, 3, (4, 4)
        self.metadata = Metadata(preprocessing=Preprocessing(crop_ratio=1.0))
        self.inner = nn.Dropout()
        self.was_training: list[bool] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.was_training.append(self.training or self.inner.training)
        numbers = ((images[:, 0, 0, 0] * 0.5 + 0.5) * 255).round().int().tolist()
        logits = torch.empty(len(numbers), 7)
        for row, number in enumerate(numbers):
            logits[row, list(IMAGES[number - 1][1])] = torch.arange(7.0, 0, -1)  # numbers start at 1, black is 0
        return logits


class Numbered:
    in_memory = False

    def open(self, name: str, max_pixels: int, min_side: int | None = None) -> Image.Image:
        number = int(name)
        if IMAGES[number - 1][0] is None:
            raise UnreadableImage(f"{name} cannot be read: it is none; replace it")
        return Image.new("RGB", (4, 4), (number, 0, 0))

    def missing(self, name: str) -> bool:
        return False


def make_dataset(numbers=range(1, 8)) -> ImageDataset:
    labels = np.array([4 if (label := IMAGES[n - 1][0]) is None else label for n in numbers])
    return ImageDataset(store=Numbered(), names=tuple(map(str, numbers)), labels=labels, classes=CLASSES)


def scored(model=None, of=None, **options):
    return classify(
        model or PrescribedModel(),
        make_dataset() if of is None else of,
        device=torch.device("cpu"),
        precision=torch.float32,
        **options,
    )


@pytest.mark.parametrize(
    ("batch_size", "workers"), [(1, 0), (3, 0), (256, 0), pytest.param(2, 2, marks=pytest.mark.slow)]
)
def test_scores_by_hand(batch_size: int, workers: int) -> None:
    progress: list[tuple[int, int]] = []
    result = scored(
        batch_size=batch_size, workers=workers, on_progress=lambda done, total: progress.append((done, total))
    )
    assert progress == [(min(done + batch_size, 7), 7) for done in range(0, 7, batch_size)]
    assert result.indices.tolist() == [0, 1, 2, 3, 5, 6]
    assert result.labels.tolist() == [0, 1, 2, 2, 6, 3]
    assert result.best.tolist() == [list(ranking[:5]) for label, ranking in IMAGES if label is not None]
    assert (result.top1, result.top5) == (3 / 6, 4 / 6)
    rest = math.log(sum(math.exp(-k) for k in range(7)))
    assert result.loss == pytest.approx((0 + 1 + 0 + 6 + 0 + 5) / 6 + rest)
    assert result.probabilities[0] == pytest.approx([math.exp(-k - rest) for k in range(5)])
    pairs = [(0, 0), (1, 2), (2, 2), (2, 3), (3, 0), (6, 6)]
    assert result.confusion_counts.tolist() == [[true, predicted, 1] for true, predicted in pairs]
    assert [tuple(row) for row in result.per_class()] == [
        ("a", 1, 1.0, 1 / 2),
        ("b", 1, 0.0, None),
        ("c", 2, 1 / 2, 1 / 2),
        ("d", 1, 0.0, 0.0),
        ("e", 0, None, None),
        ("f", 0, None, None),
        ("g", 1, 1.0, 1.0),
    ]
    assert result.unreadable == {"5": "5 cannot be read: it is none; replace it"}


def test_there_is_no_top5_of_five_classes() -> None:
    sizes = {"num_blocks": 1, "hidden_dim": 4, "tokens_mlp_dim": 2, "channels_mlp_dim": 4}
    model = allmlp.create(num_classes=5, image_size=4, patch_size=4, **sizes)
    few = ImageDataset(store=Numbered(), names=("1", "2"), labels=np.array([0, 4]), classes=CLASSES[:5])
    result = scored(model, few)
    assert result.top5 is None
    assert result.best.shape == (2, 5)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_nothing_to_classify() -> None:
    with pytest.raises(UserError, match=r"none of the 1 images.*5 cannot be read"):
        scored(of=make_dataset([5]))
    model = PrescribedModel()
    model.num_classes = 0
    with pytest.raises(UserError, match="no head"):
        scored(model)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(training: bool) -> None:
    model = PrescribedModel().train(training)
    scored(model, batch_size=2)
    assert model.was_training == [False] * 4
    assert model.training is model.inner.training is training


def test_a_split_evaluator_keeps_its_last_result() -> None:
    evaluator = SplitEvaluator("val", make_dataset(), device=torch.device("cpu"), precision=torch.float32)
    for _ in range(2):
        before, expected = evaluator.result, scored()
        assert evaluator(PrescribedModel()) == {
            "val_top1": expected.top1,
            "val_loss": expected.loss,
            "val_majority": 2 / 6,  # two of the six are of class c
        }
        assert evaluator.result is not before
        assert np.array_equal(getattr(evaluator.result, "best", None), expected.best)
