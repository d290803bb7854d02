"""A step is a function of seed and samples, not of the micro-batches or of unreadable images."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from reference import weights_of
from small_runs import same, train_steps
from tiny_models import MAKE_OPTIMIZER, batch_of, recorded, tiny
from torch import Tensor

from allmlp.config.recipe import LossName
from allmlp.data.loader import Batch
from allmlp.data.mixup import Mixing
from allmlp.model import Mixer
from allmlp.rng import sample_keys
from allmlp.training.losses import LOSSES
from allmlp.training.optimizer_step import OptimizerStep
from allmlp.training.step import Forward, StepResult


def cut(batch: Batch, parts: int) -> list[Batch]:
    pieces = zip(*(tensor.chunk(parts) for tensor in batch[:4]), strict=True)
    return [Batch(*piece, []) for piece in pieces]


def train(
    model: Mixer,
    batches: Iterable[Batch],
    rate: float = 0.01,
    *,
    optimizer: str = "adamw",
    forward: Forward | None = None,
    loss: LossName = "softmax",
    smoothing: float = 0.0,
    **options,
) -> list[StepResult]:
    update = OptimizerStep(MAKE_OPTIMIZER[optimizer](model), 1.0 if optimizer == "adamw" else None)
    loss_function = partial(LOSSES[loss], smoothing=smoothing)
    return list(train_steps(model, forward or model, batches, update, lambda step: rate, loss_function, **options))


# Randomness


@pytest.mark.parametrize(
    ("options", "mixing"),
    [
        ({"dropout": 0.4}, None),
        ({"stochastic_depth": 0.6}, None),
        ({}, Mixing(mixup=0.5, group=8)),
        ({}, Mixing(mixup=None, cutmix=1.0, group=8)),
    ],
    ids=["dropout", "stochastic depth", "mixup", "cutmix"],
)
def test_what_is_random_is_a_function_of_seed_and_step_alone(options: dict, mixing: Mixing | None) -> None:
    """Without learning, the logits of the steps differ by it alone."""

    def logits(seed: int, disturb: int) -> list[Tensor]:
        model, seen = tiny(**options), []
        torch.manual_seed(disturb)  # whatever used torch's generator plays no part
        train(model, [batch_of(32)] * 3, rate=0.0, seed=seed, mixing=mixing, forward=recorded(model, seen))
        return seen[2::3]

    first = logits(3, disturb=1)
    assert len({each.numpy().tobytes() for each in first}) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, logits(3, disturb=2), strict=True))
    assert not any(torch.equal(a, b) for a in first for other in (0, 2**31 - 1) for b in logits(other, disturb=1))


@pytest.mark.parametrize("parts", [1, 4])
def test_each_sample_of_the_run_has_a_separate_key(parts: int) -> None:
    model, seen = tiny(), []
    batches = [piece for s in range(3) for piece in cut(batch_of(8, s), parts)]
    train(model, batches, forward=recorded(model, seen), accumulate=parts, seed=5)
    assert torch.equal(torch.cat(seen[1::3]), sample_keys(5, torch.arange(24)))
    assert len(torch.cat(seen[1::3]).unique()) == 24


# Micro-batches


MIXUP, CUTMIX = Mixing(mixup=0.5, group=2), Mixing(mixup=None, cutmix=1.0, group=2)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, ...]]] = {  # of the model, of the step, unreadable
    "smoothing and mixup": ({}, {"smoothing": 0.1, "mixing": MIXUP}, ()),
    "sigmoid and cutmix": ({}, {"loss": "sigmoid", "mixing": CUTMIX}, ()),
    "dropout": ({"dropout": 0.3}, {}, ()),
    "rescaled stochastic depth": ({"stochastic_depth": 0.6, "rescale": True}, {}, ()),
    "unreadable": ({}, {}, (1, 2, 3, 9)),  # a whole micro-batch of two, and single ones
    "all": (
        {"dropout": 0.2, "stochastic_depth": 0.5},
        {"loss": "sigmoid", "smoothing": 0.1, "mixing": Mixing(mixup=0.5, cutmix=1, group=2)},
        (2, 9),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_change_nothing(name: str) -> None:
    """In float64, by steps of sixteen images in so many parts. Adam's would not show a gradient twice too large."""

    of_model, of_step, invalid = CASES[name]

    def after(parts: int) -> tuple[dict[str, Tensor], list[float]]:
        model = tiny(**of_model).double()
        batches = [piece for s in range(4) for piece in cut(batch_of(16, s, invalid if s % 2 else ()), parts)]
        steps = train(model, batches, optimizer="sgd", accumulate=parts, seed=7, **of_step)
        return weights_of(model), [float(n) for step in steps for n in (step.loss, step.gradient_norm)]

    whole, expected = after(1)
    start = weights_of(tiny().double())
    assert max(float((whole[key] - start[key]).abs().max()) for key in whole) > 1e-3
    for parts in (2, 8):
        weights, numbers = after(parts)
        assert numbers == pytest.approx(expected, rel=1e-10)
        for key, value in whole.items():
            assert torch.allclose(weights[key], value, rtol=1e-10, atol=1e-10), (parts, key)


def test_problems_of_all_micro_batches_come_with_their_step() -> None:
    batches = [batch_of(2, s, invalid=broken) for s, broken in enumerate([(), (1,), (0, 1), ()])]
    assert [step.problems for step in train(tiny(), batches, accumulate=2)] == [
        [(1, "broken")],
        [(0, "broken"), (1, "broken")],
    ]


# Unreadable images


@pytest.mark.parametrize("mixing", [None, Mixing(mixup=1.0, cutmix=1.0, group=2)], ids=["alone", "mixed"])
def test_an_unreadable_image_has_no_influence(mixing: Mixing | None) -> None:
    """Neither its pixels nor its label, nor on the images that it would be mixed with."""
    whole = batch_of(6, invalid=(1, 4))
    other = whole._replace(
        images=torch.where(whole.valid.view(-1, 1, 1, 1), whole.images, 255 - whole.images),
        labels=torch.where(whole.valid, whole.labels, 2 - whole.labels),
    )
    for seed in range(4):
        one, two = tiny(), tiny()
        (step,), (step_of_other,) = (
            train(model, [batch], optimizer="plain", mixing=mixing, seed=seed, smoothing=0.1)
            for model, batch in ((one, whole), (two, other))
        )
        assert torch.equal(step.loss, step_of_other.loss)
        assert same(weights_of(one), weights_of(two))
        assert not same(weights_of(one), weights_of(tiny()))


def test_a_step_of_unreadable_images_alone_moves_nothing() -> None:
    model = tiny()
    batches = [batch_of(2, s, invalid=(0, 1)) for s in range(4)]
    for step in train(model, batches, optimizer="sgd", accumulate=2, mixing=Mixing(mixup=0.5)):
        assert (float(step.loss), float(step.gradient_norm)) == (0, 0)
    assert same(weights_of(model), weights_of(tiny()))


# Precision and signals


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_the_precision_is_that_of_matrix_products_weights_and_loss_stay_float32(precision: torch.dtype) -> None:
    model, seen = tiny(), []
    (step,) = train(model, [batch_of(4)], precision=precision, forward=recorded(model, seen))
    assert [tensor.dtype for tensor in seen] == [torch.float32, torch.int64, precision]
    assert step.loss.dtype == torch.float32
    assert not step.loss.requires_grad
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_request_during_the_step_is_noticed_in_it() -> None:
    """A signal that arrives in the forward or backward pass stops the run after this step, not after the next."""
    model, seen = tiny(), []
    batches = [batch_of(4, seed) for seed in range(4)]
    steps = train(model, batches, forward=recorded(model, seen), accumulate=2, requests=lambda: [len(seen) // 3])
    assert [step.requests for step in steps] == [[2], [4]]
