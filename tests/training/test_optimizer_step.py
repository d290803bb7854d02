"""From gradients to weights: clipped, applied and measured; a step gone wrong changes nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import MAKE_OPTIMIZER, tiny, tiny_images
from torch import Tensor, nn

from allmlp.training.optimizer_step import OptimizerStep

BOTH = pytest.mark.parametrize("kind", ["adamw", "sgd"])
FLOAT16 = pytest.mark.parametrize("float16", [False, True])
BAD = ["nan loss and gradient", "nan gradient", "inf gradient", "nan loss", "inf loss"]
FATAL = [*((bad, False) for bad in BAD), *((bad, True) for bad in BAD if "loss" in bad)]  # and whether in float16


def make(
    model: nn.Module, kind: str = "plain", rate: float = 0.1, clip_norm: float | None = None, float16: bool = False
) -> OptimizerStep:
    update = OptimizerStep(MAKE_OPTIMIZER[kind](model), clip_norm, float16)
    update.set_learning_rate(rate)
    return update


def loss_of(model: nn.Module, step: int) -> Tensor:
    return model(tiny_images(step)).square().mean()


def take(
    update: OptimizerStep, model: nn.Module, step: int, bad: str = "", measure: bool = False
) -> tuple[Tensor, Tensor]:
    """One step, gone wrong as ``bad`` says."""
    loss = loss_of(model, step)
    told = loss.detach()
    if bad == "nan loss and gradient":
        loss, told = loss * math.nan, told * math.nan
    elif bad == "overflow":  # of the scaled gradient, not of the loss
        loss = loss * 1e36
    update.backward(loss)
    first = next(model.parameters())
    assert first.grad is not None
    if bad == "nan gradient":
        first.grad[0, 0] = math.nan
    elif bad == "inf gradient":
        first.grad[0, 0] = -math.inf
    elif bad in ("nan loss", "inf loss"):
        told = torch.full_like(told, float(bad.split()[0]))
    return update(step, told, measure=measure)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


@given(
    st.sampled_from(["adamw", "sgd"]), st.booleans(), st.sampled_from([None, 1.0]), st.integers(1, 3),
    st.sampled_from(FATAL),
)  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_first_step_gone_wrong_and_all_after_it_change_nothing(
    kind: str, fused: bool, clip_norm: float | None, k: int, fatal: tuple[str, bool]
) -> None:
    bad, float16 = fatal
    model = tiny()
    with pytest.MonkeyPatch.context() as patch:  # on Apple's GPUs, no optimizer is fused
        patch.setattr("allmlp.training.optimizer.fusible", lambda device: fused)
        update = make(model, kind, clip_norm=clip_norm, float16=float16)
    for step in range(1, k):
        before = weights(model)
        take(update, model, step)
        assert not torch.equal(weights(model), before)
        assert update.failure.tolist() == [0, 0, 0]
    last_good, failures = weights(model), set()
    for step in range(k, k + 3):
        norm, change = take(update, model, step, bad if step == k else "", measure=True)
        assert torch.equal(weights(model), last_good)
        assert float(change) == 0
        failures.add(str(update.failure))  # text, as a NaN equals nothing
        if step == k:
            assert update.failure[0] == k
            assert torch.equal(update.failure[1:].isfinite(), torch.tensor(["loss" not in bad, norm.isfinite()]))
            assert float(norm.isfinite()) == ("gradient" not in bad and not float16)
    assert len(failures) == 1


def test_in_float16_a_gradient_that_overflows_at_any_scale_ends_the_run() -> None:
    model = tiny()
    update = make(model, float16=True)
    before = weights(model)
    for step in range(1, 101):  # the scale has 2^16 to lose
        take(update, model, step, "inf gradient")
    assert torch.equal(weights(model), before)
    assert 1 <= update.failure[0] <= 60


@pytest.mark.parametrize("kind", MAKE_OPTIMIZER)
@FLOAT16
def test_the_update_norm_is_that_of_the_weights_change(kind: str, float16: bool) -> None:
    model = tiny()
    update = make(model, kind, clip_norm=1.0, float16=float16)
    for step in range(1, 5):
        before = weights(model)
        _, change = take(update, model, step, measure=True)
        assert float(change) == pytest.approx(float((weights(model) - before).norm()), rel=1e-5)
        assert float(change) > 0
        assert all(p.grad is None for p in model.parameters())
    assert take(update, model, 5)[1].isnan()


@BOTH
@FLOAT16
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_gradient_of_zero_is_no_failure(kind: str, float16: bool, clip_norm: float | None) -> None:
    model = tiny()
    update = make(model, kind, clip_norm=clip_norm, float16=float16)
    before = [p.detach().clone() for p in model.parameters()]
    loss = 0 * loss_of(model, 1)
    update.backward(loss)
    norm, _ = update(1, loss.detach())
    assert float(norm) == float(update.failure[0]) == 0
    for parameter, was in zip(model.parameters(), before, strict=True):
        decay = 1 - 0.1 * 0.1 if kind == "adamw" and was.ndim > 1 else 1
        assert torch.allclose(parameter, was * decay, rtol=1e-6, atol=0)


# float16


def after(kind: str, float16: bool, order: tuple[int, ...], overflow: int = 0) -> tuple[Tensor, OptimizerStep]:
    """The weights after the steps of those numbers, one of which overflows and has to leave them alone."""
    model = tiny()
    update = make(model, kind, clip_norm=1.0, float16=float16)
    for step in order:
        before = weights(model)
        _, change = take(update, model, step, "overflow" if step == overflow else "", measure=True)
        assert torch.equal(before, weights(model)) == (float(change) == 0) == (step == overflow)
    return weights(model), update


@BOTH
def test_scaled_gradients_make_the_same_steps(kind: str) -> None:
    order = (1, 2, 3, 4, 5)
    assert torch.equal(after(kind, True, order)[0], after(kind, False, order)[0])  # scaled by a power of two


@BOTH
@pytest.mark.parametrize("order", [(1, 2, 3, 4, 5), (2, 3, 1, 4, 5)], ids=["first", "third"])
def test_a_step_whose_scaled_gradient_overflows_is_left_out(
    kind: str, order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "empty_like", lambda t, **options: torch.full_like(t, math.nan, **options))  # at worst
    found, update = after(kind, True, order, overflow=1)
    assert torch.equal(found, after(kind, True, (2, 3, 4, 5))[0])
    assert update.failure.tolist() == [0, 0, 0]
    assert update.scaler.get_scale() == 2**15  # half of what it starts at
