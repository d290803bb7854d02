"""The architectures of the tables: by name at an image size, and their costs."""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import torch

from allmlp.factory import build_meta, create, is_zoo, resized_config
from allmlp.flops import Cost, cost


@cache
def config_at(name: str, image_size: int | None = None, num_classes: int = 1000) -> Mapping[str, Any]:
    """The configuration of a model by name for an image size in pixels, None: its own.

    A Mixer is resized from 224, which widens token mixing as fine-tuning does (Supplement C).
    """
    with torch.device("meta"):
        config = create(name, num_classes=num_classes).config
        if image_size is not None and is_zoo(config):
            config = create(name, num_classes=num_classes, image_size=image_size).config
        elif image_size is not None:
            config = resized_config(config, image_size)
    return MappingProxyType(dict(config))


def cost_at(name: str, image_size: int | None = None, num_classes: int = 1000) -> Cost:
    return cost_of(config_at(name, image_size, num_classes))


def cost_of(config: Mapping[str, Any]) -> Cost:
    """Counted on the meta device, which computes nothing."""
    return cost(build_meta(config))
