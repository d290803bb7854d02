"""Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929): timm's class, the authors' initial weights."""

from functools import partial
from typing import Any

from torch import nn

from allmlp.errors import UserError
from allmlp.sizes import check_form
from allmlp.zoo.family import REQUIRED, Family, check_counts, check_multiple


def check(config: dict[str, Any]) -> dict[str, Any]:
    config = check_counts(config, "patch_size", "num_blocks", "hidden_dim", "num_heads", "channels_mlp_dim")
    if config["hidden_dim"] % config["num_heads"]:
        heads = [n for n in range(1, config["hidden_dim"] + 1) if config["hidden_dim"] % n == 0]
        near = sorted(sorted(heads, key=lambda n: abs(n - config["num_heads"]))[:3])
        raise UserError(
            f"num_heads = {config['num_heads']}: must divide hidden_dim, {config['hidden_dim']}; the nearest: "
            f"{', '.join(map(str, near))}"
        )
    check_form(config["gelu"], 1e-6)
    check_multiple("this ViT", config["image_size"], config["patch_size"], ", or another patch size")
    return config


def build(config: dict[str, Any]) -> nn.Module:
    """Dropout acts where the authors have it: after the position embeddings, attention's projection, dense layers."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=config["image_size"],
        patch_size=config["patch_size"],
        in_chans=config["in_channels"],
        num_classes=0,
        embed_dim=config["hidden_dim"],
        depth=config["num_blocks"],
        num_heads=config["num_heads"],
        mlp_ratio=config["channels_mlp_dim"] / config["hidden_dim"],
        act_layer=partial(nn.GELU, approximate="tanh" if config["gelu"] == "tanh" else "none"),
        pos_drop_rate=config["dropout"],
        proj_drop_rate=config["dropout"],
        drop_path_rate=config["stochastic_depth"],
        weight_init="jax",
    )


VIT = Family(
    key="vit",
    title="ViT",
    sizes={
        "patch_size": REQUIRED,
        "num_blocks": REQUIRED,
        "hidden_dim": REQUIRED,
        "num_heads": REQUIRED,
        "channels_mlp_dim": REQUIRED,
        "gelu": "tanh",  # as flax computes it; timm's weights have "erf"
    },
    check=check,
    build=build,
    blocks=lambda backbone: list(backbone.get_submodule("blocks").children()),
    timm_head="head",
    head_dropout=False,
)
