"""Classification of a labelled part: every image once, sums divided once."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from allmlp.data.loader import default_workers, evaluation_batches
from allmlp.data.sources import ImageDataset
from allmlp.data.transforms import EvaluationView, normalise
from allmlp.device import autocast
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.errors import UserError
from allmlp.model import Mixer

KEPT = 5  # best classes of each image


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Predictions for the N readable images of a part, in its order, and what they amount to."""

    part: ImageDataset
    indices: np.ndarray  # (N,) int64, of the readable images in the part
    labels: np.ndarray  # (N,) int64
    best: np.ndarray  # (N, ≤ 5) int64, classes from the most probable down
    probabilities: np.ndarray  # (N, ≤ 5) float32, of those
    loss: float  # mean cross-entropy, in nats
    unreadable: dict[str, str]  # name → what is wrong; these count neither as right nor as wrong

    @property
    def top1(self) -> float:
        return float(np.mean(self.best[:, 0] == self.labels))

    @property
    def top5(self) -> float | None:
        """None where there are no more than five classes: it would be 1 for any model."""
        if len(self.part.classes) <= KEPT:
            return None
        return float(np.mean((self.best == self.labels[:, None]).any(axis=1)))

    @property
    def confusion(self) -> np.ndarray:
        """(K, K) counts: rows are the true classes, columns the predicted ones."""
        classes = len(self.part.classes)
        pairs = self.labels * classes + self.best[:, 0]
        return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)

    def per_class(self) -> list["ClassScore"]:
        """In the order of the classes; None where there is nothing to divide by."""
        right, shown, guessed = (self.confusion.diagonal(), self.confusion.sum(axis=1), self.confusion.sum(axis=0))
        return [
            ClassScore(name, int(n), int(r) / int(n) if n else None, int(r) / int(g) if g else None)
            for name, n, r, g in zip(self.part.classes, shown, right, guessed, strict=True)
        ]


class ClassScore(NamedTuple):
    name: str
    images: int
    recall: float | None
    precision: float | None


def classify(
    model: Mixer,
    part: ImageDataset,
    *,
    device: torch.device,
    precision: torch.dtype,
    batch_size: int = 256,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    context: DistributedContext = SINGLE_PROCESS,
) -> Classification:
    """Classifies every image of a part whose labels are those of the model's head (``Part.relabelled``).

    The ranks of a world share the work; each returns all of the result, to the last bit that of one process.

    Raises:
        UserError: a model without a head, or a part of which no image can be read.
    """
    check_head(model)
    found, done = [], 0
    view = EvaluationView(image_size=model.image_size, preprocessing=model.metadata.preprocessing)
    batches = evaluation_batches(
        part,
        view,
        batch_size=batch_size,
        workers=default_workers(part, context.local_world_size) if workers is None else workers,
        rank=context.rank,
        world_size=context.world_size,
    )
    with evaluating(model.to(device)), torch.inference_mode():
        for batch in batches:
            with autocast(device, precision):
                logits = model(normalise(batch.images.to(device), model.metadata.preprocessing)).float()
            losses = F.cross_entropy(logits, batch.labels.to(device), reduction="none")
            top = logits.softmax(-1).topk(min(KEPT, logits.shape[1]))
            columns = (batch.indices, batch.labels, top.indices.cpu(), top.values.cpu(), losses.cpu())
            problems = {part.names[index]: problem for index, problem in batch.problems}
            found.append(([column[batch.valid].numpy() for column in columns], problems))
            done += len(batch.valid) * context.world_size
            on_progress(min(done, len(part)), len(part))
    world_size = context.all_gather(found)
    in_order = [world_size[i % context.world_size][i // context.world_size] for i in range(sum(map(len, world_size)))]
    unreadable = {name: problem for _, problems in in_order for name, problem in problems.items()}
    if len(unreadable) == len(part):
        raise UserError(f"none of the {len(part)} images can be read; the first: {next(iter(unreadable.values()), '')}")
    indices, labels, best, probabilities, losses = (
        np.concatenate(c) for c in zip(*(c for c, _ in in_order), strict=True)
    )
    return Classification(
        part=part,
        indices=indices,
        labels=labels,
        best=best,
        probabilities=probabilities,
        loss=float(losses.astype(np.float64).sum() / len(losses)),
        unreadable=unreadable,
    )


@contextlib.contextmanager
def evaluating(model: Mixer) -> Iterator[None]:
    """In evaluation mode for as long as it takes."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def check_head(model: Mixer) -> None:
    """A UserError for a model that cannot classify."""
    if not model.config["num_classes"]:
        raise UserError("these weights have no head, only features: fine-tune them before classifying with them")
