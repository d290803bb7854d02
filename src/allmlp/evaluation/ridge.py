"""The linear probe of Section 3: a ridge regression from frozen features to classes, solved in closed form.

As in big_vision's ``fewshot_lsr.py``: features are standardized, targets are ±1, and the bias is a last feature of
constant 100, regularized like the others.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BIAS = 100.0
EPSILON = 1e-5  # added to the standard deviation of each feature
MAX_ROWS = 1 << 14  # of features that are standardized together


class Probe(NamedTuple):
    """Scores of features x (N, C): [(x − mean) / std, 100] @ weights."""

    mean: Tensor  # (C,) float64
    std: Tensor  # (C,) float64, of the population, plus ``EPSILON``
    weights: Tensor  # (C + 1, K) float64, the last row for the bias

    def predict(self, x: Tensor) -> Tensor:
        """(N, C) features → (N,) classes, on the device of the features."""
        return torch.cat([self.scores(rows).argmax(1) for rows in x.split(MAX_ROWS)]).to(x.device)

    def scores(self, x: Tensor) -> Tensor:
        """(N, C) features → (N, K), near 1 for the class and −1 for the others."""
        return with_bias((in_float64(x) - self.mean) / self.std) @ self.weights


def fit(x: Tensor, labels: np.ndarray, num_classes: int, l2: float) -> Probe:
    """The probe of features (N, C) and labels (N,) from 0; a class without images has targets of −1.

    Solved in float64, so that float32 features have the exact solution's classes, whatever their scale.
    """
    x = in_float64(x)
    mean, std = x.mean(0), x.std(0, correction=0) + EPSILON
    targets = torch.full((len(labels), num_classes), -1.0, dtype=x.dtype, device=x.device)
    targets[torch.arange(len(labels)), torch.as_tensor(labels, device=x.device)] = 1.0
    return Probe(mean, std, ridge(with_bias((x - mean) / std), targets, l2))


def in_float64(x: Tensor) -> Tensor:
    return x.to("cpu" if x.device.type == "mps" else x.device, torch.float64)  # MPS has no float64


def with_bias(x: Tensor) -> Tensor:
    """(N, C) → (N, C + 1)"""
    return torch.cat([x, torch.full_like(x[:, :1], BIAS)], dim=1)


def ridge(x: Tensor, targets: Tensor, l2: float) -> Tensor:
    """W (C, K) of least ‖x W − targets‖² + l2 ‖W‖², solved in the smaller of feature and sample space."""
    by_features = x.shape[1] <= x.shape[0]
    gram = x.mT @ x if by_features else x @ x.mT
    factor = torch.linalg.cholesky(gram + l2 * torch.eye(len(gram), dtype=x.dtype, device=x.device))
    if by_features:
        return torch.cholesky_solve(x.mT @ targets, factor)
    return x.mT @ torch.cholesky_solve(targets, factor)
