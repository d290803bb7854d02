"""The optimizers as the paper uses them, and whole trajectories by hand."""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from reference import randomise, weights_of
from small_runs import train_steps
from tiny_models import MAKE_OPTIMIZER, batch_of, recorded, tiny
from torch import Tensor

from allmlp.config.recipe import Decay, LossName
from allmlp.data.loader import Batch
from allmlp.data.mixup import Mixing
from allmlp.model import Mixer
from allmlp.training.losses import LOSSES
from allmlp.training.optimizer import adamw, sgd, trainable
from allmlp.training.optimizer_step import OptimizerStep
from allmlp.training.schedules import learning_rate


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


# The reference: every formula from pixels to weights written out; only the gradient is PyTorch's


class Setting(NamedTuple):
    optimizer: str
    loss: LossName
    smoothing: float
    decay: Decay
    clip_norm: float | None


STEPS, WARMUP, BATCH, GROUP, CLASSES, SEED = 50, 7, 8, 4, 3, 6
PEAK = {"adamw": 0.003, "sgd": 0.05}  # Adam makes steps of the dead biases' rounding errors / 1e-8
UNREADABLE = {5: (2,), 30: (0, 7)}  # step → places


def start(setting: Setting) -> Mixer:
    model = tiny().double()
    randomise(model, 1)
    if setting.loss == "sigmoid":
        torch.nn.init.constant_(model.head.bias, -2.5)
    return model


BATCHES = [batch_of(BATCH, step, UNREADABLE.get(step, ())) for step in range(STEPS)]


def mixed(batch: Batch, step: int) -> tuple[Tensor, Tensor]:
    """Images in [−1, 1] (float32, as the step mixes them) and (B, classes) targets: the larger share is the own."""
    images = batch.images.float() * torch.tensor(1 / (255 * 0.5)) - 1
    rng = np.random.Generator(np.random.Philox(key=np.array([SEED, (1 << 62) + step], dtype=np.uint64)))
    drawn = rng.beta(0.5, 0.5)
    partner = torch.cat([torch.arange(first, first + GROUP).roll(1) for first in range(0, BATCH, GROUP)])
    own = torch.where(batch.valid & batch.valid[partner], max(drawn, 1 - drawn), 1.0)[:, None]
    targets = torch.eye(CLASSES)[batch.labels]
    share = own[..., None, None]
    return share * images + (1 - share) * images[partner], own * targets + (1 - own) * targets[partner]


def rate_of(step: int, setting: Setting) -> float:
    peak = PEAK[setting.optimizer]
    if step < WARMUP:
        return peak / WARMUP * step
    left = (STEPS - step) / (STEPS - WARMUP)
    return peak * (1e-5 + 0.99999 * left) if setting.decay == "linear" else peak * math.sin(math.pi / 2 * left) ** 2


def train_by_hand(model: Mixer, setting: Setting) -> list[tuple[float, float, float, Tensor]]:
    """Each step's loss, gradient norm, rate and images. Adam is Loshchilov & Hutter 2019, Algorithm 2."""
    weights, trace = [p.detach() for p in model.parameters()], []
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for step, batch in enumerate(BATCHES):
        images, target = mixed(batch, step)
        target = (1 - setting.smoothing) * target.double() + setting.smoothing / CLASSES
        logits = model(images)
        if setting.loss == "softmax":
            losses = -(target * logits.log_softmax(1)).sum(1)
        else:
            p = logits.sigmoid()
            losses = -(target * p.log() + (1 - target) * (1 - p).log()).sum(1)
        loss = losses[batch.valid].mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = float(torch.cat([g.flatten() for g in gradients]).norm())
        clip = 1.0 if setting.clip_norm is None else min(setting.clip_norm / norm, 1.0)
        rate = rate_of(step, setting)
        for w, g, m, v in zip(weights, gradients, first, second, strict=True):
            if setting.optimizer == "sgd":
                m.mul_(0.9).add_(clip * g)
                w -= rate * m
            else:
                m.mul_(0.9).add_((1 - 0.9) * clip * g)
                v.mul_(0.999).add_((1 - 0.999) * (clip * g) ** 2)
                unbiased = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
                w -= rate * (unbiased[0] / (unbiased[1].sqrt() + 1e-8) + (0.1 * w if w.ndim > 1 else 0))
        trace.append((loss.item(), norm, rate, images))
    return trace


def test_gradients_are_those_of_finite_differences() -> None:
    model = start(Setting("sgd", "softmax", 0.0, "linear", None))
    names, weights = zip(*model.named_parameters(), strict=True)
    images, _ = mixed(BATCHES[0], 0)

    def logits(*weights: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (images,))

    assert torch.autograd.gradcheck(logits, weights, fast_mode=True)


SETTINGS = [
    Setting("adamw", "softmax", 0.0, "linear", 1.0),
    Setting("adamw", "softmax", 0.1, "cosine", None),
    Setting("adamw", "sigmoid", 0.0, "linear", 0.05),
    Setting("sgd", "softmax", 0.0, "cosine", 0.05),
    Setting("sgd", "softmax", 0.1, "linear", 1.0),
    Setting("sgd", "sigmoid", 0.0, "cosine", None),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "-".join(map(str, setting)))
def test_fifty_steps_equal_those_by_hand(setting: Setting) -> None:
    model, reference, before = (start(setting) for _ in range(3))
    trace = train_by_hand(reference, setting)
    seen: list[Tensor] = []
    update = OptimizerStep(MAKE_OPTIMIZER[setting.optimizer](model), setting.clip_norm)
    schedule = partial(
        learning_rate, peak=PEAK[setting.optimizer], warmup_steps=WARMUP, steps=STEPS, decay=setting.decay
    )
    loss_function, mixing = partial(LOSSES[setting.loss], smoothing=setting.smoothing), Mixing(mixup=0.5, group=GROUP)
    steps = list(
        train_steps(model, recorded(model, seen), BATCHES, update, schedule, loss_function, seed=SEED, mixing=mixing)
    )
    assert [step.step for step in steps] == list(range(1, STEPS + 1))
    for step, images, (loss, norm, rate, expected) in zip(steps, seen[::3], trace, strict=True):
        assert torch.equal(images, expected), step.step  # bit for bit: both round to float32
        assert float(step.loss) == pytest.approx(loss, rel=1e-9), step.step
        assert float(step.gradient_norm) == pytest.approx(norm, rel=1e-8), step.step
        assert step.learning_rate == pytest.approx(rate, rel=1e-12), step.step
    found, expected, first = (weights_of(each) for each in (model, reference, before))
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, rtol=1e-9, atol=1e-9), name
        dead = name.endswith("token_mixing.dense_1.bias")  # it never reaches the logits
        assert bool((weight - first[name]).abs().max() > 1e-3) == (not dead), name
    if setting.clip_norm is not None:
        assert max(norm for _, norm, _, _ in trace) > setting.clip_norm  # something was clipped
