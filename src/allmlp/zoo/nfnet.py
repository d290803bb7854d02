"""NFNet (Brock et al. 2021, arXiv:2102.06171): normalizer-free residual network."""

import math
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
    set_stride,
)

STAGES, GROUP_SIZE = 4, 128


def check(config: dict[str, Any]) -> dict[str, Any]:
    config = check_counts(check_stem(check_width(check_depths(config, STAGES))), "num_features", "stem_channels")
    channels = check_depths({"depths": config["channels"]}, STAGES)["depths"]
    narrowest = min(channels) * config["width"] / 2
    if config["group_size"] is None:
        config["group_size"] = min(GROUP_SIZE, 2 ** int(math.log2(max(narrowest, 1))))
    config = check_counts(config, "group_size")
    if config["group_size"] > narrowest:
        raise UserError(
            f"group_size = {config['group_size']}: the narrowest convolution has {narrowest:g} channels: give a group "
            "size of at most that, or a larger width"
        )
    return config | {"channels": channels}


def build(config: dict[str, Any]) -> nn.Module:
    from timm.models.nfnet import NfCfg, NormFreeNet

    sizes = NfCfg(
        depths=config["depths"],
        channels=config["channels"],
        alpha=0.2,
        stem_type="deep_quad",
        stem_chs=config["stem_channels"],
        group_size=config["group_size"],
        attn_layer="se",
        attn_kwargs={"rd_ratio": 0.5},
        attn_gain=2.0,
        width_factor=config["width"],
        bottle_ratio=0.5,
        num_features=config["num_features"],
        extra_conv=True,
        gamma_in_act=True,
        same_padding=True,
        skipinit=True,
        act_layer="gelu",
    )
    model = NormFreeNet(sizes, num_classes=0, in_chans=config["in_channels"], drop_path_rate=config["stochastic_depth"])
    if config["stem"] == "small":
        for name in ("conv1", "conv4"):
            set_stride(model.stem, name)
    return model


NFNET = Family(
    key="nfnet",
    title="NFNet",
    sizes={
        "depths": REQUIRED,
        "channels": (256, 512, 1536, 1536),
        "num_features": 3072,
        "stem_channels": 128,
        "group_size": None,  # 128, or less where a narrow network needs it
        "width": 1,
        "stem": "imagenet",
    },
    check=check,
    build=build,
    blocks=lambda backbone: flattened(stage.children() for stage in backbone.get_submodule("stages").children()),
    timm_head="head.fc",
)
