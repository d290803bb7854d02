"""The few-shot linear probe of Section 3: a ridge regression from frozen features to classes, solved in closed form.

As in big_vision's ``fewshot_lsr.py``: features are standardized, targets are ±1, and the bias is a last feature of
constant 100, regularized like the others.
"""

from collections.abc import Iterable, Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from allmlp.errors import UserError, brief
from allmlp.sizes import whole_number

BIAS = 100.0
EPSILON = 1e-5  # added to the standard deviation of each feature

Features = np.ndarray | Tensor  # (N, C)
Labels = np.ndarray | Tensor | Sequence[int]  # (N,), from 0


def probe(
    train_features: Features,
    train_labels: Labels,
    test_features: Features,
    test_labels: Labels,
    num_classes: int,
    shots: Sequence[int] = (1, 5, 10, 25),
    seeds: Sequence[int] = (0, 1, 2),
    l2: float = 2**10,
) -> dict[tuple[int, int], float]:
    """Top-1 accuracy on all test features, for each (seed, shot).

    Args:
        train_features, train_labels: (N, C) and (N,), of which each probe sees ``shot`` images of each class.
        test_features, test_labels: (M, C) and (M,).
        num_classes: labels are from 0 to num_classes − 1.
        shots: numbers of training images per class; a class with fewer gives all that it has.
        seeds: each chooses other training images. Those of fewer shots are among those of more.
        l2: added to the diagonal of the Gram matrix, which is a sum over images.

    Features are used as float32, on the device of ``train_features``.

    Raises:
        UserError: shapes that do not match, features that are not finite, labels out of range, no image, or a number
            of shots or classes that is not at least 1.
    """
    num_classes = whole_number("num_classes", num_classes, 1)
    shots, seeds = whole_numbers("shots", shots, 1), whole_numbers("seeds", seeds, 0)
    if not (isinstance(l2, Real) and 0 < l2 < float("inf")):
        raise UserError(f"l2 = {brief(l2)}: must be a positive number (2**10 in the paper)")
    x, y = checked("train", train_features, train_labels, num_classes)
    test_x, test_y = checked("test", test_features, test_labels, num_classes)
    if x.shape[1] != test_x.shape[1]:
        raise UserError(f"train_features have {x.shape[1]} channels, test_features {test_x.shape[1]}: use one model")
    test_x, truth = test_x.to(x.device), torch.as_tensor(test_y, device=x.device)
    found = {}
    for seed in seeds:
        order = shuffled_by_class(y, num_classes, seed)
        for shot in shots:
            chosen = np.concatenate([positions[:shot] for positions in order])
            index = torch.as_tensor(chosen, device=x.device)
            predicted = predict(x[index], y[chosen], test_x, num_classes, l2)
            found[seed, shot] = float((predicted == truth).double().mean())
    return found


def shuffled_by_class(labels: np.ndarray, num_classes: int, seed: int) -> list[np.ndarray]:
    """The positions of each class's images in random order, drawn class by class from one generator."""
    rng = np.random.default_rng(seed)
    return [rng.permutation(np.flatnonzero(labels == label)) for label in range(num_classes)]


def predict(x: Tensor, y: np.ndarray, test_x: Tensor, num_classes: int, l2: float) -> Tensor:
    """Fits the probe to x (N, C) and y (N,); returns the classes of test_x (M, C)."""
    mean, std = x.mean(0), x.std(0, correction=0) + EPSILON
    targets = torch.full((len(y), num_classes), -1.0, device=x.device)
    targets[torch.arange(len(y)), torch.as_tensor(y, device=x.device)] = 1.0
    weights = ridge(with_bias((x - mean) / std), targets, l2)
    return (with_bias((test_x - mean) / std) @ weights).argmax(1)


def with_bias(x: Tensor) -> Tensor:
    """(N, C) → (N, C + 1)"""
    return torch.cat([x, torch.full_like(x[:, :1], BIAS)], dim=1)


def ridge(x: Tensor, targets: Tensor, l2: float) -> Tensor:
    """W (C, K) of least ‖x W − targets‖² + l2 ‖W‖², solved in the smaller of feature and sample space."""
    by_features = x.shape[1] <= x.shape[0]
    gram = x.mT @ x if by_features else x @ x.mT
    factor = torch.linalg.cholesky(gram + l2 * torch.eye(len(gram), device=x.device))
    if by_features:
        return torch.cholesky_solve(x.mT @ targets, factor)
    return x.mT @ torch.cholesky_solve(targets, factor)


def whole_numbers(name: str, values: Sequence[int], least: int) -> list[int]:
    """The values as a list; raises a UserError unless they are whole numbers, at least one of them."""
    listed = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else []
    if not listed:
        raise UserError(f"{name} = {brief(values)}: give a list of whole numbers")
    return [whole_number(name, value, least) for value in listed]


def checked(part: str, features: Features, labels: Labels, num_classes: int) -> tuple[Tensor, np.ndarray]:
    """(N, C) float32 and (N,) int64; raises a UserError that names what is wrong with them."""
    try:
        x = torch.as_tensor(features).detach().float()
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{part}_features {brief(features)}: give a tensor or an array (N, C)") from None
    y = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise UserError(
            f"{part}_features of shape {tuple(x.shape)} and {part}_labels of shape {y.shape}: use (N, C) and (N,)"
        )
    if not len(y):
        raise UserError(f"{part}_features hold no image: give at least one")
    if not np.issubdtype(y.dtype, np.integer):
        raise UserError(f"{part}_labels of type {y.dtype}: give whole numbers from 0 to {num_classes - 1}")
    if y.min() < 0 or y.max() >= num_classes:
        raise UserError(f"{part}_labels from {y.min()} to {y.max()}: must be from 0 to {num_classes - 1}")
    if not bool(x.isfinite().all()):
        row = int((~x.isfinite()).any(1).nonzero()[0])
        raise UserError(f"{part}_features of image {row} are not finite: leave it out, or check the model")
    return x, y.astype(np.int64)
