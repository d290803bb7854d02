"""The losses by their definitions, in NumPy."""

from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from allmlp.config.recipe import LossName
from allmlp.training.losses import LOSSES


def example(classes: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(12, classes, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.arange(12) % classes


def target_of(labels: Tensor, classes: int, smoothing: float) -> np.ndarray:
    return (1 - smoothing) * np.eye(classes)[labels.numpy()] + smoothing / classes


def defined(loss: LossName, z: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Cross-entropy of the target with the softmax, or of each class's target with its sigmoid, summed."""
    if loss == "softmax":
        return -(target * (z - np.log(np.exp(z).sum(axis=1, keepdims=True)))).sum(axis=1)
    p = 1 / (1 + np.exp(-z))
    return -(target * np.log(p) + (1 - target) * np.log(1 - p)).sum(axis=1)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("classes", [2, 5])
def test_each_is_its_definition(loss: LossName, smoothing: float, classes: int) -> None:
    logits, labels = example(classes)
    found = LOSSES[loss](logits, labels, smoothing)
    expected = defined(loss, logits.numpy(), target_of(labels, classes, smoothing))
    assert found.shape == (12,)
    assert np.abs(found.numpy() - expected).max() < 1e-12


def test_each_that_a_recipe_may_name_is_there() -> None:
    assert set(LOSSES) == set(get_args(LossName))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_gradient_is_the_probability_less_the_target(loss: LossName, smoothing: float) -> None:
    logits, labels = example()
    logits.requires_grad_(True)
    LOSSES[loss](logits, labels, smoothing).sum().backward()
    assert logits.grad is not None
    p = logits.detach().softmax(1) if loss == "softmax" else logits.detach().sigmoid()
    assert (logits.grad - (p - torch.from_numpy(target_of(labels, 5, smoothing)))).abs().max() < 1e-12


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_mixed_label_has_the_mixed_losses(loss: LossName, smoothing: float) -> None:
    logits, labels = example()
    of = partial(LOSSES[loss], smoothing=smoothing)
    mixed = 0.3 * of(logits, labels) + 0.7 * of(logits, labels.roll(1))
    target = 0.3 * target_of(labels, 5, smoothing) + 0.7 * target_of(labels.roll(1), 5, smoothing)
    assert np.abs(mixed.numpy() - defined(loss, logits.numpy(), target)).max() < 1e-12


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_have_finite_losses_and_gradients(loss: LossName, smoothing: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4, 0], [-1e4, 1e4, 0], [1e4, 1e4, -1e4]], dtype=dtype, requires_grad=True)
    found = LOSSES[loss](logits, torch.tensor([0, 0, 2]), smoothing)
    found.sum().backward()
    assert found.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert found.dtype == dtype
    expected = {"softmax": (0, 2e4, 2e4 + np.log(2)), "sigmoid": (np.log(2), 2e4 + np.log(2), 3e4)}
    if smoothing == 0 and loss in expected:
        right, wrong, both = expected[loss]
        assert found.tolist() == pytest.approx([right, wrong, both], rel=1e-6, abs=1e-3)


def test_sigmoid_at_the_authors_head_bias_is_small_from_the_start() -> None:
    logits = torch.full((1, 21843), -10.0, dtype=torch.float64)
    (loss,) = LOSSES["sigmoid"](logits, torch.tensor([3])).tolist()
    assert loss == pytest.approx(10 + 21843 * np.log1p(np.exp(-10)), rel=1e-12)
