"""The losses and their gradients by definition, in NumPy."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allmlp.config.recipe import LossName
from allmlp.training.losses import LOSSES

LOSS_NAMES = get_args(LossName)


@given(st.sampled_from(LOSS_NAMES), st.integers(2, 6), st.floats(0, 0.9), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_each_loss_and_its_gradient_are_those_of_the_smoothed_and_mixed_target(
    loss: LossName, classes: int, smoothing: float, lam: float, seed: int
) -> None:
    """Softmax: cross-entropy with the target. Sigmoid: that of each class with its own target, summed."""
    rng = np.random.default_rng(seed)
    z, labels = 3 * rng.normal(size=(12, classes)), rng.integers(0, classes, 12)
    logits, first = torch.from_numpy(z).requires_grad_(), torch.from_numpy(labels)
    found = lam * LOSSES[loss](logits, first, smoothing) + (1 - lam) * LOSSES[loss](logits, first.roll(1), smoothing)
    mixed = lam * np.eye(classes)[labels] + (1 - lam) * np.eye(classes)[np.roll(labels, 1)]
    target = (1 - smoothing) * mixed + smoothing / classes
    if loss == "softmax":
        p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
        expected = -(target * np.log(p)).sum(axis=1)
    else:
        p = 1 / (1 + np.exp(-z))
        expected = -(target * np.log(p) + (1 - target) * np.log(1 - p)).sum(axis=1)
    assert np.abs(found.detach().numpy() - expected).max() < 1e-12
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert np.abs(gradient.numpy() - (p - target)).max() < 1e-12


LN2 = np.log(2)
EXTREME = {"softmax": [0, 2e4, 2e4 + LN2], "sigmoid": [LN2, 2e4 + LN2, 3e4]}


@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_have_finite_losses_and_gradients(loss: LossName, dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4, 0], [-1e4, 1e4, 0], [1e4, 1e4, -1e4]], dtype=dtype, requires_grad=True)
    for smoothing in (0.1, 0.0):
        found = LOSSES[loss](logits, torch.tensor([0, 0, 2]), smoothing)
        assert found.dtype == dtype
        assert found.isfinite().all()
        assert torch.autograd.grad(found.sum(), logits)[0].isfinite().all()
    assert found.tolist() == pytest.approx(EXTREME[loss], rel=1e-6, abs=1e-3)


def test_every_loss_of_the_recipe_is_there() -> None:
    assert set(LOSSES) == set(LOSS_NAMES)
