"""AdamW as the paper uses it, against NumPy."""

import math

import numpy as np
import pytest
import torch

from mlp_mixer.card import Preprocessing
from mlp_mixer.data.loading import Batch
from mlp_mixer.model import Mixer
from mlp_mixer.training.loop import train_steps
from mlp_mixer.training.optimizer import adamw


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


def test_the_rate_of_a_new_optimizer_is_zero() -> None:
    optimizer = adamw(tiny(), weight_decay=0.1, beta1=0.9, beta2=0.999)
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}  # each step sets it


class NumpyAdamW:
    """Clip at a global norm, then Adam with bias correction, then decay: Loshchilov & Hutter 2019, Algorithm 2."""

    def __init__(self, weights: dict[str, np.ndarray], decay: float, beta1: float, beta2: float) -> None:
        self.weights = weights
        self.decay, self.beta1, self.beta2 = decay, beta1, beta2
        self.first = {name: np.zeros_like(w) for name, w in weights.items()}
        self.second = {name: np.zeros_like(w) for name, w in weights.items()}
        self.steps = 0

    def step(self, gradients: dict[str, np.ndarray], rate: float, clip_norm: float | None) -> float:
        self.steps += 1
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        scale = 1.0 if clip_norm is None else min(clip_norm / (norm + 1e-6), 1.0)  # 1e-6 is PyTorch's
        for name, w in self.weights.items():
            g = gradients[name] * scale
            self.first[name] = self.beta1 * self.first[name] + (1 - self.beta1) * g
            self.second[name] = self.beta2 * self.second[name] + (1 - self.beta2) * g**2
            m = self.first[name] / (1 - self.beta1**self.steps)
            v = self.second[name] / (1 - self.beta2**self.steps)
            decay = self.decay * w if w.ndim > 1 else 0.0
            self.weights[name] = w - rate * (m / (np.sqrt(v) + 1e-8) + decay)
        return norm


@pytest.mark.parametrize("clip_norm", [1.0, 0.05, None])
def test_fifty_steps_equal_those_of_numpy(clip_norm: float | None) -> None:
    model = tiny().double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    reference = NumpyAdamW({n: p.detach().numpy().copy() for n, p in model.named_parameters()}, 0.1, 0.9, 0.999)
    gradients: dict[str, np.ndarray] = {}
    for name, parameter in model.named_parameters():  # as backward leaves them, before they are clipped
        parameter.register_hook(lambda g, name=name: gradients.__setitem__(name, g.numpy().copy()))
    batches = [
        Batch(
            torch.randint(0, 256, (8, 3, 4, 4), generator=generator, dtype=torch.uint8),
            torch.randint(0, 3, (8,), generator=generator),
            torch.ones(8, dtype=torch.bool),
            torch.arange(8),
            [],
        )
        for _ in range(50)
    ]
    start = {name: w.copy() for name, w in reference.weights.items()}
    norms = []
    for step in train_steps(
        model,
        lambda images: model(images.double()),
        batches,
        adamw(model, weight_decay=0.1, beta1=0.9, beta2=0.999),
        lambda step: 0.01 * (1 + step % 7),
        device=torch.device("cpu"),
        precision=torch.float32,
        preprocessing=Preprocessing(),
        clip_norm=clip_norm,
        label_smoothing=0.1,
        seed=0,
    ):
        norm = reference.step(gradients, step.learning_rate, clip_norm)
        assert float(step.gradient_norm) == pytest.approx(norm, rel=1e-12)
        norms.append(norm)
        for name, parameter in model.named_parameters():
            w = reference.weights[name]
            error = np.abs(parameter.detach().numpy() - w) / np.maximum(1, np.abs(w))
            assert error.max() <= 1e-9, (step.step, name)
    assert len(norms) == 50
    if clip_norm is not None:
        assert max(norms) > clip_norm  # something was clipped
    moved = {name for name, w in start.items() if np.abs(reference.weights[name] - w).max() > 0.02}
    dead = {f"blocks.{i}.token_mixing.dense_1.bias" for i in (0, 1)}  # which never reach the logits
    assert moved == start.keys() - dead
