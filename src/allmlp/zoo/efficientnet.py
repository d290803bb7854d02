"""EfficientNet (Tan & Le 2019, arXiv:1905.11946) at any width and depth, with TensorFlow's padding and BatchNorm."""

from functools import partial
from typing import Any

from torch import nn

from allmlp.errors import UserError
from allmlp.zoo.family import REQUIRED, Family, check_depths, check_stem, check_width, flattened, set_stride

# B0's stages: block, kernel, stride, expansion, channels
STAGES = (
    ("ds", 3, 1, 1, 16),
    ("ir", 3, 2, 6, 24),
    ("ir", 5, 2, 6, 40),
    ("ir", 3, 2, 6, 80),
    ("ir", 5, 1, 6, 112),
    ("ir", 5, 2, 6, 192),
    ("ir", 3, 1, 6, 320),
)
STEM_CHANNELS, FEATURES = 32, 1280


def check(config: dict[str, Any]) -> dict[str, Any]:
    if config["last_conv"] not in (True, False):
        raise UserError(f"last_conv = {config['last_conv']!r}: must be True or False")
    return check_stem(check_width(check_depths(config, len(STAGES))))


def build(config: dict[str, Any]) -> nn.Module:
    from timm.models._efficientnet_builder import decode_arch_def, round_channels
    from timm.models.efficientnet import EfficientNet

    stages = [
        [f"{kind}_r{depth}_k{kernel}_s{stride}_e{expansion}_c{channels}_se0.25"]
        for (kind, kernel, stride, expansion, channels), depth in zip(STAGES, config["depths"], strict=True)
    ]
    rounded = partial(round_channels, multiplier=config["width"], divisor=8)
    model = EfficientNet(
        decode_arch_def(stages),
        num_classes=0,
        num_features=rounded(FEATURES) if config["last_conv"] else 0,
        in_chans=config["in_channels"],
        stem_size=STEM_CHANNELS,
        round_chs_fn=rounded,
        pad_type="same",
        act_layer=nn.SiLU,
        norm_layer=partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01),
        drop_path_rate=config["stochastic_depth"],
    )
    if config["stem"] == "small":
        set_stride(model, "conv_stem")
    return model


EFFICIENTNET = Family(
    key="efficientnet",
    title="EfficientNet",
    sizes={
        "depths": REQUIRED,
        "width": 1,
        "last_conv": True,  # the 1 × 1 convolution before the mean over positions
        "stem": "imagenet",
    },
    check=check,
    build=build,
    blocks=lambda backbone: flattened(stage.children() for stage in backbone.get_submodule("blocks").children()),
    timm_head="classifier",
)
