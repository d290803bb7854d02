"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019): each image with a partner, the labels in the same shares.

One draw a step, by (seed, step). The partner of an image is the one before it within a fixed group of samples, the
first's the last (the authors roll a device's batch by one): neither micro-batches nor ranks change anything, as long as
they hold whole groups. Runs on the images' device.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from allmlp.rng import rng_stream

STREAM = 1 << 62  # of the generators' streams, those that belong to steps; samples and permutations have others


class Draw(NamedTuple):
    """How one step mixes."""

    share: float  # of the image itself, in pixels and in labels; the rest is its partner's
    box: tuple[int, int, int, int] | None  # top, left, bottom, right of what CutMix takes from the partner; or mixup


class Mixed(NamedTuple):
    images: Tensor  # (B, channels, H, W)
    partners: Tensor  # (B,) int64, positions in the batch
    shares: Tensor  # (B,) of the image itself


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Which mixing a run does.

    Args:
        mixup: p of λ ~ Beta(p, p), of which the larger of λ and 1 − λ is taken, as the authors do; None: no mixup.
        cutmix: the same for CutMix, whose λ is not folded; with both, each step tosses a coin.
        group: samples, one after the other, that have their partners among each other.
    """

    mixup: float | None
    cutmix: float | None = None
    group: int = 8

    def draw(self, seed: int, step: int, height: int, width: int) -> Draw:
        """The step's share, and CutMix's box within the image."""
        rng = rng_stream(seed, STREAM | step)
        if self.cutmix is None or (self.mixup is not None and rng.random() < 0.5):
            assert self.mixup is not None
            share = float(rng.beta(self.mixup, self.mixup))
            return Draw(max(share, 1 - share), None)
        side = (1 - rng.beta(self.cutmix, self.cutmix)) ** 0.5
        ends = []
        for size in (height, width):
            centre, half = int(rng.integers(size)), int(size * side) // 2
            ends.append((max(centre - half, 0), min(centre + half, size)))
        (top, bottom), (left, right) = ends
        return Draw(1 - (bottom - top) * (right - left) / (height * width), (top, left, bottom, right))

    def mix(self, images: Tensor, valid: Tensor, draw: Draw) -> Mixed:
        """Images (B, channels, H, W) with their partners; one whose partner could not be read stays as it is."""
        partners = rolled(len(images), self.group).to(images.device)
        mixes = valid & valid[partners]
        shares = torch.where(mixes, draw.share, 1.0).to(images.dtype)
        if draw.box is None:
            weights = shares.view(-1, 1, 1, 1)
            return Mixed(weights * images + (1 - weights) * images[partners], partners, shares)
        top, left, bottom, right = draw.box
        pasted = images.clone()
        pasted[:, :, top:bottom, left:right] = images[partners, :, top:bottom, left:right]
        return Mixed(torch.where(mixes.view(-1, 1, 1, 1), pasted, images), partners, shares)


def rolled(images: int, group: int) -> Tensor:
    """(images,) the position of each image's partner: the one before it in its group, the first's the group's last."""
    position = torch.arange(images)
    start = position - position % group
    size = torch.clamp(images - start, max=group)  # the last group may be short
    return start + (position - start - 1) % size
