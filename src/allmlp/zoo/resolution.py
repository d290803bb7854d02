"""Comparison systems at another image size: position embeddings are interpolated, convolutions stay as they are."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resized_backbone(backbone: nn.Module, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Changes timm's model, in place, from one configuration to another that differs in the image size.

    ViT's position embeddings are interpolated in two dimensions (timm's bicubic, with antialiasing), BoTNet's relative
    ones along each axis. HaloNet's do not depend on the image size.
    """
    if old["system"] == "vit":
        backbone.set_input_size(img_size=new["image_size"])  # pyright: ignore[reportCallIssue]
    if old["system"] == "botnet":
        for attention in backbone.modules():
            if type(attention).__name__ == "PosEmbedRel":
                ratio = [b / a for a, b in zip(old["image_size"], new["image_size"], strict=True)]
                resize_relative_positions(attention, ratio)


def resize_relative_positions(embedding: Any, ratio: list[float]) -> None:
    """The tables of 2 n − 1 relative positions along each axis, for a map whose sides grow by these ratios."""
    height, width = (round(side * r) for side, r in zip((embedding.height, embedding.width), ratio, strict=True))
    embedding.height_rel = interpolated(embedding.height_rel, 2 * height - 1)
    embedding.width_rel = interpolated(embedding.width_rel, 2 * width - 1)
    embedding.height, embedding.width = height, width


def interpolated(table: nn.Parameter, rows: int) -> nn.Parameter:
    """(n, C) → (rows, C), linear, with the first and last rows kept; the middle row, of distance 0, stays too."""
    values: Tensor = table.detach().float().T.unsqueeze(0)
    resized = F.interpolate(values, rows, mode="linear", align_corners=True)[0].T.contiguous()
    return nn.Parameter(torch.as_tensor(resized, dtype=table.dtype), requires_grad=table.requires_grad)
