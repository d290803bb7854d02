"""The arguments of a Mixer and the shapes of its inputs: types, and checks with a message for the user."""

import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from allmlp.errors import UserError, brief

Size = int | tuple[int, int]  # in pixels: one number for both sides, or (height, width)
Gelu = Literal["tanh", "erf"]

COUNTS = {  # and the least value of each
    "num_blocks": 1,
    "hidden_dim": 1,
    "tokens_mlp_dim": 1,
    "channels_mlp_dim": 1,
    "in_channels": 1,
    "num_classes": 0,
}


def as_pair(size: Size) -> tuple[int, int]:
    """Returns (height, width) for one number or two; raises a UserError for anything else."""
    try:
        if isinstance(size, Sequence):
            height, width = size
        else:
            height = width = size
        return operator.index(height), operator.index(width)
    except (TypeError, ValueError):
        raise UserError(f"size {size!r}: give a whole number of pixels, or two, (height, width)") from None


def whole_number(name: str, value: Any, least: int) -> int:
    """The value as a Python integer; raises a UserError that names it unless it is whole and at least ``least``."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise UserError(f"{name} = {brief(value)}: must be a whole number, at least {least}")
    return number


def check_config(config: dict[str, Any]) -> dict[str, Any]:
    """Checks the arguments of ``Mixer``; returns them with sizes as pairs and counts as Python integers.

    Raises:
        UserError: the first argument that is out of range, with its value and what is valid.
    """
    config = config | {key: as_pair(config[key]) for key in ("image_size", "patch_size")}
    config |= {key: whole_number(key, config[key], least) for key, least in COUNTS.items()}
    if config["rescale"] not in (True, False):
        raise UserError(f"rescale = {brief(config['rescale'])}: must be True or False")
    for key in ("image_size", "patch_size"):
        if min(config[key]) < 1:
            raise UserError(f"{key} = {config[key]}: must be at least 1 pixel")
    (height, width), (patch_height, patch_width) = config["image_size"], config["patch_size"]
    if height % patch_height or width % patch_width:
        fit = [max(round(s / p), 1) * p for s, p in zip(config["image_size"], config["patch_size"], strict=True)]
        raise UserError(
            f"image size {height}×{width} is not a multiple of the patch size {patch_height}×{patch_width}: "
            f"use {fit[0]}×{fit[1]}, or another patch size"
        )
    check_rates(dropout=config["dropout"], stochastic_depth=config["stochastic_depth"])
    check_form(config["gelu"], config["norm_eps"])
    return config


def check_block(gelu: str, norm_eps: float, dropout: float, drop_path: float, **counts: int) -> None:
    """Checks the arguments of ``MixerBlock``; raises a UserError that names the first one out of range."""
    for name, count in counts.items():
        whole_number(name, count, 1)
    check_rates(dropout=dropout, drop_path=drop_path)
    check_form(gelu, norm_eps)


def check_rates(**rates: float) -> None:
    for name, rate in rates.items():
        if not (isinstance(rate, Real) and 0 <= rate < 1):
            raise UserError(f"{name} = {brief(rate)}: must be a probability, at least 0 and below 1")


def check_form(gelu: str, norm_eps: float) -> None:
    if not (isinstance(norm_eps, Real) and 0 < norm_eps < 1):
        raise UserError(f"norm_eps = {brief(norm_eps)}: must be a small positive number (the authors use 1e-6)")
    if gelu not in ("tanh", "erf"):
        raise UserError(f"gelu = {gelu!r}: must be 'tanh' (the authors' form) or 'erf' (timm's)")


def check_images(images: Tensor, in_channels: int, image_size: tuple[int, int], device: torch.device) -> None:
    """Raises a UserError unless the images are (B, in_channels, H, W) of the model's size, of floats, on its device."""
    check_floats("images", images, "normalize them, with allmlp.transform(model), or give files to allmlp.predict")
    if images.device != device:
        raise UserError(f"images on {images.device}, and the model on {device}: move one of them with .to(device)")
    if images.ndim != 4 or images.shape[2:] != image_size or images.shape[1] != in_channels:
        raise UserError(
            f"images of shape {tuple(images.shape)}: this model takes (batch, {in_channels}, {image_size[0]}, "
            f"{image_size[1]}); resize the images, or create the model for their size"
        )


def check_tokens(x: Tensor, tokens: int, channels: int) -> None:
    """Raises a UserError unless x is (B, S, C) with this S and C, of floats."""
    check_floats("tokens", x, "give the embeddings of patches")
    if x.ndim != 3 or x.shape[1:] != (tokens, channels):
        raise UserError(f"tokens of shape {tuple(x.shape)}: must be (batch, {tokens}, {channels})")


def check_floats(name: str, x: Tensor, remedy: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise UserError(f"{name} of type {kind}: must be a tensor of floats: {remedy}")


def check_mask(mask: Tensor, tokens: Tensor) -> None:
    """Raises a UserError unless the mask is (B, S) bool for tokens (B, S, C)."""
    if mask.shape != tokens.shape[:2] or mask.dtype != torch.bool:
        found, expected = tuple(mask.shape), tuple(tokens.shape[:2])
        raise UserError(f"mask of shape {found} and type {mask.dtype}: use shape {expected} and type torch.bool")


def check_any_present(mask: Tensor) -> None:
    """Raises a UserError if a row of the mask (B, S) has no token present; on a GPU, this waits for the mask."""
    empty = ~mask.any(1)
    if empty.any():
        row = int(empty.nonzero()[0])
        raise UserError(f"mask: row {row} has no token present (at least 1 is needed): leave this sample out")
