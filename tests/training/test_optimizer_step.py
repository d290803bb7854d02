"""What becomes of gradients: clipped, applied, measured; and a step gone wrong changes nothing."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from small_runs import train_steps
from torch import Tensor, nn

from allmlp.data.loader import Batch
from allmlp.metadata import Preprocessing
from allmlp.model import Mixer
from allmlp.training.losses import softmax
from allmlp.training.optimizer import adamw, sgd
from allmlp.training.optimizer_step import OptimizerStep

MAKERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": partial(adamw, weight_decay=0.1, beta1=0.9, beta2=0.99),
    "sgd": partial(sgd, momentum=0.9),
    "plain": partial(sgd, momentum=0.0),
}
BOTH = ["adamw", "sgd"]


def toy(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model.to(dtype)


def make(
    model: nn.Module, kind: str = "plain", rate: float = 0.1, clip_norm: float | None = None, float16: bool = False
) -> OptimizerStep:
    optimizer = MAKERS[kind](model)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return OptimizerStep(optimizer, clip_norm, float16)


def loss_of(model: nn.Module, step: int) -> Tensor:
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
    return model(inputs.to(next(model.parameters()).dtype)).square().mean()


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


BAD = ["nan loss and gradient", "nan gradient", "inf gradient", "nan loss", "inf loss"]


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("bad", BAD)
def test_the_first_step_gone_wrong_and_all_after_it_change_nothing(
    kind: str, fused: bool, clip_norm: float | None, k: int, bad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("allmlp.training.optimizer.fusible", lambda device: fused)  # where nothing is fused
    model = toy()
    update = make(model, kind, clip_norm=clip_norm)
    states, failures = [weights(model)], []
    for step in range(1, k + 4):
        norm, change = take(update, model, step, bad if step == k else "", measure=True)
        states.append(weights(model))
        if step < k:
            assert update.failure.tolist() == [0, 0, 0]
            assert not torch.equal(states[-1], states[-2])
        else:
            assert torch.equal(states[step], states[k - 1]), step
            assert float(change) == 0
        if step == k:
            found, loss, seen = update.failure.tolist()
            assert found == k
            assert (math.isfinite(loss), math.isfinite(seen)) == ("loss" not in bad, "gradient" not in bad)
            assert math.isfinite(seen) == math.isfinite(float(norm))
            failures.append(str(update.failure))  # text, as a NaN equals nothing
    assert [str(update.failure)] == failures  # the first is kept


def test_in_float16_a_gradient_that_overflows_at_any_scale_ends_the_run() -> None:
    """Or the run goes on to its end, and has learnt nothing."""
    model = toy()
    update = make(model, float16=True)
    before = weights(model)
    for step in range(1, 201):  # the scale has 2^16 to lose
        take(update, model, step, "inf gradient")
    assert torch.equal(weights(model), before)
    assert 1 <= update.failure[0] <= 60


def test_the_failure_holds_step_loss_and_norm() -> None:
    model = toy()
    update = make(model)
    take(update, model, 1)
    loss = float(loss_of(model, 2).detach())
    take(update, model, 2, "inf gradient")
    assert update.failure.tolist() == pytest.approx([2, loss, math.inf])


@pytest.mark.parametrize("limit", [10.0, 0.5, 1e-3, 1e-6])
def test_the_gradient_is_scaled_to_the_limit_by_the_norm_exactly(limit: float) -> None:
    free, clipped = toy(torch.float64), toy(torch.float64)
    start = weights(free)
    norm, _ = take(make(free, rate=1.0), free, 1)
    again, change = take(make(clipped, rate=1.0, clip_norm=limit), clipped, 1, measure=True)
    gradient = start - weights(free)
    assert float(norm) == float(again) == pytest.approx(float(gradient.norm()), rel=1e-14)  # as it was before
    assert limit < float(norm) or limit == 10
    expected = gradient * min(limit / float(norm), 1)
    assert float((start - weights(clipped) - expected).abs().max()) < 1e-15
    assert float(change) == pytest.approx(min(limit, float(norm)), rel=1e-9)


@pytest.mark.parametrize("kind", [*BOTH, "plain"])
@pytest.mark.parametrize("float16", [False, True])
def test_the_update_norm_is_that_of_the_weights_change(kind: str, float16: bool) -> None:
    model = toy()
    update = make(model, kind, clip_norm=1.0, float16=float16)
    for step in range(1, 5):
        before = weights(model)
        _, change = take(update, model, step, measure=True)
        assert float(change) == pytest.approx(float((weights(model) - before).norm()), rel=1e-5)
        assert float(change) > 0
    assert take(update, model, 5)[1].isnan()


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("float16", [False, True])
def test_a_gradient_of_zero_is_no_failure(kind: str, clip_norm: float | None, float16: bool) -> None:
    model = toy()
    update = make(model, kind, clip_norm=clip_norm, float16=float16)
    for step in (1, 2):
        before = [p.detach().clone() for p in model.parameters()]
        loss = 0 * loss_of(model, step)
        update.backward(loss)
        norm, _ = update(step, loss.detach())
        assert float(norm) == 0
        for parameter, was in zip(model.parameters(), before, strict=True):
            decay = 1 - 0.1 * 0.1 if kind == "adamw" and was.ndim > 1 else 1
            assert torch.allclose(parameter, was * decay, rtol=1e-6, atol=0)
    assert float(update.failure[0]) == 0


def test_what_the_gradients_still_have_to_be_multiplied_by_comes_before_the_norm_and_the_clip() -> None:
    plain, scaled = toy(torch.float64), toy(torch.float64)
    norm, _ = take(make(plain, clip_norm=0.5), plain, 1)
    update = make(scaled, clip_norm=0.5)
    loss = loss_of(scaled, 1)
    update.backward(loss / 7)
    again, _ = update(1, loss.detach(), factor=7.0)
    assert float(again) == pytest.approx(float(norm), rel=1e-13)
    assert torch.allclose(weights(scaled), weights(plain), rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("float16", [False, True])
def test_frozen_parameters_are_untouched(kind: str, float16: bool) -> None:
    model = toy()
    frozen = model.get_submodule("0").requires_grad_(False)
    before, whole = weights(frozen), weights(model)
    update = make(model, kind, clip_norm=1.0, float16=float16)
    for step in (1, 2, 3):
        loss = loss_of(model, step)
        update.backward(loss)
        update(step, loss.detach(), measure=True)
    assert torch.equal(weights(frozen), before)
    assert not torch.equal(weights(model), whole)
    assert all(p.grad is None for p in model.parameters())


# float16


def after(kind: str, float16: bool, order: tuple[int, ...], overflow: int = 0) -> tuple[Tensor, OptimizerStep]:
    """The weights after the steps of those numbers, one of which overflows and has to leave them alone."""
    model = toy()
    update = make(model, kind, clip_norm=1.0, float16=float16)
    for step in order:
        before = weights(model)
        _, change = take(update, model, step, "overflow" if step == overflow else "", measure=True)
        assert torch.equal(before, weights(model)) == (float(change) == 0) == (step == overflow)
    return weights(model), update


@pytest.mark.parametrize("kind", BOTH)
def test_scaled_gradients_make_the_same_steps(kind: str) -> None:
    order = (1, 2, 3, 4, 5)
    assert torch.equal(after(kind, True, order)[0], after(kind, False, order)[0])  # scaled by a power of two


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("order", [(1, 2, 3, 4, 5), (2, 3, 1, 4, 5)], ids=["first", "third"])
def test_a_step_whose_scaled_gradient_overflows_is_left_out(
    kind: str, order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "empty_like", lambda t, **options: torch.full_like(t, math.nan, **options))  # at worst
    found, update = after(kind, True, order, overflow=1)
    assert torch.equal(found, after(kind, True, (2, 3, 4, 5))[0])
    assert update.failure.tolist() == [0, 0, 0]
    assert update.scaler.get_scale() == 2**15  # half of what it starts at


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("bad", ["nan loss and gradient", "nan loss", "inf loss"])
def test_in_float16_a_loss_that_is_not_finite_ends_the_run(kind: str, k: int, bad: str) -> None:
    model = toy()
    update = make(model, kind, clip_norm=1.0, float16=True)
    states = [weights(model)]
    for step in range(1, k + 4):
        take(update, model, step, bad if step == k else "")
        states.append(weights(model))
    assert all(torch.equal(state, states[k - 1]) for state in states[k:])
    assert not any(torch.equal(a, b) for a, b in pairwise(states[:k]))
    assert update.failure[0] == k
    assert not update.failure[1].isfinite()


@pytest.mark.parametrize("kind", BOTH)
def test_a_mixer_learns_in_float16(kind: str) -> None:
    sizes = {"num_classes": 3, "image_size": 4, "patch_size": 2, "num_blocks": 2, "hidden_dim": 8}
    model = Mixer(**sizes, tokens_mlp_dim=6, channels_mlp_dim=16, seed=0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 4, 4), generator=generator, dtype=torch.uint8)
    batch = Batch(images, torch.arange(12) % 3, torch.ones(12, dtype=torch.bool), torch.arange(12), [])
    kinds = set()

    def forward(images: Tensor, keys: Tensor) -> Tensor:
        logits = model(images, keys)
        kinds.add(logits.dtype)
        return logits

    update = OptimizerStep(MAKERS[kind](model), clip_norm=1.0, float16=True)
    steps = list(
        train_steps(
            model,
            forward,
            [batch] * 80,
            update,
            lambda step: 0.02 if kind == "adamw" else 0.2,
            softmax,
            precision=torch.float16,
            preprocessing=Preprocessing(),
            seed=0,
        )
    )
    assert kinds == {torch.float16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert float(steps[-1].loss) < 0.1 < 1 < float(steps[0].loss)
    assert float(update.failure[0]) == 0
