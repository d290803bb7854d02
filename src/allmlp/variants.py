"""Table 1 of the paper by name."""

import difflib
import inspect
from typing import Any

from allmlp.errors import UserError
from allmlp.model import Mixer, Size

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


def create(variant: str | None = None, *, num_classes: int = 1000, image_size: Size = 224, **options: Any) -> Mixer:
    """Makes a Mixer with the authors' initial weights: (B, in_channels, H, W) → (B, num_classes).

    Args:
        variant: a name of Table 1 ("B/16"; case does not matter, "Mixer-B/16" is the same), or None for sizes of
            one's own: num_blocks, patch_size, hidden_dim, tokens_mlp_dim and channels_mlp_dim are then required.
        num_classes: 0 leaves out the head: the model then returns features (B, C).
        image_size: in pixels, one number or (height, width); a multiple of the patch size.
        options: any other argument of ``Mixer``; those of Table 1 override the variant's.

    Raises:
        UserError: an unknown variant or option (with the nearest names), a missing or impossible size.
    """
    sizes: dict[str, Any] = dict(VARIANTS[resolve_variant(variant)]) if variant is not None else {}
    settings = sizes | {key: value for key, value in options.items() if value is not None}
    known = inspect.signature(Mixer).parameters
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), 3)
            raise UserError(f"unknown option {key!r} of a Mixer: the nearest are {', '.join(near or sorted(known))}")
    missing = [key for key in VARIANTS["B/16"] if key not in settings]
    if missing:
        raise UserError(f"no variant is named and {', '.join(missing)} missing: give them, or a name such as 'B/16'")
    return Mixer(num_classes=num_classes, image_size=image_size, **settings)


def resolve_variant(name: str) -> str:
    """The name as Table 1 writes it, from any case and with or without "Mixer-"; a UserError for an unknown one."""
    short = name.upper().removeprefix("MIXER").lstrip("-_ ").replace("_", "/")
    if short in VARIANTS:
        return short
    near = difflib.get_close_matches(short, VARIANTS, 3, cutoff=0.3)
    hint = f"; the nearest: {', '.join(near)}" if near else ""
    raise UserError(f"unknown variant {name!r}{hint}; there are {', '.join(VARIANTS)}")
