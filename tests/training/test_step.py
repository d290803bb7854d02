"""The training loop: what a step does, and that it is a function of seed and sample, not of the micro-batches."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from small_runs import train_steps
from torch import Tensor

from allmlp.config.recipe import LossName
from allmlp.data.loader import Batch
from allmlp.data.mixup import Mixing
from allmlp.data.transforms import normalize
from allmlp.metadata import Preprocessing
from allmlp.model import Mixer
from allmlp.rng import sample_keys
from allmlp.training.losses import LOSSES, softmax
from allmlp.training.optimizer import adamw, sgd
from allmlp.training.optimizer_step import OptimizerStep
from allmlp.training.step import StepResult

Forward = Callable[[Tensor, Tensor], Tensor]


def tiny(**options) -> Mixer:
    sizes = {"num_classes": 3, "image_size": 4, "patch_size": 2, "num_blocks": 2, "hidden_dim": 8}
    return Mixer(**sizes | {"tokens_mlp_dim": 6, "channels_mlp_dim": 16, "seed": 0} | options)


def random_head(model: Mixer) -> Mixer:
    """A fresh head is zero: no gradient would reach the rest of the model."""
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(5))
    return model


def batch_of(n: int, seed: int = 0, invalid: tuple[int, ...] = ()) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 4, 4), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (n,), generator=generator)
    valid = torch.tensor([i not in invalid for i in range(n)])
    return Batch(images, labels, valid, torch.arange(n), [(i, "broken") for i in invalid])


def train(
    model: Mixer,
    batches: Iterable[Batch],
    rate: Callable[[int], float] = lambda step: 0.01,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    forward: Forward | None = None,
    seed: int = 0,
    clip_norm: float | None = 1.0,
    loss: LossName = "softmax",
    label_smoothing: float = 0.0,
    precision: torch.dtype = torch.float32,
    mixing: Mixing | None = None,
    accumulate: int = 1,
    measure: Callable[[int], bool] = lambda step: False,
) -> list[StepResult]:
    return list(
        train_steps(
            model,
            forward or model,
            batches,
            OptimizerStep(optimizer or adamw(model, weight_decay=0.1, beta1=0.9, beta2=0.999), clip_norm),
            rate,
            partial(LOSSES[loss], smoothing=label_smoothing),
            precision=precision,
            preprocessing=Preprocessing(),
            seed=seed,
            mixing=mixing,
            accumulate=accumulate,
            measure=measure,
        )
    )


def weights(model: Mixer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: Mixer, b: Mixer) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def gradient(batch: Batch, **options) -> tuple[dict[str, Tensor], StepResult]:
    """By one step of plain gradient descent at rate 1, so that the weights move by it."""
    model = random_head(tiny())
    before = weights(model)
    (step,) = train(model, [batch], lambda step: 1.0, optimizer=sgd(model, momentum=0.0), **options)
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}, step


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_a_step_descends_along_the_gradient_of_the_mean_cross_entropy(label_smoothing: float) -> None:
    batch = batch_of(6)
    found, step = gradient(batch, clip_norm=None, label_smoothing=label_smoothing)
    model = random_head(tiny())
    logits = model(normalize(batch.images, Preprocessing()))
    loss = F.cross_entropy(logits, batch.labels, label_smoothing=label_smoothing)
    loss.backward()
    assert float(step.loss) == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name], parameter.grad, atol=1e-6), name


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_an_unreadable_image_has_no_influence(label_smoothing: float) -> None:
    whole = batch_of(6, invalid=(1, 4))
    readable = Batch(*(tensor[whole.valid] for tensor in whole[:4]), [])
    expected, alone = gradient(readable, label_smoothing=label_smoothing, clip_norm=None)
    found, together = gradient(whole, label_smoothing=label_smoothing, clip_norm=None)
    assert float(together.loss) == pytest.approx(float(alone.loss), rel=1e-6)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-6), name
    changed = whole._replace(labels=torch.where(whole.valid, whole.labels, 2 - whole.labels))
    again, _ = gradient(changed, label_smoothing=label_smoothing, clip_norm=None)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_a_batch_of_unreadable_images_alone_moves_nothing() -> None:
    found, step = gradient(batch_of(3, invalid=(0, 1, 2)))
    assert float(step.loss) == 0
    assert float(step.gradient_norm) == 0
    assert all((value == 0).all() for value in found.values())


def test_the_gradient_is_clipped_at_the_global_norm_and_reported_before() -> None:
    free, step = gradient(batch_of(6), clip_norm=None)
    norm = torch.cat([value.flatten() for value in free.values()]).norm()
    assert float(step.gradient_norm) == pytest.approx(float(norm), rel=1e-4)
    limit = float(norm) / 3
    clipped, step = gradient(batch_of(6), clip_norm=limit)
    assert float(step.gradient_norm) == pytest.approx(float(norm), rel=1e-4)
    assert torch.cat([v.flatten() for v in clipped.values()]).norm() == pytest.approx(limit, rel=1e-5)
    loose, _ = gradient(batch_of(6), clip_norm=3 * float(norm))
    assert all(torch.equal(loose[name], free[name]) for name in free)


def test_each_step_has_the_rate_of_the_schedule() -> None:
    rates = [0.1, 0.0, 0.03]
    model = random_head(tiny())
    optimizer = sgd(model, momentum=0.0)
    states = [weights(model)]
    found = []
    for step in train_steps(
        model,
        model,
        [batch_of(4, seed) for seed in range(3)],
        OptimizerStep(optimizer, clip_norm=1.0),
        rates.__getitem__,
        LOSSES["softmax"],
        precision=torch.float32,
        preprocessing=Preprocessing(),
        seed=0,
    ):
        states.append(weights(model))
        found.append((step.step, step.learning_rate, optimizer.param_groups[0]["lr"]))
    assert found == [(1, 0.1, 0.1), (2, 0.0, 0.0), (3, 0.03, 0.03)]
    moved = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in pairwise(states)]
    assert moved == [True, False, True]


def test_the_loss_falls_on_a_few_images_learnt_by_heart() -> None:
    steps = train(tiny(), [batch_of(12)] * 60)
    losses = [float(step.loss) for step in steps]
    assert losses[0] == pytest.approx(1.0986, abs=1e-3)  # log 3: the fresh head is zero
    assert losses[-1] < 0.05
    assert [step.step for step in steps] == list(range(1, 61))
    assert not steps[0].loss.requires_grad


NOISY = {"dropout": 0.3, "stochastic_depth": 0.5}


def test_the_same_seed_gives_the_same_weights_bit_for_bit() -> None:
    def run(seed: int, disturb: int) -> Mixer:
        model = random_head(tiny(**NOISY))
        torch.manual_seed(disturb)  # whatever came before plays no part
        train(model, [batch_of(8, s) for s in range(5)], seed=seed)
        return model

    first = run(1, 10)
    assert equal(first, run(1, 11))
    assert not equal(first, run(2, 10))


def masks(model: Mixer, batches: int, seed: int, between: Callable[[], object] = lambda: None) -> list[Tensor]:
    """The logits of every step of a model that does not learn: they differ by what was dropped alone."""
    seen: list[Tensor] = []

    def forward(images: Tensor, keys: Tensor) -> Tensor:
        logits = model(images, keys)
        seen.append(logits.detach().clone())
        between()
        return logits

    train(model, [batch_of(32)] * batches, lambda step: 0.0, seed=seed, forward=forward)
    return seen


@pytest.mark.parametrize("options", [{"dropout": 0.4}, {"stochastic_depth": 0.6}])
def test_what_is_dropped_is_a_function_of_seed_and_step_alone(options: dict) -> None:
    first = masks(random_head(tiny(**options)), 4, seed=3)
    assert len({logits.numpy().tobytes() for logits in first}) == 4  # each step drops something else
    again = masks(random_head(tiny(**options)), 4, seed=3, between=lambda: torch.rand(17))  # an evaluation, say
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (0, 4, 2**31 - 1):
        assert not any(torch.equal(a, b) for a in first for b in masks(random_head(tiny(**options)), 4, seed=other))


def test_the_model_trains_in_training_mode_even_after_an_evaluation_between_steps() -> None:
    model = random_head(tiny(dropout=0.5)).eval()
    modes = []

    def forward(images: Tensor, keys: Tensor) -> Tensor:
        modes.append(model.training)
        logits = model(images, keys)
        model.eval()
        return logits

    train(model, [batch_of(4)] * 3, forward=forward)
    assert modes == [True] * 3


def test_a_step_leaves_no_gradient_behind() -> None:
    model = random_head(tiny())
    train(model, [batch_of(4)])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bfloat16_is_for_matrix_products_weights_and_loss_stay_float32() -> None:
    model = random_head(tiny())
    kinds = []

    def forward(images: Tensor, keys: Tensor) -> Tensor:
        kinds.append(images.dtype)
        logits = model(images, keys)
        kinds.append(logits.dtype)
        return logits

    (step,) = train(model, [batch_of(4)], precision=torch.bfloat16, forward=forward)
    assert kinds == [torch.float32, torch.bfloat16]
    assert step.loss.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_problems_of_all_micro_batches_come_with_their_step() -> None:
    batches = [batch_of(2, s, invalid=broken) for s, broken in enumerate([(), (1,), (0, 1), ()])]
    assert [step.problems for step in train(random_head(tiny()), batches, accumulate=2)] == [
        [(1, "broken")],
        [(0, "broken"), (1, "broken")],
    ]


def test_the_update_norm_is_measured_where_it_is_asked_for() -> None:
    model = random_head(tiny())
    states = [weights(model)]
    norms: list[float] = []

    def forward(images: Tensor, keys: Tensor) -> Tensor:
        states.append(weights(model))
        return model(images, keys)

    steps = train(model, [batch_of(4, s) for s in range(4)], forward=forward, measure=lambda step: step in (2, 4))
    states = [*states[1:], weights(model)]
    for before, after in pairwise(states):
        norms.append(float(torch.cat([(after[n] - before[n]).flatten() for n in after]).norm()))
    assert [step.update_norm.isnan().item() for step in steps] == [True, False, True, False]
    assert float(steps[1].update_norm) == pytest.approx(norms[1], rel=1e-5)
    assert float(steps[3].update_norm) == pytest.approx(norms[3], rel=1e-5)


def test_a_request_during_the_step_is_noticed_in_it() -> None:
    """A signal that arrives in the forward or backward pass stops the run after this step, not after the next."""
    received: list[int] = []
    model = random_head(tiny())

    def forward(images: Tensor, keys: Tensor) -> Tensor:
        received.append(1)
        return model(images, keys)

    optimizer_step = OptimizerStep(adamw(model, weight_decay=0.1, beta1=0.9, beta2=0.999), 1.0)
    batches = [batch_of(4, seed) for seed in range(4)]
    steps = train_steps(
        model,
        forward,
        batches,
        optimizer_step,
        lambda step: 0.01,
        softmax,
        accumulate=2,
        requests=lambda: [len(received)],
    )
    assert [step.requests for step in steps] == [[2], [4]]


# Micro-batches


@dataclass(frozen=True)
class Case:
    """What a step has to give the same for, however its batch is cut."""

    model: dict = field(default_factory=dict)
    loss: LossName = "softmax"
    smoothing: float = 0.0
    mixing: Mixing | None = None
    invalid: tuple[int, ...] = ()


CASES = {
    "plain": Case(),
    "smoothing": Case(smoothing=0.1),
    "sigmoid": Case(loss="sigmoid", smoothing=0.1),
    "mixup": Case(mixing=Mixing(mixup=0.5, group=2)),
    "cutmix": Case(mixing=Mixing(mixup=None, cutmix=1.0, group=2)),
    "mixup-or-cutmix": Case(mixing=Mixing(mixup=0.5, cutmix=1.0, group=2), loss="sigmoid"),
    "dropout": Case({"dropout": 0.3}),
    "stochastic-depth": Case({"stochastic_depth": 0.6}),
    "rescaled-stochastic-depth": Case({"stochastic_depth": 0.6, "rescale": True}),
    "unreadable": Case(invalid=(1, 2, 3, 9)),  # a whole micro-batch of two, and single ones
    "all": Case(
        {"dropout": 0.2, "stochastic_depth": 0.5}, "sigmoid", 0.1, Mixing(mixup=0.5, cutmix=1, group=2), (2, 9)
    ),
}


def cut(batch: Batch, parts: int) -> list[Batch]:
    pieces = zip(*(tensor.chunk(parts) for tensor in batch[:4]), strict=True)
    return [Batch(*piece, []) for piece in pieces]


def after_micro_batches(parts: int, case: Case, kind: str = "sgd", seed: int = 7) -> tuple[Mixer, list[StepResult]]:
    """The model, in float64, after six steps of sixteen images, each in so many parts.

    SGD is not clipped: as Adam's, its steps would not show a gradient that is twice too large.
    """
    model = random_head(tiny(**case.model)).double()
    optimizer = sgd(model, momentum=0.9) if kind == "sgd" else adamw(model, weight_decay=0.1, beta1=0.9, beta2=0.999)
    invalid = [case.invalid, (), case.invalid, (), (0,), ()] if case.invalid else [()] * 6
    batches = [piece for s in range(6) for piece in cut(batch_of(16, s, invalid[s]), parts)]
    steps = train(
        model,
        batches,
        lambda step: (0.001 if kind == "adamw" else 0.005) * (step + 1),
        optimizer=optimizer,
        loss=case.loss,
        label_smoothing=case.smoothing,
        mixing=case.mixing,
        accumulate=parts,
        seed=seed,
        clip_norm=None if kind == "sgd" else 1.0,
    )
    assert len(steps) == 6
    return model, steps


def distance(a: Mixer, b: Mixer) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float(((p - q).abs() / q.abs().clamp(min=1)).detach().max()) for p, q in pairs)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("name", CASES)
def test_micro_batches_change_nothing(name: str, kind: str) -> None:
    whole, expected = after_micro_batches(1, CASES[name], kind)
    assert distance(whole, random_head(tiny()).double()) > 1e-3
    for parts in (2, 8):
        model, steps = after_micro_batches(parts, CASES[name], kind)
        assert distance(model, whole) <= 1e-10, parts
        for step, one in zip(steps, expected, strict=True):
            assert float(step.loss) == pytest.approx(float(one.loss), rel=1e-10)
            assert float(step.gradient_norm) == pytest.approx(float(one.gradient_norm), rel=1e-10)


@pytest.mark.parametrize("name", ["mixup", "cutmix", "dropout", "stochastic-depth"])
def test_another_seed_changes_something(name: str) -> None:
    (one, _), (other, _) = (after_micro_batches(2, CASES[name], seed=seed) for seed in (7, 8))
    assert distance(one, other) > 1e-5


def test_micro_batches_that_cut_through_groups_would_change_something() -> None:
    case = Case(mixing=Mixing(mixup=0.5, group=16))
    (parts, _), (whole, _) = (after_micro_batches(parts, case) for parts in (8, 1))
    assert distance(parts, whole) > 1e-5


def test_masks_by_torchs_generator_would_depend_on_the_micro_batches() -> None:
    def found(parts: int) -> Mixer:
        torch.manual_seed(0)
        model = random_head(tiny(dropout=0.3)).double()
        pieces = cut(batch_of(16), parts)
        train(model, pieces, forward=lambda images, keys: model(images), accumulate=parts)
        return model

    assert distance(found(8), found(1)) > 1e-5


@pytest.mark.parametrize("parts", [1, 4])
def test_each_sample_of_the_run_has_a_key_of_its_own(parts: int) -> None:
    model, seen = random_head(tiny()), []

    def forward(images: Tensor, keys: Tensor) -> Tensor:
        seen.append(keys)
        return model(images, keys)

    train(model, [piece for s in range(3) for piece in cut(batch_of(8, s), parts)], forward=forward, seed=5)
    assert torch.equal(torch.cat(seen), sample_keys(5, torch.arange(24)))
    assert len(torch.cat(seen).unique()) == 24


def test_a_step_of_unreadable_images_among_micro_batches_moves_nothing() -> None:
    model = random_head(tiny())
    before = weights(model)
    batches = [batch_of(2, s, invalid=(0, 1)) for s in range(4)]
    for step in train(model, batches, optimizer=sgd(model, momentum=0.9), accumulate=2, mixing=Mixing(mixup=0.5)):
        assert (float(step.loss), float(step.gradient_norm)) == (0, 0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_unreadable_image_has_no_influence_on_those_it_would_be_mixed_with() -> None:
    mixing = Mixing(mixup=1.0, cutmix=1.0, group=2)
    whole = batch_of(6, invalid=(1, 4))
    other = torch.where(whole.valid.view(-1, 1, 1, 1), whole.images, 255 - whole.images)
    for seed in range(4):
        found, step = gradient(whole, mixing=mixing, seed=seed)
        again, step_again = gradient(whole._replace(images=other, labels=whole.labels), mixing=mixing, seed=seed)
        assert torch.equal(step.loss, step_again.loss)
        assert all(torch.equal(found[name], again[name]) for name in found)
