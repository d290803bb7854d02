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
    from allmlp.factory import Model

DESCRIPTION = """Prints what a model costs, or what weights contain and cost, and what a resize would add.

example: mixer info Mixer-B_16.npz --image-size 448"""


@dataclass(frozen=True, kw_only=True)
@help_from_docstrings
class Arguments:
    model: tyro.conf.Positional[str]
    """S/32, S/16, B/32, B/16, L/32, L/16, H/14, a comparison system (ViT-B/16, BiT-R50x1, …), a weights file, or
    hf-hub:OWNER/NAME."""
    image_size: tuple[int, ...] = ()
    """In pixels, one number, or height and width; by default that of the name, or of the weights, which are resized."""
    num_classes: int | None = None
    """Number of classes of the head of a model by name; by default 1000."""
    json: bool = False
    """Print one JSON object."""


def run(args: Sequence[str]) -> None:
    arguments = parse(Arguments, args, command="info", description=DESCRIPTION)
    from allmlp.factory import build_meta, is_zoo, resized_config
    from allmlp.flops import cost

    model = load_weights(arguments.model)
    size = height_and_width(arguments.image_size) if arguments.image_size else None
    if arguments.num_classes is not None and model:
        raise UserError(f"--num-classes {arguments.num_classes}: {arguments.model} has its own head: leave it out")
    before = dict(model.config) if model else config_by_name(arguments.model, None, arguments.num_classes)
    config = before
    if size is not None:  # a name is created at this size, and so keeps Table 1's D_S; weights are resized
        config = resized_config(before, size) if model else config_by_name(arguments.model, size, arguments.num_classes)
    found: dict[str, Any] = {"model": arguments.model, **asdict(cost(build_meta(config))), **config}
    found |= {"variant": model and variant_name(model), **(describe_weights(model) if model else {})}
    # weights of a system are resized; a system by name is made anew at that size
    if config["image_size"] != before["image_size"] and (model or not is_zoo(config)):
        found["resize"] = compare_costs(before, resized_config(before, config["image_size"]))
    if not model and (note := system_note(arguments.model)):
        found["note"] = note
    if arguments.json:
        print(to_json(found))
    else:
        print_info(found, config)


def load_weights(name: str) -> "Model | None":
    """The model in a weights file or on the hub; None if this is the name of a variant or comparison system."""
    from allmlp.weights.load import load
    from allmlp.weights.named import NAMED

    endings = (".safetensors", ".npz", ".pt", ".pth", ".bin")
    is_file = Path(name).exists() or Path(name).suffix in endings or name.startswith("hf-hub:")
    return load(name) if is_file or name.lower() in NAMED else None


def config_by_name(name: str, image_size: tuple[int, int] | None, num_classes: int | None) -> dict[str, Any]:
    """The configuration of a variant of Table 1 or a comparison system, as it is created."""
    import torch

    from allmlp.factory import create, resolve_name
    from allmlp.weights.named import like_published

    try:
        resolve_name(name)
    except UserError as error:
        near = like_published(name)
        raise UserError(f"{error}; published weights: {', '.join(near)}" if near else str(error)) from None
    with torch.device("meta"):
        model = create(name, image_size=image_size, num_classes=1000 if num_classes is None else num_classes)
    return dict(model.config)


def variant_name(model: "Model") -> str | None:
    """A name as in Table 1 ("B/16"), or of a comparison system; None for other sizes."""
    from allmlp.factory import name_of

    name = name_of(model.config)
    return name and name.removeprefix("Mixer-")


def system_note(name: str) -> str:
    """Where a comparison system comes from, and what the literature leaves open about it; "" for a Mixer."""
    from allmlp.factory import resolve_name
    from allmlp.zoo.systems import SYSTEMS

    system = SYSTEMS.get(resolve_name(name))
    return "; ".join(filter(None, (system.source, system.note))) if system else ""


def describe_weights(model: "Model") -> dict[str, Any]:
    """The metadata of the weights, whether their head is all zero, and the published files that they may be."""
    from allmlp.factory import is_zoo
    from allmlp.weights.published import candidates

    source = model.metadata.provenance.get("source")
    source = source if isinstance(source, dict) else {}
    published_as, publisher = source.get("known_as"), source.get("publisher")
    known = publisher and not is_zoo(model.config)
    possible = candidates(model.config, authors=publisher == "authors") if known else []
    named = [asdict(one) for one in possible if published_as in (None, one.file)]
    head_is_zero = not model.get_parameter("head.weight").any().item() if model.config["num_classes"] else None
    return {**asdict(model.metadata), "head_is_zero": head_is_zero, "may_be": named}


def print_info(found: dict[str, Any], config: dict[str, Any]) -> None:
    height, width = config["image_size"]
    prefix = "" if "system" in config else "Mixer-"
    variant = f" ({prefix}{found['variant']})" if found.get("variant") else ""
    print(f"{printable(found['model'])}{variant} at {height} × {width} px, {config['num_classes']} classes")
    print(f"  parameters         {found['parameters']:>15,}")
    print(f"  MACs per image     {found['macs']:>15,}   ({found['macs'] / 1e9:.3g} G; FLOPs are twice that)")
    activations = f"{found['activation_bytes']:>15,}   bytes per image, stored for the backward pass, float32"
    print(f"  activations        {activations}")
    print("  " + ", ".join(f"{key} {config[key]}" for key in config if key not in ("image_size", "num_classes")))
    if "note" in found:
        print(f"  {found['note']}")
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
