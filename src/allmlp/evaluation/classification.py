"""Classification of a labeled dataset: every image once; sums are divided once, after all ranks have finished."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from allmlp.classifier import Classifier
from allmlp.data.dataset import Dataset
from allmlp.data.transforms import check_channels
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.errors import UserError, printable
from allmlp.evaluation.calibration import Calibration, calibrate
from allmlp.evaluation.forward import compute_all
from allmlp.evaluation.real_labels import RealScore
from allmlp.evaluation.significance import Pair, compare
from allmlp.metadata import Preprocessing

TOP_CLASSES = 5  # predicted classes that are kept for each image


@dataclass(frozen=True, kw_only=True)
class Classification:
    """The predictions for the N readable images of a dataset, in its order, with their metrics."""

    dataset: Dataset
    indices: np.ndarray  # (N,) int64, positions in the dataset
    labels: np.ndarray  # (N,) int64
    best: np.ndarray  # (N, ≤ 5) int64, classes in order of decreasing probability
    probabilities: np.ndarray  # (N, ≤ 5) float32, of those classes
    loss: float  # mean cross-entropy, in nats
    unreadable: dict[str, str]  # name → reason, of the images that were excluded because they could not be read
    real: RealScore | None = None  # on ImageNet's validation images, where the ReaL labels were asked for

    @property
    def correct(self) -> np.ndarray:
        """(N,) bool: whether the first class is the label."""
        return self.best[:, 0] == self.labels

    @property
    def top1(self) -> float:
        return float(np.mean(self.correct))

    @property
    def top5(self) -> float | None:
        """None if there are at most five classes, where it is 1 for any model."""
        if len(self.dataset.classes) <= TOP_CLASSES:
            return None
        return float(np.mean((self.best == self.labels[:, None]).any(axis=1)))

    @property
    def balanced_accuracy(self) -> float:
        """The mean recall of the classes that have images."""
        images = np.bincount(self.labels)
        return float(np.mean(np.bincount(self.labels, self.correct)[images > 0] / images[images > 0]))

    @property
    def calibration(self) -> Calibration:
        return calibrate(self.probabilities[:, 0], self.correct)

    @property
    def majority(self) -> "Majority":
        """What always answering the commonest of the labels would score on these images."""
        images = np.bincount(self.labels)
        commonest = int(images.argmax())
        answers = self.labels == commonest
        return Majority(
            self.dataset.classes[commonest], float(images[commonest] / len(answers)), compare(self.correct, answers)
        )

    @property
    def confusion_counts(self) -> np.ndarray:
        """(M, 3) int64: true class, predicted class and number of images of each pair that occurs, in ascending order.

        M is at most the number of images. A K × K matrix would take 3.8 GB for ImageNet-21k's 21,843 classes.
        """
        classes = len(self.dataset.classes)
        pairs, counts = np.unique(self.labels * classes + self.best[:, 0], return_counts=True)
        return np.stack([*np.divmod(pairs, classes), counts], axis=1)

    def per_class(self) -> list["ClassScore"]:
        """Scores in the order of the classes; None where the denominator is zero."""
        predicted = self.best[:, 0]
        columns = (
            np.bincount(values, minlength=len(self.dataset.classes)).tolist()
            for values in (self.labels, predicted[predicted == self.labels], predicted)
        )
        return [
            ClassScore(name, n, c / n if n else None, c / p if p else None)
            for name, n, c, p in zip(self.dataset.classes, *columns, strict=True)
        ]


class Majority(NamedTuple):
    """Always answering the commonest class, compared with the model on the same images."""

    name: str
    top1: float
    model: Pair  # the model, and then this answer

    @property
    def verdict(self) -> str | None:
        """What to say of a model that is no better, or not certainly better; None for one that is."""
        if self.model.difference <= 0:
            return f"no better than always answering {printable(self.name)!r}, which scores {self.top1:.4f}"
        if self.model.p_value > 0.05:
            return (
                f"not certainly better than always answering {printable(self.name)!r}, which scores {self.top1:.4f} "
                f"(McNemar's test: p = {self.model.p_value:.2g})"
            )
        return None


class ClassScore(NamedTuple):
    name: str
    images: int
    recall: float | None
    precision: float | None


def classify(
    model: Classifier,
    dataset: Dataset,
    *,
    device: torch.device,
    precision: torch.dtype,
    preprocessing: Preprocessing | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    context: DistributedContext = SINGLE_PROCESS,
) -> Classification:
    """Classifies every image of a dataset whose labels are positions in the model's logits (see ``relabeled``).

    The other arguments are those of ``compute_all``. Each rank returns the complete result.

    Raises:
        UserError: the model has no head, or none of the images can be read.
        RunError: the folder or zip of the images is gone.
    """
    check_head(model)

    def predict(images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        logits = model(images).float()
        top = logits.softmax(-1).topk(min(TOP_CLASSES, logits.shape[1]))
        return top.indices, top.values, F.cross_entropy(logits, labels.to(logits.device), reduction="none")

    indices, labels, (best, probabilities, losses), unreadable = compute_all(
        model,
        dataset,
        predict,
        device=device,
        precision=precision,
        preprocessing=preprocessing,
        batch_size=batch_size,
        workers=workers,
        on_progress=on_progress,
        context=context,
    )
    return Classification(
        dataset=dataset,
        indices=indices,
        labels=labels,
        best=best,
        probabilities=probabilities,
        loss=float(losses.astype(np.float64).sum() / len(losses)),
        unreadable=unreadable,
    )


def check_head(model: Classifier) -> None:
    """Raises a UserError for a model without a head, or one that takes no images of files."""
    if not model.num_classes:
        raise UserError("these weights have no head, only features: fine-tune them before you classify with them")
    check_channels(model.in_channels)


class SplitEvaluator:
    """Evaluates models on one split, for the evaluations of a training run.

    Args:
        name: name of the split, "val" or "test"; the prefix of the metrics.
        dataset: the images.
        device, precision, workers, context: as for ``classify``.
        on_batch: called after each batch with the number of images done, and of all images.
    """

    def __init__(
        self,
        name: str,
        dataset: Dataset,
        *,
        device: torch.device,
        precision: torch.dtype,
        workers: int | None = None,
        context: DistributedContext = SINGLE_PROCESS,
        on_batch: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.name, self.dataset, self.device, self.precision = name, dataset, device, precision
        self.workers, self.context, self.on_batch = workers, context, on_batch
        self.result: Classification | None = None  # of the last evaluation

    def __call__(self, model: Classifier) -> dict[str, float]:
        """Evaluates the model; returns {name}_top1, {name}_loss (mean cross-entropy in nats) and {name}_majority.

        The last is the accuracy of always answering the commonest class.
        """
        self.result = result = classify(
            model,
            self.dataset,
            device=self.device,
            precision=self.precision,
            workers=self.workers,
            on_progress=self.on_batch,
            context=self.context,
        )
        return {
            f"{self.name}_top1": result.top1,
            f"{self.name}_loss": result.loss,
            f"{self.name}_majority": result.majority.top1,
        }
