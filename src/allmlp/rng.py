"""Random numbers that belong to one sample, for dropout and stochastic depth.

Each is a function of the sample's key, of the place in the model and of the element: never of the batch around the
sample, the device or the order of calls. So micro-batches, ranks and recomputed activations all see the same masks.
"""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2⁶⁴ / the golden ratio, as torch's signed numbers wrap
FIRST, SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def sample_keys(seed: int, samples: Tensor) -> Tensor:
    """(B,) int64: a key for each sample, from the seed of the run and the sample's number in it, (B,) int64."""
    return mixed(mixed(samples + seed * 0x1_0000_0001) + GOLDEN)


def uniform(keys: Tensor | None, place: int, like: Tensor) -> Tensor:
    """float32 in [0, 1) in the shape of ``like``, (B, …); without keys, from torch's generator.

    Args:
        keys: (B,) int64, of the samples.
        place: a number of its own for each use of randomness in the model.
        like: gives shape and device.
    """
    if keys is None:
        return torch.rand(like.shape, device=like.device)
    elements = torch.arange(like[0].numel(), device=like.device).view(like.shape[1:])
    step = ((place + 1) * GOLDEN + (1 << 63)) % (1 << 64) - (1 << 63)  # wrapped as torch wraps
    streams = mixed(keys + step).view(-1, *[1] * (like.ndim - 1))
    bits = mixed(streams + (elements ^ 1) * GOLDEN)  # ^: Inductor takes a sum for an index, whose overflow is undefined
    return (shifted(bits, 40)).float() * 2**-24


def mixed(z: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al. 2014): every bit of the outcome depends on every bit of z."""
    z = (z ^ shifted(z, 30)) * FIRST
    z = (z ^ shifted(z, 27)) * SECOND
    return z ^ shifted(z, 31)


def shifted(z: Tensor, bits: int) -> Tensor:
    """To the right with zeros coming in, which torch's >> has for unsigned numbers only."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
