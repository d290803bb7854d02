"""Few-shot accuracy (Section 3): linear probes on frozen features, each fitted to some images of every class."""

from collections.abc import Iterable, Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from allmlp.errors import UserError, brief
from allmlp.evaluation.ridge import fit
from allmlp.sizes import whole_number

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

    Features are used as float32, on the device of ``train_features``; the probe is solved in float64.

    Raises:
        UserError: shapes that do not match, features that are not finite, labels out of range, no image, or a number
            of shots or classes that is not at least 1.
    """
    num_classes = whole_number("num_classes", num_classes, 1)
    shots, seeds = check_numbers(shots, seeds, l2)
    x, y = checked("train", train_features, train_labels, num_classes)
    test_x, test_y = checked("test", test_features, test_labels, num_classes)
    if x.shape[1] != test_x.shape[1]:
        raise UserError(f"train_features have {x.shape[1]} channels, test_features {test_x.shape[1]}: use one model")
    test_x, truth = test_x.to(x.device), torch.as_tensor(test_y, device=x.device)
    found = {}
    for key, chosen in choose(y, num_classes, shots, seeds).items():
        predicted = fit(x[torch.as_tensor(chosen, device=x.device)], y[chosen], num_classes, l2).predict(test_x)
        found[key] = float((predicted == truth).double().mean())
    return found


def shuffled_by_class(labels: np.ndarray, num_classes: int, seed: int) -> list[np.ndarray]:
    """The positions of each class's images in random order, drawn class by class from one generator."""
    rng = np.random.default_rng(seed)
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels, minlength=num_classes))[:-1])
    return [rng.permutation(positions) for positions in by_class]


def choose(
    labels: np.ndarray, num_classes: int, shots: Sequence[int], seeds: Sequence[int]
) -> dict[tuple[int, int], np.ndarray]:
    """For each (seed, shot), the positions of the images that its probe is fitted to.

    A class with fewer images than shots gives all that it has.
    """
    found = {}
    for seed in seeds:
        order = shuffled_by_class(labels, num_classes, seed)
        for shot in shots:
            found[seed, shot] = np.concatenate([positions[:shot] for positions in order])
    return found


def check_numbers(shots: Sequence[int], seeds: Sequence[int], l2: float) -> tuple[list[int], list[int]]:
    """The shots and seeds as lists; raises a UserError that names what is wrong with them."""
    if isinstance(l2, bool) or not (isinstance(l2, Real) and 0 < l2 < float("inf")):
        raise UserError(f"l2 = {brief(l2)}: must be a positive number (2**10 in the paper)")
    return whole_numbers("shots", shots, 1), whole_numbers("seeds", seeds, 0)


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
