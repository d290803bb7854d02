"""Dropout and stochastic depth, with masks that depend on the sample and not on its batch or device.

In training both take the samples' keys (``rng.sample_keys``); without keys, torch's generator draws the masks. Each
module needs its own stream number, so that no two masks of a model are the same.
"""

import torch
from torch import Tensor, nn

from allmlp.rng import uniform


class Dropout(nn.Module):
    """In training, zeroes each element of (B, …) with probability ``rate`` and divides the others by 1 − rate."""

    def __init__(self, rate: float, stream: int) -> None:
        super().__init__()
        self.rate, self.stream = rate, stream

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = uniform(keys, self.stream, x) >= self.rate
        return torch.where(keep, x / (1 - self.rate), 0.0)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, drops the whole branch for some samples of (B, …).

    Args:
        rate: probability to drop the branch of a sample.
        stream: number of the random stream.
        rescale: whether branches that are kept are divided by 1 − rate.
    """

    def __init__(self, rate: float, stream: int, rescale: bool = False) -> None:
        super().__init__()
        self.rate, self.stream, self.rescale = rate, stream, rescale

    def forward(self, branch: Tensor, keys: Tensor | None = None) -> Tensor:
        if not self.training or self.rate == 0:
            return branch
        first = branch[(slice(None), *[slice(1)] * (branch.ndim - 1))]  # (B, 1, …): one number per sample
        keep = (uniform(keys, self.stream, first) >= self.rate).to(branch.dtype)
        return branch * (keep / (1 - self.rate) if self.rescale else keep)
