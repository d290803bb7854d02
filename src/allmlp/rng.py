"""All random streams. Each number is a function of a seed and of what it is for, never of the order of calls.

- ``rng_stream``: a NumPy generator for (seed, stream), for the order of images, augmentation and mixing.
- ``parameter_generator``: a torch generator for (seed, parameter name), for initial weights.
- ``sample_keys`` and ``uniform``: the random numbers of each sample for dropout and stochastic depth. They do not
  depend on the rest of the batch or on the device, so the masks are the same for any micro-batch size, any number of
  ranks, and when activations are recomputed.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2⁶⁴ / the golden ratio, as a signed number
MULTIPLIER_1, MULTIPLIER_2 = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def rng_stream(seed: int, stream: int) -> np.random.Generator:
    """A generator for each (seed, stream), both in [0, 2⁶⁴): Philox (Salmon et al. 2011), which is cheap to create."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)))


def parameter_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for the initial value of the parameter of this name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def sample_keys(seed: int, samples: Tensor) -> Tensor:
    """(B,) int64 keys, from the seed of the run and the samples' numbers within the run, (B,) int64."""
    return splitmix64(splitmix64(samples + seed * 0x1_0000_0001) + GOLDEN)


def uniform(keys: Tensor | None, stream: int, like: Tensor) -> Tensor:
    """Uniform float32 numbers in [0, 1), of the shape and on the device of ``like``, (B, …).

    Args:
        keys: the samples' keys, (B,) int64; None draws from torch's generator.
        stream: a different number for each place in the model that uses randomness.
        like: gives shape and device.
    """
    if keys is None:
        return torch.rand(like.shape, device=like.device)
    elements = torch.arange(like[0].numel(), device=like.device).view(like.shape[1:])
    step = ((stream + 1) * GOLDEN + (1 << 63)) % (1 << 64) - (1 << 63)  # wraps around like torch's int64
    streams = splitmix64(keys + step).view(-1, *[1] * (like.ndim - 1))
    # ^ 1, since Inductor treats a bare multiple of ``elements`` as an index, whose overflow is undefined behavior
    bits = splitmix64(streams + (elements ^ 1) * GOLDEN)
    return logical_right_shift(bits, 40).float() * 2**-24


def splitmix64(z: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele et al. 2014): every bit of the result depends on every bit of z, int64."""
    z = (z ^ logical_right_shift(z, 30)) * MULTIPLIER_1
    z = (z ^ logical_right_shift(z, 27)) * MULTIPLIER_2
    return z ^ logical_right_shift(z, 31)


def logical_right_shift(z: Tensor, bits: int) -> Tensor:
    """Shifts zeros in from the left; torch's >> copies the sign of signed numbers."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
