"""Residual networks with attention in place of some 3 × 3 convolutions, from timm's configurable ByobNet.

HaloNet (Vaswani et al. 2021, arXiv:2103.12731) attends within blocks of the feature map and a halo around them, in
its last two stages here ("Conv-12"). BoTNet (Srinivas et al. 2021, arXiv:2101.11605) attends to the whole map, in its
last stage.
"""

from typing import Any

from torch import nn

from allmlp.errors import UserError
from allmlp.zoo.family import (
    REQUIRED,
    Family,
    check_counts,
    check_depths,
    check_multiple,
    check_stem,
    check_width,
    flattened,
)

STAGES = 4
STEM_STRIDE = {"imagenet": 4, "small": 1}
STEM_CHANNELS = 64


def check_heads(channels: float, heads: int) -> None:
    if channels % heads:
        raise UserError(f"num_heads = {heads}: must divide the {channels:g} channels of the first attention block")


def check_halonet(config: dict[str, Any]) -> dict[str, Any]:
    """Completes ``block_size``: 12 where that divides the last feature map, else the largest divisor below."""
    config = check_counts(check_stem(check_width(check_depths(config, STAGES))), "halo_size", "num_heads", "expansion")
    check_heads(64 * 4 * config["width"], config["num_heads"])
    stride = STEM_STRIDE[config["stem"]] * 2 ** (STAGES - 1)
    check_multiple("HaloNet", config["image_size"], stride, "")
    last_map = [side // stride for side in config["image_size"]]
    if config["block_size"] is None:
        config["block_size"] = max(n for n in range(1, 13) if all(side % n == 0 for side in last_map))
    config = check_counts(config, "block_size")
    check_multiple(
        f"HaloNet with blocks of {config['block_size']}",
        config["image_size"],
        stride * config["block_size"],
        ", or another block_size",
    )
    return config


def build_halonet(config: dict[str, Any]) -> nn.Module:
    attention = {key: config[key] for key in ("block_size", "halo_size", "num_heads")}
    stages = [
        {
            "type": "bottle" if i < 2 else "self_attn",
            "d": depth,
            "c": round(64 * config["width"] * config["expansion"]) * 2**i,
            "s": 1 if i == 0 else 2,
            "br": 1 / config["expansion"],
            "self_attn_kwargs": attention,
        }
        for i, depth in enumerate(config["depths"])
    ]
    return build_byobnet(config, stages, num_features=config["num_features"], self_attn_layer="halo")


def check_botnet(config: dict[str, Any]) -> dict[str, Any]:
    config = check_counts(check_stem(check_width(check_depths(config, STAGES))), "num_heads")
    check_heads(512 * config["width"], config["num_heads"])
    check_multiple("BoTNet", config["image_size"], STEM_STRIDE[config["stem"]] * 4, "")
    return config


def build_botnet(config: dict[str, Any]) -> nn.Module:
    """Squeeze-and-excitation on the outputs of the convolutional blocks; the last stage keeps the resolution."""
    stages: list[dict[str, Any]] = [
        {"type": "bottle", "d": depth, "c": round(256 * config["width"]) * 2**i, "s": 1 if i == 0 else 2, "br": 0.25,
         "block_kwargs": {"attn_last": True}}
        for i, depth in enumerate(config["depths"])
    ]  # fmt: skip
    heads = {"num_heads": config["num_heads"]}
    stages[-1] |= {"type": "self_attn", "s": 1, "block_kwargs": {}, "self_attn_kwargs": heads}
    options = {"attn_layer": "se", "attn_kwargs": {"rd_ratio": 1 / 16}}
    return build_byobnet(config, stages, self_attn_layer="bottleneck", fixed_input_size=True, **options)


def build_byobnet(config: dict[str, Any], stages: list[dict[str, Any]], **options: Any) -> nn.Module:
    from timm.layers.conv_bn_act import ConvNormAct
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

    stem_channels = round(STEM_CHANNELS * min(config["width"], 1))
    sizes = ByoModelCfg(
        blocks=tuple(ByoBlockCfg(gs=0, **stage) for stage in stages),
        stem_chs=stem_channels,
        stem_type="7x7",
        stem_pool="maxpool",
        act_layer="silu",
        **options,
    )
    # ByobNet derives the size of the last map from that of the image, for a stem of stride 4
    factor = STEM_STRIDE["imagenet"] // STEM_STRIDE[config["stem"]]
    height, width = config["image_size"]
    model = ByobNet(
        sizes,
        num_classes=0,
        in_chans=config["in_channels"],
        img_size=(height * factor, width * factor) if sizes.fixed_input_size else None,
        drop_path_rate=config["stochastic_depth"],
    )
    if config["stem"] == "small":
        model.stem = ConvNormAct(config["in_channels"], stem_channels, 3, act_layer=nn.SiLU)
    return model


def byobnet_blocks(backbone: nn.Module) -> list[nn.Module]:
    return flattened(stage.children() for stage in backbone.get_submodule("stages").children())


HALONET = Family(
    key="halonet",
    title="HaloNet",
    sizes={
        "depths": REQUIRED,
        "width": 1,  # of 64 channels in the first stage
        "expansion": 3,  # output channels of a block over those inside it (the paper's r_b)
        "block_size": None,
        "halo_size": 2,
        "num_heads": 8,
        "num_features": 1280,
        "stem": "imagenet",
    },
    check=check_halonet,
    build=build_halonet,
    blocks=byobnet_blocks,
    timm_head="head.fc",
)
BOTNET = Family(
    key="botnet",
    title="BoTNet",
    sizes={"depths": REQUIRED, "width": 1, "num_heads": 4, "stem": "imagenet"},
    check=check_botnet,
    build=build_botnet,
    blocks=byobnet_blocks,
    timm_head="head.fc",
)
