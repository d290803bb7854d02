"""BiT's ResNet-v2 (Kolesnikov et al. 2020, arXiv:1912.11370): pre-activation, weight standardization, GroupNorm."""

from functools import partial
from typing import Any

from torch import nn

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


def check(config: dict[str, Any]) -> dict[str, Any]:
    config = check_stem(check_width(check_depths(config, len(CHANNELS))))
    return config if config["groups"] is None else check_counts(config, "groups")


def build(config: dict[str, Any]) -> nn.Module:
    from timm.layers.helpers import make_divisible
    from timm.layers.norm_act import GroupNormAct
    from timm.layers.std_conv import StdConv2d
    from timm.models.resnetv2 import ResNetV2

    width, conv = config["width"], partial(StdConv2d, eps=1e-8)
    outputs = [make_divisible(channels * width) for channels in CHANNELS]
    stem_channels = make_divisible(STEM_CHANNELS * width)
    widths = [stem_channels, *outputs, *(make_divisible(channels * 0.25) for channels in outputs)]
    groups = config["groups"] or groups_for(widths)
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
