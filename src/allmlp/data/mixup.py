"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019): mixes each image and its label with those of a partner.

The parameters are drawn once per step, from (seed, step). Partners come from a fixed group of consecutive samples: each
image is mixed with the previous one, the first with the last (the authors roll the batch of a device by one). The
result does not depend on micro-batches or ranks as long as they hold whole groups. Runs on the device of the images.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from allmlp.rng import rng_stream

STREAM = 1 << 62  # streams of random numbers for steps; those for samples and permutations do not overlap with them


class MixParameters(NamedTuple):
    """The random parameters of one step."""

    lam: float  # λ: weight of the image itself, in pixels and label; its partner has 1 − λ
    box: tuple[int, int, int, int] | None  # CutMix: top, left, bottom, right of the partner's pixels; None: mixup


class MixedBatch(NamedTuple):
    images: Tensor  # (B, channels, H, W)
    partners: Tensor  # (B,) int64, positions in the batch
    lam: Tensor  # (B,) λ of each image; 1 where it is not mixed


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Mixup, CutMix, or both, in which case each step applies one of them, with equal probability.

    Args:
        mixup: p of λ ~ Beta(p, p), replaced by the larger of λ and 1 − λ, as the authors do; None: no mixup.
        cutmix: p of λ ~ Beta(p, p), used as drawn; None: no CutMix.
        group: number of consecutive samples that are mixed with each other.
    """

    mixup: float | None
    cutmix: float | None = None
    group: int = 8

    def draw(self, seed: int, step: int, height: int, width: int) -> MixParameters:
        """The parameters of a step, for images of this size."""
        rng = rng_stream(seed, STREAM | step)
        if self.cutmix is None or (self.mixup is not None and rng.random() < 0.5):
            assert self.mixup is not None
            lam = float(rng.beta(self.mixup, self.mixup))
            return MixParameters(max(lam, 1 - lam), None)
        side = (1 - rng.beta(self.cutmix, self.cutmix)) ** 0.5
        ends = []
        for size in (height, width):
            center, half = int(rng.integers(size)), int(size * side) // 2
            ends.append((max(center - half, 0), min(center + half, size)))
        (top, bottom), (left, right) = ends
        return MixParameters(1 - (bottom - top) * (right - left) / (height * width), (top, left, bottom, right))

    def mix(self, images: Tensor, valid: Tensor, parameters: MixParameters) -> MixedBatch:
        """Mixes images (B, channels, H, W) with their partners, except where one of the two is not ``valid``, (B,)."""
        partners = partner_positions(len(images), self.group).to(images.device, non_blocking=True)
        mixes = valid & valid[partners]
        lam = torch.where(mixes, parameters.lam, 1.0).to(images.dtype)
        if parameters.box is None:
            weights = lam.view(-1, 1, 1, 1)
            return MixedBatch(weights * images + (1 - weights) * images[partners], partners, lam)
        top, left, bottom, right = parameters.box
        pasted = images.clone()
        pasted[:, :, top:bottom, left:right] = images[partners, :, top:bottom, left:right]
        return MixedBatch(torch.where(mixes.view(-1, 1, 1, 1), pasted, images), partners, lam)


def partner_positions(images: int, group: int) -> Tensor:
    """(images,) int64: the previous position in the same group; for the first of a group, the last."""
    position = torch.arange(images)
    start = position - position % group
    size = torch.clamp(images - start, max=group)  # the last group may be short
    return start + (position - start - 1) % size
