"""What a family of comparison systems provides, and what the families share."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from allmlp.errors import UserError, brief
from allmlp.sizes import as_pair, check_rates, whole_number

STEMS = ("imagenet", "small")
REQUIRED = object()  # marks a size without a default


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture at any size.

    A configuration is a dictionary: the family's key under "system", what all models have (see ``check_common``), and
    the sizes of the family.
    """

    key: str  # in a configuration, and a name for ``create``
    title: str
    sizes: Mapping[str, Any]  # each size with its default; REQUIRED: without one
    check: Callable[[dict[str, Any]], dict[str, Any]]  # raises a UserError; returns the configuration, completed
    build: Callable[[dict[str, Any]], nn.Module]  # a configuration → timm's model without its head
    blocks: Callable[[nn.Module], list[nn.Module]]  # of timm's model, in the order of computation
    timm_head: str  # the name of the last linear layer in timm's state dicts
    head_dropout: bool = True  # whether dropout acts before the head; else inside the backbone


def check_common(config: dict[str, Any]) -> dict[str, Any]:
    """Checks what the configurations of all families have; returns it with the image size as (height, width).

    Raises:
        UserError: names the argument, its value and what is valid.
    """
    config = config | {"image_size": as_pair(config["image_size"])}
    for name, least in (("num_classes", 0), ("in_channels", 1)):
        config[name] = whole_number(name, config[name], least)
    if min(config["image_size"]) < 1:
        raise UserError(f"image_size = {config['image_size']}: must be at least 1 pixel")
    check_rates(dropout=config["dropout"], stochastic_depth=config["stochastic_depth"])
    if config["rescale"] not in (True, False):
        raise UserError(f"rescale = {brief(config['rescale'])}: must be True or False")
    return config


def check_counts(config: dict[str, Any], *names: str) -> dict[str, Any]:
    """The configuration with these sizes as whole numbers, at least 1."""
    return config | {name: whole_number(name, config[name], 1) for name in names}


def check_depths(config: dict[str, Any], stages: int) -> dict[str, Any]:
    """The configuration with its depths as a tuple of one whole number for each stage, at least 1."""
    depths = config["depths"]
    if not isinstance(depths, Iterable) or isinstance(depths, str) or len(numbers := tuple(depths)) != stages:
        raise UserError(f"depths = {brief(depths)}: give {stages} numbers of blocks, one for each stage")
    return config | {"depths": tuple(whole_number("depths", number, 1) for number in numbers)}


def check_width(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration, if its width, a factor of all channels, is a positive number."""
    width = config["width"]
    if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width <= 64:
        raise UserError(f"width = {brief(width)}: give a factor of the number of channels, above 0 and at most 64")
    return config


def check_stem(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration, if it has a known stem: "imagenet" (published), or "small" (3 × 3, full resolution)."""
    if config["stem"] not in STEMS:
        raise UserError(f"stem = {brief(config['stem'])}: must be one of {', '.join(STEMS)}")
    return config


def check_multiple(title: str, image_size: tuple[int, int], unit: int, remedy: str) -> None:
    """Raises a UserError unless height and width are multiples of ``unit`` pixels."""
    if any(side % unit for side in image_size):
        height, width = (max(round(side / unit), 1) * unit for side in image_size)
        raise UserError(
            f"image size {image_size[0]}×{image_size[1]}: {title} needs multiples of {unit} pixels: use "
            f"{height}×{width}{remedy}"
        )


def groups_for(channels: Iterable[int], most: int = 32) -> int:
    """The largest number of groups, at most ``most``, that divides all of these numbers of channels."""
    return math.gcd(most, *channels)


def set_stride(parent: nn.Module, name: str) -> None:
    """Gives the convolution of this name a stride of 1."""
    conv = parent.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    conv.stride = (1, 1)


def flattened(stages: Iterable[Iterable[nn.Module]]) -> list[nn.Module]:
    return [block for stage in stages for block in stage]
