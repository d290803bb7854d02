"""The architectures of the tables: by name at an image size, and their costs."""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import torch

from allmlp.factory import build_meta, create, resized_config, resolve_name
from allmlp.flops import Cost, cost
from allmlp.zoo.systems import SYSTEMS


@cache
def system_at(name: str, image_size: int | None = None, num_classes: int = 1000) -> tuple[Mapping[str, Any], Cost]:
    """The configuration of a model by name for an image size in pixels, None: its own; and its cost.

    A Mixer is resized from 224, which widens token mixing as fine-tuning does (Supplement C).

    Raises:
        UserError: an unknown name, a size that the model cannot take, or timm is missing.
    """
    is_zoo = resolve_name(name) in SYSTEMS
    with torch.device("meta"):
        model = create(name, num_classes=num_classes, image_size=image_size if is_zoo else None)
    if image_size is not None and not is_zoo:
        model = build_meta(resized_config(model.config, image_size))
    return MappingProxyType(dict(model.config)), cost(model)


def config_at(name: str, image_size: int | None = None) -> Mapping[str, Any]:
    return system_at(name, image_size)[0]


def cost_at(name: str, image_size: int | None = None, num_classes: int = 1000) -> Cost:
    return system_at(name, image_size, num_classes)[1]
