"""The authors' initial weights, each a function of the seed and the parameter's name alone."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from allmlp.rng import parameter_generator
from allmlp.sizes import whole_number


def copy_into(parameter: Tensor, value: Tensor) -> None:
    """Copies a value into a parameter without a gradient."""
    with torch.no_grad():
        parameter.copy_(value)


def init_weights(model: nn.Module, seed: int, copy_: Callable[[Tensor, Tensor], None] = copy_into) -> None:
    """Draws a Mixer's initial weights; they are the same on any device.

    Kernels and stem are LeCun normal as flax draws it: a normal truncated at 2σ, corrected to variance 1/fan_in. The
    head's kernel and every bias are 0, LayerNorm scales 1.

    Args:
        model: any module with the parameter names of ``Mixer``.
        seed: seed of the weights.
        copy_: writes a full value into a parameter, which may hold only a shard of it.
    """
    seed = whole_number("seed", seed, 0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or name == "head.weight":
            nn.init.zeros_(parameter)
        elif parameter.ndim == 1:
            nn.init.ones_(parameter)
        else:
            copy_(parameter, lecun_normal(parameter, parameter_generator(seed, name)))


def lecun_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """A kernel (out, in, …) of the same shape and type on the CPU; fan_in is the product of all axes but the first."""
    std = like.shape[1:].numel() ** -0.5 / 0.87962566  # a standard normal truncated at ±2 has this standard deviation
    kernel = torch.empty(like.shape, dtype=like.dtype, device="cpu")
    return nn.init.trunc_normal_(kernel, std=std, a=-2 * std, b=2 * std, generator=generator)
