"""mixer info"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from mlp_mixer.cli.arguments import parse
from mlp_mixer.errors import printable
from mlp_mixer.files import to_json

DESCRIPTION = """What a variant of Table 1 costs, or what a weights file holds and costs.

example: mixer info B/16 --image-size 448"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    model: tyro.conf.Positional[str]
    """S/32, S/16, B/32, B/16, L/32, L/16, H/14, or a weights file."""
    image_size: int | None = None
    """Height and width in pixels; by default 224, or the file's."""
    num_classes: int | None = None
    """Of the head; by default 1000, or the file's."""
    json: bool = False
    """Print one JSON object."""


def run(args: Sequence[str]) -> None:
    chosen = parse(Arguments, args, verb="info", description=DESCRIPTION)
    from mlp_mixer.cost import cost
    from mlp_mixer.model import as_pair

    config, about = describe(chosen.model)
    given = {"image_size": chosen.image_size, "num_classes": chosen.num_classes}
    config |= {key: value for key, value in given.items() if value is not None}
    config |= {key: as_pair(config[key]) for key in ("image_size", "patch_size")}
    found = {"model": chosen.model, **asdict(cost(config)), **config, **about}
    if chosen.json:
        print(to_json(found))
        return
    print(
        f"{chosen.model} at {config['image_size'][0]} × {config['image_size'][1]} px, {config['num_classes']} classes"
    )
    print(f"  parameters         {found['parameters']:>15,}")
    print(f"  MACs an image      {found['macs']:>15,}   ({found['macs'] / 1e9:.3g} G; FLOPs are twice that)")
    print(
        f"  activations        {found['activation_bytes']:>15,}   bytes an image, kept for the backward pass, float32"
    )
    print("  " + ", ".join(f"{key} {config[key]}" for key in config if key not in ("image_size", "num_classes")))
    if about.get("classes"):
        print(f"  classes: {printable(', '.join(about['classes']))}")
    for key, value in about.get("provenance", {}).items():
        if key != "recipe":
            print(printable(f"  {key}: {value}"))


def describe(model: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of ``Mixer``, and what else is known of a weights file."""
    from mlp_mixer.variants import VARIANTS, resolve_variant
    from mlp_mixer.weights.load import load

    if Path(model).exists() or Path(model).suffix == ".safetensors":
        loaded = load(model)
        return dict(loaded.config), asdict(loaded.card)
    return {"num_classes": 1000, "image_size": 224} | VARIANTS[resolve_variant(model)], {}
