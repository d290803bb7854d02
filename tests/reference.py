"""An independent MLP-Mixer in float64 NumPy, from the paper's equations, and small models to compare with it."""

import math
from collections.abc import Callable

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


def numpy_gradients(
    weights: dict[str, Array],
    images: Array,
    patch_size: int | tuple[int, int],
    of_logits: Callable[[Array], Array],
) -> tuple[Array, dict[str, Array]]:
    """Returns the logits and each weight's gradient, derived by hand, without automatic differentiation.

    The GELU is the tanh form. ``of_logits`` is the gradient with respect to the logits, (B, classes) → (B, classes).
    """
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    gradients: dict[str, Array] = {}
    back: list[Callable[[Array], Array]] = []  # of each branch, from the gradient of what it adds to that of its input

    def dense(name: str, x: Array) -> tuple[Array, Callable[[Array], Array]]:
        def backward(g: Array) -> Array:
            gradients[f"{name}.weight"] = rows(g).T @ rows(x)
            gradients[f"{name}.bias"] = rows(g).sum(axis=0)
            return g @ w[f"{name}.weight"]

        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"], backward

    def norm(name: str, x: Array) -> tuple[Array, Callable[[Array], Array]]:
        normed = layer_norm(x)
        deviation = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)

        def backward(g: Array) -> Array:
            gradients[f"{name}.weight"] = rows(g * normed).sum(axis=0)
            gradients[f"{name}.bias"] = rows(g).sum(axis=0)
            g = g * w[f"{name}.weight"]
            along = (g * normed).mean(axis=-1, keepdims=True)
            return (g - g.mean(axis=-1, keepdims=True) - normed * along) / deviation

        return normed * w[f"{name}.weight"] + w[f"{name}.bias"], backward

    def mlp(name: str, x: Array) -> tuple[Array, Callable[[Array], Array]]:
        hidden, back_0 = dense(f"{name}.dense_0", x)
        out, back_1 = dense(f"{name}.dense_1", gelu_tanh(hidden))
        return out, lambda g: back_0(back_1(g) * gelu_tanh_slope(hidden))

    def branch(mixing: str, norm_name: str, x: Array, across_tokens: bool) -> tuple[Array, Callable[[Array], Array]]:
        turn = (lambda a: np.swapaxes(a, 1, 2)) if across_tokens else (lambda a: a)
        normed, back_norm = norm(norm_name, x)
        out, back_mlp = mlp(mixing, turn(normed))
        return turn(out), lambda g: back_norm(turn(back_mlp(turn(g))))

    pixels = patches(np.asarray(images, np.float64), patch_size)
    stem = w["stem.weight"]
    x = pixels @ stem.reshape(len(stem), -1).T + w["stem.bias"]
    for i in range(1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))):
        for mixing, norm_name in (("token", "norm1"), ("channel", "norm2")):
            added, backward = branch(f"blocks.{i}.{mixing}_mixing", f"blocks.{i}.{norm_name}", x, mixing == "token")
            x = x + added
            back.append(backward)
    normed, back_norm = norm("pre_head_layer_norm", x)
    logits, back_head = dense("head", normed.mean(axis=1))

    g = back_head(of_logits(logits))[:, None, :] / x.shape[1]  # the mean gives each token the same share
    g = back_norm(np.broadcast_to(g, x.shape))
    for backward in reversed(back):
        g = g + backward(g)
    gradients["stem.weight"] = (rows(g).T @ rows(pixels)).reshape(stem.shape)
    gradients["stem.bias"] = rows(g).sum(axis=0)
    return logits, gradients


def rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


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


def gelu_tanh_slope(x: Array) -> Array:
    """The derivative of ``gelu_tanh``."""
    t = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return (1 + t) / 2 + x / 2 * (1 - t**2) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)


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
