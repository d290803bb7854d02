"""Small forms of every family, for tests: arguments of ``create`` for images of 32 pixels."""

from typing import Any

SMALL: dict[str, dict[str, Any]] = {
    "vit": {"patch_size": 8, "num_blocks": 2, "hidden_dim": 128, "num_heads": 2, "channels_mlp_dim": 192},
    "bit": {"depths": (1, 2, 1, 1), "width": 0.25, "stem": "small"},
    "nfnet": {"depths": (1, 1, 2, 1), "width": 0.125, "stem": "small", "num_features": 256, "stem_channels": 64},
    "efficientnet": {"depths": (1, 1, 1, 1, 1, 2, 1), "width": 0.25, "stem": "small"},
    "halonet": {"depths": (1, 1, 2, 1), "width": 0.25, "num_heads": 2, "num_features": 64, "stem": "small"},
    "botnet": {"depths": (1, 1, 1, 2), "width": 0.25, "num_heads": 2, "stem": "small"},
}
