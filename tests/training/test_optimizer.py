"""The optimizers as the paper uses them, and whole trajectories against NumPy."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from reference import numpy_forward, numpy_gradients, randomise
from small_runs import train_steps
from torch import Tensor

from allmlp.data.loader import Batch
from allmlp.data.mixup import Mixing
from allmlp.metadata import Preprocessing
from allmlp.model import Mixer
from allmlp.training.losses import LOSSES
from allmlp.training.optimizer import adamw, sgd, trainable
from allmlp.training.optimizer_step import OptimizerStep
from allmlp.training.schedules import learning_rate

Array = np.ndarray
Arrays = dict[str, Array]


def tiny(**options) -> Mixer:
    sizes = {"num_classes": 3, "image_size": 4, "patch_size": 2, "num_blocks": 2, "hidden_dim": 6}
    return Mixer(**sizes | {"tokens_mlp_dim": 5, "channels_mlp_dim": 7, "seed": 0} | options)


def test_kernels_decay_and_nothing_else() -> None:
    model = tiny()
    optimizer = adamw(model, weight_decay=0.3, beta1=0.8, beta2=0.95)
    names = {id(p): name for name, p in model.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    mlps = [f"blocks.{i}.{m}_mixing.dense_{j}" for i in (0, 1) for m in ("token", "channel") for j in (0, 1)]
    kernels = {f"{name}.weight" for name in [*mlps, "stem", "head"]}
    assert decays.keys() == set(names.values())
    assert {name for name, decay in decays.items() if decay == 0.3} == kernels
    assert {decay for name, decay in decays.items() if name not in kernels} == {0.0}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.95)}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-8}


def test_with_a_gradient_of_zero_kernels_shrink_by_rate_times_decay() -> None:
    model = tiny().double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(model, weight_decay=0.2, beta1=0.9, beta2=0.999)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.2 if parameter.ndim > 1 else 1
        assert torch.allclose(parameter, before[name] * factor, rtol=1e-14, atol=0), name


def test_sgd_has_momentum_and_no_decay() -> None:
    (group,) = sgd(tiny(), momentum=0.8).param_groups
    assert (group["momentum"], group["weight_decay"], group["dampening"], group["nesterov"]) == (0.8, 0, 0, False)


MAKERS: dict[str, Callable[[Mixer], torch.optim.Optimizer]] = {
    "adamw": partial(adamw, weight_decay=0.1, beta1=0.9, beta2=0.999),
    "sgd": partial(sgd, momentum=0.9),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_the_rate_of_a_new_optimizer_is_zero(kind: str) -> None:
    assert {group["lr"] for group in MAKERS[kind](tiny()).param_groups} == {0.0}  # each step sets it


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_frozen_is_not_the_optimizers(kind: str) -> None:
    model = tiny().requires_grad_(False)
    model.head.requires_grad_(True)
    assert [p for group in MAKERS[kind](model).param_groups for p in group["params"]] == list(model.head.parameters())
    assert trainable(model) == list(model.head.parameters())


# The reference: forward, backward, losses, mixing, schedules, clip and optimizers in NumPy


@dataclass(frozen=True)
class Setting:
    optimizer: str
    loss: str
    smoothing: float
    decay: str
    clip_norm: float | None

    def __str__(self) -> str:
        return f"{self.optimizer}-{self.loss}-{self.smoothing}-{self.decay}-{self.clip_norm}"


STEPS, WARMUP, BATCH, GROUP, CLASSES, SEED = 50, 7, 8, 4, 3, 6
PEAK = {"adamw": 0.003, "sgd": 0.05}  # Adam makes steps of the dead biases' rounding errors / 1e-8
UNREADABLE = {5: (2,), 30: (0, 7)}  # step → places


class NumpyAdamW:
    """Adam with bias correction, then decay times the rate: Loshchilov & Hutter 2019, Algorithm 2."""

    def __init__(self, weights: Arrays) -> None:
        self.weights, self.steps = weights, 0
        self.first = {name: np.zeros_like(w) for name, w in weights.items()}
        self.second = {name: np.zeros_like(w) for name, w in weights.items()}

    def step(self, gradients: Arrays, rate: float) -> None:
        self.steps += 1
        for name, w in self.weights.items():
            self.first[name] = 0.9 * self.first[name] + (1 - 0.9) * gradients[name]
            self.second[name] = 0.999 * self.second[name] + (1 - 0.999) * gradients[name] ** 2
            m = self.first[name] / (1 - 0.9**self.steps)
            v = self.second[name] / (1 - 0.999**self.steps)
            self.weights[name] = w - rate * (m / (np.sqrt(v) + 1e-8) + (0.1 * w if w.ndim > 1 else 0.0))


class NumpySGD:
    def __init__(self, weights: Arrays) -> None:
        self.weights = weights
        self.velocity = {name: np.zeros_like(w) for name, w in weights.items()}

    def step(self, gradients: Arrays, rate: float) -> None:
        for name, w in self.weights.items():
            self.velocity[name] = 0.9 * self.velocity[name] + gradients[name]
            self.weights[name] = w - rate * self.velocity[name]


def numpy_rate(step: int, setting: Setting) -> float:
    peak = PEAK[setting.optimizer]
    if step < WARMUP:
        return peak / WARMUP * step
    left = (STEPS - step) / (STEPS - WARMUP)
    return peak * (1e-5 + 0.99999 * left) if setting.decay == "linear" else peak * math.sin(math.pi / 2 * left) ** 2


def numpy_input(pixels: Array) -> Array:
    """uint8 to [−1, 1], rounded to float32 after each operation: the model's input is float32 in any precision."""
    scale = np.float32(1) / (np.float32(255) * np.float32(0.5))
    return pixels.astype(np.float32) * scale - np.float32(1)


def numpy_mixup(images: Array, labels: Array, valid: Array, step: int) -> tuple[Array, Array]:
    """Images (float32, as the loop mixes them) and (B, classes) targets: the larger share is the image's own."""
    rng = np.random.Generator(np.random.Philox(key=np.array([SEED, (1 << 62) + step], dtype=np.uint64)))
    drawn = rng.beta(0.5, 0.5)
    partner = np.concatenate([np.roll(range(start, start + GROUP), 1) for start in range(0, BATCH, GROUP)])
    own = np.where(valid & valid[partner], max(drawn, 1 - drawn), 1).astype(np.float32)
    other = np.float32(1) - own
    mixed = own[:, None, None, None] * images + other[:, None, None, None] * images[partner]
    target = np.eye(CLASSES)[labels] * own[:, None] + np.eye(CLASSES)[labels[partner]] * other[:, None]
    return mixed, target


def softmax_loss(z: Array, target: Array) -> tuple[Array, Array]:
    """(B,) −Σ t log p, and its gradient in the logits."""
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p = p / p.sum(axis=1, keepdims=True)
    return -(target * np.log(p)).sum(axis=1), p - target


def sigmoid_loss(z: Array, target: Array) -> tuple[Array, Array]:
    """(B,) −Σ (t log p + (1 − t) log(1 − p)), and its gradient in the logits."""
    p = 1 / (1 + np.exp(-z))
    return -(target * np.log(p) + (1 - target) * np.log(1 - p)).sum(axis=1), p - target


NUMPY_LOSSES = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


def start(setting: Setting) -> Mixer:
    model = tiny().double()
    randomise(model, 1)
    if setting.loss == "sigmoid":
        torch.nn.init.constant_(model.head.bias, -2.5)
    return model


def make_batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for step in range(STEPS):
        images = torch.randint(0, 256, (BATCH, 3, 4, 4), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
        valid = torch.tensor([place not in UNREADABLE.get(step, ()) for place in range(BATCH)])
        found.append(Batch(images, labels, valid, torch.arange(BATCH), []))
    return found


def numpy_trajectory(weights: Arrays, setting: Setting) -> list[tuple[float, float, float, Array]]:
    """Trains ``weights`` in place; each step's loss, gradient norm, rate and images."""
    optimizer = {"adamw": NumpyAdamW, "sgd": NumpySGD}[setting.optimizer](weights)
    trace = []
    for step, batch in enumerate(make_batches()):
        valid = batch.valid.numpy()
        images, target = numpy_mixup(numpy_input(batch.images.numpy()), batch.labels.numpy(), valid, step)
        target = (1 - setting.smoothing) * target + setting.smoothing / CLASSES
        share = valid / valid.sum()
        losses: list[Array] = []

        def of_logits(z: Array, target: Array = target, share: Array = share, losses: list[Array] = losses) -> Array:
            loss, gradient = NUMPY_LOSSES[setting.loss](z, target)
            losses.append(loss)
            return gradient * share[:, None]

        _, gradients = numpy_gradients(weights, images, 2, of_logits)
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        if setting.clip_norm is not None and norm > setting.clip_norm:
            gradients = {name: g * (setting.clip_norm / norm) for name, g in gradients.items()}
        rate = numpy_rate(step, setting)
        optimizer.step(gradients, rate)
        trace.append((float((losses[0] * share).sum()), norm, rate, images))
    return trace


def test_the_reference_gradients_are_those_of_finite_differences() -> None:
    model = start(Setting("sgd", "softmax", 0.0, "linear", None))
    weights = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    rng = np.random.default_rng(0)
    images, target = rng.normal(size=(2, 3, 4, 4)), rng.dirichlet(np.ones(CLASSES), size=2)
    for loss in NUMPY_LOSSES.values():

        def total(w: Arrays, loss: Any = loss) -> float:
            return float(loss(numpy_forward(w, images, 2, "tanh")[2], target)[0].sum())

        _, gradients = numpy_gradients(weights, images, 2, lambda z, loss=loss: loss(z, target)[1])
        assert gradients.keys() == weights.keys()
        for name, w in weights.items():
            direction = rng.normal(size=w.shape)
            slope = (gradients[name] * direction).sum()
            ends = [total(weights | {name: w + sign * 1e-5 * direction}) for sign in (1, -1)]
            assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=1e-6, abs=1e-8), name


SETTINGS = [
    Setting(optimizer, *loss, decay, clip_norm)
    for optimizer, loss, decay, clip_norm in itertools.product(
        ("adamw", "sgd"),
        (("softmax", 0.0), ("softmax", 0.1), ("sigmoid", 0.0)),
        ("linear", "cosine"),
        (None, 1.0, 0.05),
    )
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_fifty_steps_equal_those_of_numpy(setting: Setting) -> None:
    model = start(setting)
    first = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    weights = dict(first)
    trace = numpy_trajectory(weights, setting)
    shown: list[Tensor] = []

    def forward(images: Tensor, keys: Tensor) -> Tensor:
        shown.append(images)
        return model(images, keys)

    steps = list(
        train_steps(
            model,
            forward,
            make_batches(),
            OptimizerStep(MAKERS[setting.optimizer](model), setting.clip_norm),
            partial(
                learning_rate,
                peak=PEAK[setting.optimizer],
                warmup_steps=WARMUP,
                steps=STEPS,
                decay=setting.decay,  # pyright: ignore[reportArgumentType]
            ),
            partial(LOSSES[setting.loss], smoothing=setting.smoothing),
            precision=torch.float32,
            preprocessing=Preprocessing(),
            seed=SEED,
            mixing=Mixing(mixup=0.5, group=GROUP),
        )
    )
    for step, images, (loss, norm, rate, expected) in zip(steps, shown, trace, strict=True):
        assert np.array_equal(images.numpy(), expected), step.step  # bit for bit: both round to float32
        assert float(step.loss) == pytest.approx(loss, rel=1e-9), step.step
        assert float(step.gradient_norm) == pytest.approx(norm, rel=1e-8), step.step
        assert step.learning_rate == pytest.approx(rate, rel=1e-12), step.step
    for name, parameter in model.named_parameters():
        error = np.abs(parameter.detach().numpy() - weights[name]) / np.maximum(1, np.abs(weights[name]))
        assert error.max() <= 1e-9, name
    moved = {name for name, w in first.items() if np.abs(weights[name] - w).max() > 1e-3}
    dead = {f"blocks.{i}.token_mixing.dense_1.bias" for i in (0, 1)}  # which never reach the logits
    assert moved == first.keys() - dead
    if setting.clip_norm is not None:
        assert max(norm for _, norm, _, _ in trace) > setting.clip_norm  # something was clipped
    assert len(steps) == STEPS
