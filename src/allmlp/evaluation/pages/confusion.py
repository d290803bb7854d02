"""The confusion matrix and the scores of the classes, as a page shows them."""

import math

import numpy as np

from allmlp.evaluation.classification import Classification, ClassScore
from allmlp.evaluation.pages.charts import draw_confusion_image

MAX_TABLE_CLASSES = 30  # with more classes, a confusion matrix is drawn as an image instead of a table of counts
MAX_CLASS_ROWS = 1000  # with more classes, only those with the lowest recall have a row in the table of scores


def describe_confusion(result: Classification) -> dict:
    """What the template shows: a table of all cells for few classes, else an image and the most confused pairs."""
    classes, pairs = result.dataset.classes, result.confusion_counts
    images = np.bincount(result.labels, minlength=len(classes))
    shares = pairs[:, 2] / images[pairs[:, 0]]
    description = {"classes": classes, "cells": [], "image": None, "pairs": []}
    if len(classes) <= MAX_TABLE_CLASSES:
        cells = [[(0, 0.0)] * len(classes) for _ in classes]
        for (true, predicted, number), share in zip(pairs.tolist(), shares.tolist(), strict=True):
            cells[true][predicted] = (number, math.sqrt(share))  # so that one mistake in a hundred is still visible
        return description | {"cells": cells}
    wrong = np.flatnonzero(pairs[:, 0] != pairs[:, 1])
    most = wrong[np.argsort(-pairs[wrong, 2], kind="stable")[:20]]
    confused = [
        (classes[true], classes[predicted], number, share)
        for (true, predicted, number), share in zip(pairs[most].tolist(), shares[most].tolist(), strict=True)
    ]
    return description | {"image": draw_confusion_image(pairs, len(classes)), "pairs": confused}


def worst_classes(result: Classification) -> list[tuple[int, ClassScore]]:
    """Number and scores of the classes, lowest recall first, at most ``MAX_CLASS_ROWS``; those without images last."""
    scores = enumerate(result.per_class())
    return sorted(scores, key=lambda row: math.inf if row[1].recall is None else row[1].recall)[:MAX_CLASS_ROWS]
