"""The optimizers as the paper uses them, and whole trajectories against NumPy."""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from reference import numpy_gradients, randomise
from small_runs import train_steps
from tiny_models import MAKE_OPTIMIZER, tiny
from torch import Tensor

from allmlp.config.recipe import Decay, LossName
from allmlp.data.loader import Batch
from allmlp.data.mixup import Mixing
from allmlp.model import Mixer
from allmlp.training.losses import LOSSES
from allmlp.training.optimizer import adamw, sgd, trainable
from allmlp.training.optimizer_step import OptimizerStep
from allmlp.training.schedules import learning_rate

Array = np.ndarray
Arrays = dict[str, Array]


def test_adamw_decays_kernels_and_nothing_else() -> None:
    model = tiny()
    optimizer = adamw(model, weight_decay=0.3, beta1=0.8, beta2=0.95)
    names = {id(p): name for name, p in model.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    mlps = [f"blocks.{i}.{m}_mixing.dense_{j}" for i in (0, 1) for m in ("token", "channel") for j in (0, 1)]
    kernels = {f"{name}.weight" for name in [*mlps, "stem", "head"]}
    assert decays == {name: 0.3 if name in kernels else 0.0 for name in names.values()}
    assert {(*group["betas"], group["eps"]) for group in optimizer.param_groups} == {(0.8, 0.95, 1e-8)}


def test_sgd_has_momentum_and_no_decay() -> None:
    (group,) = sgd(tiny(), momentum=0.8).param_groups
    assert (group["momentum"], group["weight_decay"], group["dampening"], group["nesterov"]) == (0.8, 0, 0, False)


@pytest.mark.parametrize("kind", MAKE_OPTIMIZER)
def test_an_optimizer_has_what_is_not_frozen_and_a_rate_of_zero(kind: str) -> None:
    model = tiny().requires_grad_(False)
    model.head.requires_grad_(True)
    groups = MAKE_OPTIMIZER[kind](model).param_groups
    assert [p for group in groups for p in group["params"]] == trainable(model) == list(model.head.parameters())
    assert {group["lr"] for group in groups} == {0.0}  # each step sets it


# The reference: forward, backward, losses, mixing, schedules, clip and optimizers in NumPy


class Setting(NamedTuple):
    optimizer: str
    loss: LossName
    smoothing: float
    decay: Decay
    clip_norm: float | None


STEPS, WARMUP, BATCH, GROUP, CLASSES, SEED = 50, 7, 8, 4, 3, 6
PEAK = {"adamw": 0.003, "sgd": 0.05}  # Adam makes steps of the dead biases' rounding errors / 1e-8
UNREADABLE = {5: (2,), 30: (0, 7)}  # step → places


class NumpyOptimizer:
    """SGD with momentum; Adam with bias correction, then decay times the rate: Loshchilov & Hutter 2019, Algorithm 2."""

    def __init__(self, kind: str, weights: Arrays) -> None:
        self.kind, self.weights, self.steps = kind, weights, 0
        self.first = {name: np.zeros_like(w) for name, w in weights.items()}
        self.second = {name: np.zeros_like(w) for name, w in weights.items()}

    def step(self, gradients: Arrays, rate: float) -> None:
        self.steps += 1
        for name, w in self.weights.items():
            g = gradients[name]
            if self.kind == "sgd":
                self.first[name] = change = 0.9 * self.first[name] + g
            else:
                self.first[name] = 0.9 * self.first[name] + (1 - 0.9) * g
                self.second[name] = 0.999 * self.second[name] + (1 - 0.999) * g**2
                m = self.first[name] / (1 - 0.9**self.steps)
                v = self.second[name] / (1 - 0.999**self.steps)
                change = m / (np.sqrt(v) + 1e-8) + (0.1 * w if w.ndim > 1 else 0.0)
            self.weights[name] = w - rate * change


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


def numpy_loss(kind: LossName, z: Array, target: Array) -> tuple[Array, Array]:
    """(B,) losses, and their gradient in the logits."""
    if kind == "softmax":
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p = p / p.sum(axis=1, keepdims=True)
        return -(target * np.log(p)).sum(axis=1), p - target
    p = 1 / (1 + np.exp(-z))
    return -(target * np.log(p) + (1 - target) * np.log(1 - p)).sum(axis=1), p - target


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
    optimizer = NumpyOptimizer(setting.optimizer, weights)
    trace = []
    for step, batch in enumerate(make_batches()):
        valid = batch.valid.numpy()
        images, target = numpy_mixup(numpy_input(batch.images.numpy()), batch.labels.numpy(), valid, step)
        target = (1 - setting.smoothing) * target + setting.smoothing / CLASSES
        share = valid / valid.sum()
        losses: list[Array] = []

        def of_logits(z: Array, target: Array = target, share: Array = share, losses: list[Array] = losses) -> Array:
            loss, gradient = numpy_loss(setting.loss, z, target)
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


SETTINGS = [
    Setting("adamw", "softmax", 0.0, "linear", 1.0),
    Setting("adamw", "softmax", 0.1, "cosine", None),
    Setting("adamw", "sigmoid", 0.0, "linear", 0.05),
    Setting("sgd", "softmax", 0.0, "cosine", 0.05),
    Setting("sgd", "softmax", 0.1, "linear", 1.0),
    Setting("sgd", "sigmoid", 0.0, "cosine", None),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "-".join(map(str, setting)))
def test_fifty_steps_equal_those_of_numpy(setting: Setting) -> None:
    model = start(setting)
    first = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    weights = dict(first)
    trace = numpy_trajectory(weights, setting)
    shown: list[Tensor] = []

    def forward(images: Tensor, keys: Tensor) -> Tensor:
        shown.append(images)
        return model(images, keys)

    peak = PEAK[setting.optimizer]
    steps = list(
        train_steps(
            model,
            forward,
            make_batches(),
            OptimizerStep(MAKE_OPTIMIZER[setting.optimizer](model), setting.clip_norm),
            partial(learning_rate, peak=peak, warmup_steps=WARMUP, steps=STEPS, decay=setting.decay),
            partial(LOSSES[setting.loss], smoothing=setting.smoothing),
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
    assert [step.step for step in steps] == list(range(1, STEPS + 1))
