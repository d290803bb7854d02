"""Comparison systems in timm's state dicts: the family and its sizes from names and shapes, and the names to ours."""

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from allmlp.errors import UserError
from allmlp.sizes import Size, as_pair
from allmlp.weights.layouts import infer_image_size
from allmlp.zoo.families import FAMILIES

log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
MARKS = {  # a name that only this family's state dicts have
    "vit": "blocks.0.attn.qkv.weight",
    "bit": "stages.0.blocks.0.conv1.weight",
    "nfnet": "stages.0.0.skipinit_gain",
    "efficientnet": "blocks.0.0.conv_dw.weight",
}
COUNTER = ".num_batches_tracked"  # of BatchNorm: not used
VIT_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}  # by hidden width, as published
WIDTHS = (1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 4.3, 5.0, 0.25, 0.5, 0.75, 1.5, 2.5, 3.0, 3.5, 4.0)


def detect_family(shapes: Shapes) -> str | None:
    """The key of the family with these names in timm; None for others."""
    if "stem.conv1.gain" in shapes and MARKS["nfnet"] not in shapes:  # NF-ResNets and the like
        return None
    return next((key for key, mark in MARKS.items() if mark in shapes), None)


def infer_system(
    family: str, shapes: Shapes, image_size: Size | None, timm_config: Mapping[str, Any], file_name: str
) -> dict[str, Any]:
    """The configuration of the system whose tensors have these names and shapes in timm.

    Args:
        family: as ``detect_family`` found.
        shapes: names and shapes in the file.
        image_size: that of training, where it is known otherwise; None: that of the position embeddings, or 224.
        timm_config: timm's config.json, which says what shapes cannot; empty if there is none.
        file_name: named in messages.

    Raises:
        UserError: a tensor that determines a size is missing, or the sizes are those of no network of the family.
    """
    if family == "efficientnet":
        check_padding(timm_config.get("architecture"), file_name)
    arguments = timm_config.get("model_args")
    infer = {"vit": infer_vit, "bit": infer_bit, "nfnet": infer_nfnet, "efficientnet": infer_efficientnet}[family]
    try:
        sizes = infer(shapes, image_size, file_name)
        if family == "vit":
            sizes["num_heads"] = heads_of(
                sizes["hidden_dim"], arguments if isinstance(arguments, dict) else {}, file_name
            )
    except (KeyError, IndexError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        title = FAMILIES[family].title
        raise UserError(
            f"{file_name} looks like {title} in timm's layout, but lacks or changes {error}: save the whole state dict"
        ) from None
    head = shapes.get(f"{FAMILIES[family].timm_head}.weight", ())
    return {
        "system": family,
        "num_classes": head[0] if head else 0,
        "dropout": 0.0,
        "stochastic_depth": 0.0,
        "rescale": False,
        "image_size": as_pair(image_size or 224),
        **sizes,
    }


def infer_vit(shapes: Shapes, image_size: Size | None, file_name: str) -> dict[str, Any]:
    hidden, channels, patch, _ = shapes["patch_embed.proj.weight"]
    blocks = count(shapes, r"blocks\.(\d+)\.", "blocks")
    positions = shapes["pos_embed"][1]
    other_tokens = "cls_token" not in shapes or not {"dist_token", "reg_token"}.isdisjoint(shapes)
    if other_tokens or (image_size is None and math.isqrt(positions - 1) ** 2 != positions - 1):
        raise UserError(
            f"{file_name} is a ViT with {positions} position embeddings that are not of one class token and a grid of "
            "patches: only ViTs with one class token can be loaded"
        )
    return {
        "image_size": infer_image_size(shapes["pos_embed"][1] - 1, (patch, patch), image_size, file_name),
        "in_channels": channels,
        "patch_size": patch,
        "num_blocks": blocks,
        "hidden_dim": hidden,
        "channels_mlp_dim": shapes["blocks.0.mlp.fc1.weight"][0],
        "gelu": "erf",
    }


def heads_of(hidden_dim: int, arguments: Mapping[str, Any], file_name: str) -> int:
    """The attention heads of a ViT, which its shapes do not tell: from timm's config.json, else those usual."""
    heads = arguments.get("num_heads")
    if isinstance(heads, int) and heads > 0:
        return heads
    usual = VIT_HEADS.get(hidden_dim)
    heads = usual or max(n for n in range(1, max(hidden_dim // 64, 1) + 1) if hidden_dim % n == 0)
    if usual is None:
        log.warning(
            "%s does not say its number of attention heads: %d are assumed; if there are others, write them into a "
            'config.json beside it: {"model_args": {"num_heads": N}}',
            file_name, heads,
        )  # fmt: skip
    return heads


def check_padding(architecture: Any, file_name: str) -> None:
    """TensorFlow's EfficientNets pad and normalize unlike PyTorch's of the same shapes.

    Raises:
        UserError: config.json names one that is not TensorFlow's.
    """
    if isinstance(architecture, str) and not architecture.startswith("tf_"):
        raise UserError(
            f"{file_name} is {architecture}, whose padding is not that of TensorFlow's EfficientNets, and only those "
            f"can be loaded: give tf_{architecture} if there is one"
        )
    if architecture is None:
        log.warning(
            "%s is taken as one of TensorFlow's EfficientNets (timm's tf_efficientnet_…): others have the same shapes, "
            "but another padding, and would give wrong outputs",
            file_name,
        )


def infer_bit(shapes: Shapes, image_size: Size | None, file_name: str) -> dict[str, Any]:
    _, channels, kernel, _ = shapes["stem.conv.weight"]
    return {
        "in_channels": channels,
        "depths": stage_depths(shapes, r"stages\.{i}\.blocks\.(\d+)\.", 4),
        "width": shapes["norm.weight"][0] / 2048,
        "stem": "imagenet" if kernel == 7 else "small",
    }


def infer_nfnet(shapes: Shapes, image_size: Size | None, file_name: str) -> dict[str, Any]:
    return {
        "in_channels": shapes["stem.conv1.weight"][1],
        "depths": stage_depths(shapes, r"stages\.{i}\.(\d+)\.", 4),
        "channels": tuple(shapes[f"stages.{i}.0.conv3.weight"][0] for i in range(4)),
        "num_features": shapes["final_conv.weight"][0],
        "stem_channels": shapes["stem.conv4.weight"][0],
        "group_size": shapes["stages.0.0.conv2.weight"][1],
    }


def infer_efficientnet(shapes: Shapes, image_size: Size | None, file_name: str) -> dict[str, Any]:
    from timm.models._efficientnet_builder import round_channels

    stem, channels, *_ = shapes["conv_stem.weight"]
    depths = stage_depths(shapes, r"blocks\.{i}\.(\d+)\.", 7)
    last = shapes[f"blocks.6.{depths[6] - 1}.conv_pwl.weight"][0]
    fits = [w for w in WIDTHS if (round_channels(32, w), round_channels(320, w)) == (stem, last)]
    if not fits:
        raise UserError(
            f"{file_name} is an EfficientNet with {stem} channels in its stem and {last} in its last stage, which is "
            "no width that is known here: give weights of B0 to B8 or L2"
        )
    return {
        "in_channels": channels,
        "depths": depths,
        "width": fits[0],
        "last_conv": "conv_head.weight" in shapes,
    }


def stage_depths(shapes: Shapes, pattern: str, stages: int) -> tuple[int, ...]:
    return tuple(count(shapes, pattern.replace("{i}", str(i)), f"the blocks of stage {i}") for i in range(stages))


def count(shapes: Shapes, pattern: str, what: str) -> int:
    """How many there are, by the number in the first group of the pattern; a ValueError if one is missing."""
    numbers = {int(match[1]) for match in (re.match(pattern, name) for name in shapes) if match and len(match[1]) < 6}
    if not numbers or max(numbers) + 1 != len(numbers):
        raise ValueError(what)
    return len(numbers)


def native_names(family: str, shapes: Shapes) -> dict[str, str]:
    """timm's name of each tensor → its name in ``ZooModel``, without the counters of BatchNorm."""
    head = FAMILIES[family].timm_head + "."
    return {
        name: f"head.{name.removeprefix(head)}" if name.startswith(head) else f"backbone.{name}"
        for name in shapes
        if not name.endswith(COUNTER)
    }


def native_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in ``ZooModel``: the head, a 1 × 1 convolution in BiT, is a dense layer."""
    return shape[:2] if name == "head.weight" and math.prod(shape[2:]) == 1 else shape


def to_native(name: str, tensor: Tensor) -> Tensor:
    return tensor.reshape(native_shape(name, tuple(tensor.shape)))


def from_native(family: str, name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """The name and tensor in timm's state dict."""
    conv = family == "bit" and name == "head.weight"
    return timm_name(family, name), tensor[..., None, None] if conv else tensor


def timm_name(family: str, name: str) -> str:
    if name.startswith("head."):
        return f"{FAMILIES[family].timm_head}.{name[5:]}"
    return name.removeprefix("backbone.")
