"""All metrics of a classification, as text, JSON and pages show them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from allmlp.errors import UserError
from allmlp.evaluation.classification import Classification
from allmlp.evaluation.significance import Interval, bootstrap_balanced_accuracy, bootstrap_proportion

AVERAGE_OF_FIVE = ("imagenet", "cifar10", "cifar100", "pets", "flowers102")


class Score(NamedTuple):
    key: str  # in JSON
    label: str
    value: float  # a fraction
    interval: Interval  # 95 %, by the bootstrap


def list_scores(result: Classification) -> list[Score]:
    """Top-1; top-5 where there are more than five classes; ReaL for ImageNet; balanced accuracy."""
    correct, total = result.correct, len(result.labels)

    def proportion(key: str, label: str, hits: int, images: int) -> Score:
        return Score(key, label, hits / images, bootstrap_proportion(hits, images))

    scores = [proportion("top1", "top-1", int(correct.sum()), total)]
    if result.top5 is not None:
        scores.append(proportion("top5", "top-5", round(result.top5 * total), total))
    if (real := result.real) is not None:
        scores.append(proportion("real_top1", "ReaL top-1", real.correct, real.images))
    images = np.bincount(result.labels)
    interval = bootstrap_balanced_accuracy(np.bincount(result.labels[correct], minlength=len(images)), images)
    return [*scores, Score("balanced_accuracy", "balanced accuracy", result.balanced_accuracy, interval)]


def to_json_object(result: Classification) -> dict[str, Any]:
    """The metrics as JSON values; ``top5`` and ``real`` are null where they do not exist."""
    scores, majority, calibration, real = list_scores(result), result.majority, result.calibration, result.real
    return {
        "images": len(result.labels),
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss,
        "balanced_accuracy": result.balanced_accuracy,
        "intervals": {score.key: list(score.interval) for score in scores},
        "majority": {
            "class": majority.name,
            "top1": majority.top1,
            "p_value": majority.model.p_value,
            "verdict": majority.verdict,
        },
        "calibration": {"ece": calibration.ece, "bins": calibration.rows()},
        "real": None
        if real is None
        else {"top1": real.top1, "images": real.images, "without_label": real.without_label},
        "classes": list(result.dataset.classes),
        "per_class": [row._asdict() for row in result.per_class()],
        "confusion_counts": result.confusion_counts.tolist(),
        "unreadable_images": len(result.unreadable),
        "unreadable": result.unreadable,
    }


def average_of_five(top1: Mapping[str, float]) -> float:
    """The paper's "Avg. 5": the unweighted mean over ImageNet (original labels), CIFAR-10, CIFAR-100, Pets, Flowers.

    Args:
        top1: the accuracy on the test images of each of the five, by the name of the source.

    Raises:
        UserError: one of them is missing, or there is another.
    """
    if missing := [name for name in AVERAGE_OF_FIVE if name not in top1]:
        raise UserError(
            f"the average of five tasks lacks {', '.join(missing)}: give all of {', '.join(AVERAGE_OF_FIVE)}"
        )
    if others := [name for name in top1 if name not in AVERAGE_OF_FIVE]:
        raise UserError(f"{', '.join(others)}: not among the five tasks, {', '.join(AVERAGE_OF_FIVE)}")
    return float(np.mean([top1[name] for name in AVERAGE_OF_FIVE]))
