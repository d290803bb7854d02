"""BiT's ResNet-v2 (Kolesnikov et al. 2020, arXiv:1912.11370): pre-activation, weight standardization, GroupNorm."""

from functools import partial
from typing import Any

from torch import nn

from allmlp.errors import UserError
from allmlp.zoo.family import (
    REQUIRED,
    Family,
    check_counts,
    check_depths,
    check_stem,
    check_width,
    flattened,
    groups_for,
)

CHANNELS = (256, 512, 1024, 2048)
STEM_CHANNELS = 64
STRIDE = {"imagenet": 32, "small": 8}  # of the last map


def check(config: dict[str, Any]) -> dict[str, Any]:
    config = check_stem(check_width(check_depths(config, len(CHANNELS))))
    if config["groups"] is not None:
        config = check_counts(config, "groups")
        if uneven := [number for number in channels_of(config["width"]) if number % config["groups"]]:
            raise UserError(f"groups = {config['groups']}: must divide the {uneven[0]} channels of GroupNorm")
    stride, narrowest = STRIDE[config["stem"]], min(channels_of(config["width"]))
    if (
        narrowest == (config["groups"] or groups_for(channels_of(config["width"])))
        and max(config["image_size"]) <= stride
    ):
        height, width = config["image_size"]
        raise UserError(
            f"image size {height}×{width}: GroupNorm has one number in each of its groups then: use more than {stride} "
            "pixels, or a larger width"
        )
    return config


def channels_of(width: float) -> list[int]:
    """All numbers of channels that are normalized."""
    from timm.layers.helpers import make_divisible

    outputs = [make_divisible(channels * width) for channels in CHANNELS]
    return [make_divisible(STEM_CHANNELS * width), *outputs, *(make_divisible(channels * 0.25) for channels in outputs)]


def build(config: dict[str, Any]) -> nn.Module:
    from timm.layers.helpers import make_divisible
    from timm.layers.norm_act import GroupNormAct
    from timm.layers.std_conv import StdConv2d
    from timm.models.resnetv2 import ResNetV2

    width, conv = config["width"], partial(StdConv2d, eps=1e-8)
    stem_channels = make_divisible(STEM_CHANNELS * width)
    groups = config["groups"] or groups_for(channels_of(width))
    model = ResNetV2(
        layers=list(config["depths"]),
        channels=CHANNELS,
        width_factor=width,
        stem_chs=STEM_CHANNELS,
        num_classes=0,
        in_chans=config["in_channels"],
        stem_type="fixed",
        norm_layer=partial(GroupNormAct, num_groups=groups),
        conv_layer=conv,
        drop_path_rate=config["stochastic_depth"],
    )
    if config["stem"] == "small":
        model.stem = nn.Sequential()
        model.stem.add_module("conv", conv(config["in_channels"], stem_channels, kernel_size=3, stride=1))
    return model


BIT = Family(
    key="bit",
    title="BiT",
    sizes={
        "depths": REQUIRED,
        "width": 1,
        "stem": "imagenet",
        "groups": None,  # of GroupNorm; None: 32, or fewer where the channels of a narrow network need it
    },
    check=check,
    build=build,
    blocks=lambda backbone: flattened(
        stage.get_submodule("blocks").children() for stage in backbone.get_submodule("stages").children()
    ),
    timm_head="head.fc",
)
