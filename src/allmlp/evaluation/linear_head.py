"""A regularized linear classifier on frozen features, with its strength chosen on validation images."""

import logging
import warnings
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from allmlp.errors import UserError
from allmlp.evaluation.ridge import EPSILON

log = logging.getLogger(__name__)

STRENGTHS = tuple(10.0**exponent for exponent in range(0, -7, -1))  # strongest first: each fit starts from the last
MAX_ITERATIONS = 1000
ABSENT = 20.0  # by which the logit of a class without training images is below the mean of the others


class LinearHead(NamedTuple):
    """Logits of features x (N, C): x @ weight.T + bias."""

    weight: np.ndarray  # (K, C) float64
    bias: np.ndarray  # (K,) float64
    strength: float  # of ℓ2: the loss is the mean cross-entropy + strength / 2 · ‖W‖² on standardized features
    tried: dict[float, float]  # strength → validation accuracy

    def predict(self, x: np.ndarray) -> np.ndarray:
        return (x @ self.weight.T + self.bias).argmax(1)


def fit_linear_head(
    x: np.ndarray, labels: np.ndarray, val_x: np.ndarray, val_labels: np.ndarray, num_classes: int
) -> LinearHead:
    """A multinomial logistic regression, by scikit-learn, with the strength that is best on validation images.

    Of equally good strengths, the strongest is kept.

    Args:
        x, labels: (N, C) training features and (N,) labels from 0.
        val_x, val_labels: (M, C) and (M,).
        num_classes: K; a class without training images is never predicted.

    Raises:
        UserError: the training images are all of one class.
    """
    present = np.unique(labels)
    if len(present) < 2:
        raise UserError("the training images are all of one class: a linear head needs at least two")
    mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64) + EPSILON
    standardized = (x - mean) / std
    model = LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True)
    best, tried = None, {}
    for strength in STRENGTHS:
        model.set_params(C=1 / (strength * len(x)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(standardized, labels)
        if max(model.n_iter_) >= MAX_ITERATIONS:
            log.warning("the linear head of strength %g stopped after %d iterations", strength, MAX_ITERATIONS)
        head = in_features(model, mean, std, present, num_classes)
        tried[strength] = float(np.mean((val_x @ head[0].T + head[1]).argmax(1) == val_labels))
        if best is None or tried[strength] > tried[best[0]]:
            best = strength, head
    assert best is not None
    strength, (weight, bias) = best
    return LinearHead(weight, bias, strength, tried)


def in_features(
    model: LogisticRegression, mean: np.ndarray, std: np.ndarray, present: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weight (K, C) and bias (K,) for features that are not standardized."""
    weight, bias = np.asarray(model.coef_, dtype=np.float64), np.asarray(model.intercept_, dtype=np.float64)
    if len(present) == 2:  # scikit-learn fits one logit, that of the second class
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / std
    bias = bias - weight @ mean
    # the logit of a class without images is the mean of the others' minus ABSENT, and so below their maximum
    all_weights, all_biases = np.tile(weight.mean(0), (num_classes, 1)), np.full(num_classes, bias.mean() - ABSENT)
    all_weights[present], all_biases[present] = weight, bias
    return all_weights, all_biases
