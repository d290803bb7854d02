"""The training loop: what a step does, and that it is a function of seed and step."""

from collections.abc import Callable, Iterable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlp_mixer.card import Preprocessing
from mlp_mixer.data.loading import Batch
from mlp_mixer.data.transforms import normalise
from mlp_mixer.model import Mixer
from mlp_mixer.training.loop import Step, train_steps
from mlp_mixer.training.optimizer import adamw


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
    forward: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    clip_norm: float | None = 1.0,
    label_smoothing: float = 0.0,
    precision: torch.dtype = torch.float32,
) -> list[Step]:
    return list(
        train_steps(
            model,
            forward or model,
            batches,
            optimizer or adamw(model, weight_decay=0.1, beta1=0.9, beta2=0.999),
            rate,
            device=torch.device("cpu"),
            precision=precision,
            preprocessing=Preprocessing(),
            clip_norm=clip_norm,
            label_smoothing=label_smoothing,
            seed=seed,
        )
    )


def weights(model: Mixer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: Mixer, b: Mixer) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def gradient(batch: Batch, **options) -> tuple[dict[str, Tensor], Step]:
    """By one step of plain gradient descent at rate 1, so that the weights move by it."""
    model = random_head(tiny())
    before = weights(model)
    (step,) = train(model, [batch], lambda step: 1.0, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), **options)
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}, step


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_a_step_descends_along_the_gradient_of_the_mean_cross_entropy(label_smoothing: float) -> None:
    batch = batch_of(6)
    found, step = gradient(batch, clip_norm=None, label_smoothing=label_smoothing)
    model = random_head(tiny())
    logits = model(normalise(batch.images, Preprocessing()))
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
    assert torch.cat([v.flatten() for v in clipped.values()]).norm() == pytest.approx(limit, rel=1e-3)
    loose, _ = gradient(batch_of(6), clip_norm=3 * float(norm))
    assert all(torch.equal(loose[name], free[name]) for name in free)


def test_each_step_has_the_rate_of_the_schedule() -> None:
    rates = [0.1, 0.0, 0.03]
    model = random_head(tiny())
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
    states = [weights(model)]
    found = []
    for step in train_steps(
        model,
        model,
        [batch_of(4, seed) for seed in range(3)],
        optimizer,
        rates.__getitem__,
        device=torch.device("cpu"),
        precision=torch.float32,
        preprocessing=Preprocessing(),
        clip_norm=1.0,
        label_smoothing=0.0,
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

    def forward(images: Tensor) -> Tensor:
        logits = model(images)
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

    def forward(images: Tensor) -> Tensor:
        modes.append(model.training)
        logits = model(images)
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

    def forward(images: Tensor) -> Tensor:
        kinds.append(images.dtype)
        logits = model(images)
        kinds.append(logits.dtype)
        return logits

    (step,) = train(model, [batch_of(4)], precision=torch.bfloat16, forward=forward)
    assert kinds == [torch.float32, torch.bfloat16]
    assert step.loss.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
