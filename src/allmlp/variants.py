"""Table 1 of the paper by name."""

import difflib

from allmlp.errors import UserError, brief

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


def resolve_variant(name: str) -> str:
    """The name as in Table 1, from any case and with or without "Mixer-"; a UserError for an unknown one."""
    if not isinstance(name, str):
        raise UserError(f"variant {brief(name)}: give one of {', '.join(VARIANTS)}")
    short = name.upper().removeprefix("MIXER").lstrip("-_ ").replace("_", "/")
    if short in VARIANTS:
        return short
    near = difflib.get_close_matches(short, VARIANTS, 3, cutoff=0.3)
    hint = f"; the nearest: {', '.join(near)}" if near else ""
    raise UserError(f"unknown variant {name!r}{hint}; valid names are {', '.join(VARIANTS)}")
