"""Table 1 of the paper by name."""

from collections.abc import Mapping
from typing import Any

# Tolstikhin et al. 2021, Table 1: layers, patch size, C, D_S, D_C
VARIANTS: dict[str, dict[str, int]] = {
    name: dict(
        zip(("num_blocks", "patch_size", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim"), sizes, strict=True)
    )
    for name, sizes in {
        "S/32": (8, 32, 512, 256, 2048),
        "S/16": (8, 16, 512, 256, 2048),
        "B/32": (12, 32, 768, 384, 3072),
        "B/16": (12, 16, 768, 384, 3072),
        "L/32": (24, 32, 1024, 512, 4096),
        "L/16": (24, 16, 1024, 512, 4096),
        "H/14": (32, 14, 1280, 640, 5120),
    }.items()
}

# parameters with a head of 1000 classes, and multiply-accumulates per image of 224 px; a test counts them
COSTS = {
    "S/32": (19_104_624, 1_002_426_368),
    "S/16": (18_528_264, 3_776_958_464),
    "B/32": (60_293_428, 3_237_722_112),
    "B/16": (59_880_472, 12_601_767_936),
    "L/32": (206_939_264, 11_253_293_056),
    "L/16": (208_196_168, 44_547_678_208),
    "H/14": (432_350_952, 120_989_911_040),
}


def variant_of(config: Mapping[str, Any]) -> str | None:
    """The name of these sizes in Table 1, or "S/8" (which GSAM published); None for other sizes."""
    (height, width), patch = config["image_size"], config["patch_size"]
    for name, sizes in (VARIANTS | {"S/8": VARIANTS["S/16"] | {"patch_size": 8}}).items():
        same = all(config[key] == value for key, value in sizes.items() if key != "patch_size")
        if same and patch == (sizes["patch_size"],) * 2 and height == width:
            return name
    return None
