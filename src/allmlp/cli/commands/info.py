"""mixer info"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from allmlp.api.recipe import height_and_width
from allmlp.cli.arguments import parse
from allmlp.cli.costs import compare_costs, print_comparison
from allmlp.cli.docstrings import help_from_docstrings
from allmlp.errors import UserError, printable
from allmlp.files import to_json

if TYPE_CHECKING:
    from allmlp.model import Mixer

DESCRIPTION = """Prints what a variant of Table 1 costs, or what weights contain and cost, and what a resize would add.

example: mixer info Mixer-B_16.npz --image-size 448"""


@dataclass(frozen=True, kw_only=True)
@help_from_docstrings
class Arguments:
    model: tyro.conf.Positional[str]
    """S/32, S/16, B/32, B/16, L/32, L/16, H/14, a weights file, or hf-hub:OWNER/NAME."""
    image_size: tuple[int, ...] = ()
    """In pixels, one number, or height and width; by default 224, or that of the weights, which are resized."""
    num_classes: int | None = None
    """Number of classes of a variant's head; by default 1000."""
    json: bool = False
    """Print one JSON object."""


def run(args: Sequence[str]) -> None:
    arguments = parse(Arguments, args, command="info", description=DESCRIPTION)
    from allmlp.factory import build_meta
    from allmlp.flops import cost
    from allmlp.resolution import resized_config

    model = load_weights(arguments.model)
    before = dict(model.config) if model else variant_config(arguments.model)
    if arguments.num_classes is not None and model:
        raise UserError(f"--num-classes {arguments.num_classes}: {arguments.model} has its own head: leave it out")
    if arguments.num_classes is not None:
        before["num_classes"] = arguments.num_classes
    after = resized_config(before, height_and_width(arguments.image_size)) if arguments.image_size else before
    # a variant is created at this size, and so keeps Table 1's D_S; weights are resized
    config = after if model else before | {"image_size": after["image_size"]}
    found: dict[str, Any] = {"model": arguments.model, **asdict(cost(build_meta(config))), **config}
    found |= {"variant": model and variant_name(model), **(describe_weights(model) if model else {})}
    if after["image_size"] != before["image_size"]:
        found["resize"] = compare_costs(before, after)
    if arguments.json:
        print(to_json(found))
    else:
        print_info(found, config)


def load_weights(name: str) -> "Mixer | None":
    """The model in a weights file or on the hub; None if this is the name of a variant."""
    from allmlp.weights.load import load

    endings = (".safetensors", ".npz", ".pt", ".pth", ".bin")
    is_file = Path(name).exists() or Path(name).suffix in endings or name.startswith("hf-hub:")
    return load(name) if is_file else None


def variant_config(name: str) -> dict[str, Any]:
    """The arguments of ``Mixer`` for a variant of Table 1, as the paper pre-trains it."""
    import torch

    from allmlp.factory import create

    with torch.device("meta"):
        return dict(create(name).config)


def variant_name(model: "Mixer") -> str | None:
    from allmlp.weights.published import variant_of

    return variant_of(model.config)


def describe_weights(model: "Mixer") -> dict[str, Any]:
    """The metadata of the weights, whether their head is all zero, and the published files that they may be."""
    from allmlp.weights.published import candidates

    source = model.metadata.provenance.get("source")
    source = source if isinstance(source, dict) else {}
    published_as, publisher = source.get("known_as"), source.get("publisher")
    possible = candidates(model.config, authors=publisher == "authors") if publisher else []
    named = [asdict(one) for one in possible if published_as in (None, one.file)]
    head_is_zero = not model.get_parameter("head.weight").any().item() if model.config["num_classes"] else None
    return {**asdict(model.metadata), "head_is_zero": head_is_zero, "may_be": named}


def print_info(found: dict[str, Any], config: dict[str, Any]) -> None:
    height, width = config["image_size"]
    variant = f" (Mixer-{found['variant']})" if found.get("variant") else ""
    print(f"{printable(found['model'])}{variant} at {height} × {width} px, {config['num_classes']} classes")
    print(f"  parameters         {found['parameters']:>15,}")
    print(f"  MACs per image     {found['macs']:>15,}   ({found['macs'] / 1e9:.3g} G; FLOPs are twice that)")
    activations = f"{found['activation_bytes']:>15,}   bytes per image, stored for the backward pass, float32"
    print(f"  activations        {activations}")
    print("  " + ", ".join(f"{key} {config[key]}" for key in config if key not in ("image_size", "num_classes")))
    if "resize" in found:
        print_comparison(found["resize"])
    if found.get("head_is_zero"):
        print("  the head is all zero: these weights give features, not classes")
    if found.get("classes"):
        names = found["classes"]
        print(f"  classes: {printable(', '.join(names[:10]))}{f' … ({len(names):,})' if len(names) > 10 else ''}")
    for key, value in found.get("provenance", {}).items():
        if key != "recipe":
            print(printable(f"  {key}: {value}"))
    for one in found.get("may_be", []):
        top1 = f", ImageNet top-1 {one['top1']:.2%}" if one["top1"] else ""
        note = f"; {one['note']}" if one["note"] else ""
        print(f"  may be {one['file']}: {one['data']}, {one['image_size']} px{top1} ({one['source']}{note})")
