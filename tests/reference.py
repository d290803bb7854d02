"""An independent MLP-Mixer in float64 NumPy, from the paper's equations, and small models to compare with it."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from allmlp.model import Mixer

Array = np.ndarray


def numpy_forward(
    weights: dict[str, Array], images: Array, patch_size: int | tuple[int, int], gelu: str
) -> tuple[Array, Array, Array]:
    """(B, channels, H, W) → tokens before the last LayerNorm (B, S, C), features (B, C), logits (B, classes).

    Without "head.weight" among the weights, the logits are the features.
    """
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    activation = {"tanh": gelu_tanh, "erf": gelu_erf}[gelu]

    def mlp(prefix: str, x: Array) -> Array:  # W2 σ(W1 x), Eq. 1
        hidden = activation(x @ w[f"{prefix}.dense_0.weight"].T + w[f"{prefix}.dense_0.bias"])
        return hidden @ w[f"{prefix}.dense_1.weight"].T + w[f"{prefix}.dense_1.bias"]

    def norm(prefix: str, x: Array) -> Array:
        return layer_norm(x) * w[f"{prefix}.weight"] + w[f"{prefix}.bias"]

    pixels = patches(np.asarray(images, np.float64), patch_size)
    stem = w["stem.weight"]
    x = pixels @ stem.reshape(len(stem), -1).T + w["stem.bias"]
    for i in range(1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))):
        normed = norm(f"blocks.{i}.norm1", x)
        x = x + np.swapaxes(mlp(f"blocks.{i}.token_mixing", np.swapaxes(normed, 1, 2)), 1, 2)
        x = x + mlp(f"blocks.{i}.channel_mixing", norm(f"blocks.{i}.norm2", x))
    features = norm("pre_head_layer_norm", x).mean(axis=1)
    logits = features @ w["head.weight"].T + w["head.bias"] if "head.weight" in w else features
    return x, features, logits


def patches(images: Array, patch_size: int | tuple[int, int]) -> Array:
    """(B, channels, H, W) → (B, S, channels · ph · pw): patches row by row, each as channel, row, column."""
    ph, pw = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    batch, channels, height, width = images.shape
    x = images.reshape(batch, channels, height // ph, ph, width // pw, pw).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, (height // ph) * (width // pw), channels * ph * pw)


def layer_norm(x: Array) -> Array:
    centered = x - x.mean(axis=-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + 1e-6)


def gelu_tanh(x: Array) -> Array:
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x: Array) -> Array:
    return x / 2 * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2)))


def randomise(model: nn.Module, seed: int) -> None:
    """Sets every parameter, head, biases and LayerNorm included, to random values that keep activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.normal_(0 if name.endswith("bias") else 1, 0.3, generator=generator)


SMALL = {
    "num_classes": 5,
    "image_size": 12,
    "patch_size": 4,
    "num_blocks": 3,
    "hidden_dim": 16,
    "tokens_mlp_dim": 10,
    "channels_mlp_dim": 24,
    "seed": 0,
}


def small(**options) -> Mixer:
    return Mixer(**SMALL | options)


def random_model(seed: int = 1, **options) -> Mixer:
    """Float64, every parameter random: a fresh head is zero, and its logits agree with anything."""
    model = small(**options).double().eval()
    randomise(model, seed)
    return model


def random_images(model: Mixer, batch: int = 3, seed: int = 2) -> Tensor:
    shape = (batch, model.stem.in_channels, *model.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def close(actual: Tensor, expected: Tensor | np.ndarray, tolerance: float = 1e-10) -> bool:
    expected = torch.as_tensor(expected)
    return actual.shape == expected.shape and (actual - expected).abs().max().item() <= tolerance
