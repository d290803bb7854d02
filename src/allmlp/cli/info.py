"""mixer info"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from allmlp.cli.arguments import pair, parse
from allmlp.errors import UserError, printable
from allmlp.files import to_json

if TYPE_CHECKING:
    from allmlp.model import Mixer

DESCRIPTION = """What a variant of Table 1 costs, or what a weights file holds and costs, and what a resize would add.

example: mixer info Mixer-B_16.npz --image-size 448"""
COUNTS = ("parameters", "macs", "flops", "activation_bytes")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    model: tyro.conf.Positional[str]
    """S/32, S/16, B/32, B/16, L/32, L/16, H/14, a weights file, or hf-hub:OWNER/NAME."""
    image_size: tuple[int, ...] = ()
    """In pixels, one number, or height and width; by default 224, or the file's. Weights are resized to it."""
    num_classes: int | None = None
    """Of a variant's head, by default 1000."""
    json: bool = False
    """Print one JSON object."""


def run(args: Sequence[str]) -> None:
    chosen = parse(Arguments, args, verb="info", description=DESCRIPTION)
    from allmlp.factory import build_meta
    from allmlp.flops import cost
    from allmlp.weights.resize import resized_config

    model = load_weights(chosen.model)
    before = dict(model.config) if model else variant_config(chosen.model)
    if chosen.num_classes is not None and model:
        raise UserError(f"--num-classes {chosen.num_classes}: {chosen.model} has its own head: leave it out")
    if chosen.num_classes is not None:
        before["num_classes"] = chosen.num_classes
    after = resized_config(before, pair(chosen.image_size)) if chosen.image_size else before
    # a variant is made for the size, and so keeps Table 1's D_S; weights have to be resized
    config = after if model else before | {"image_size": after["image_size"]}
    found: dict[str, Any] = {"model": chosen.model, **asdict(cost(build_meta(config))), **config}
    found |= {"variant": model and variant(model), **(about(model) if model else {})}
    if after["image_size"] != before["image_size"]:
        found["resize"] = compare_costs(before, after)
    if chosen.json:
        print(to_json(found))
    else:
        show(found, config)


def load_weights(name: str) -> "Mixer | None":
    """The model of a weights file; None for the name of a variant."""
    from allmlp.weights.load import load

    endings = (".safetensors", ".npz", ".pt", ".pth", ".bin")
    is_file = Path(name).exists() or Path(name).suffix in endings or name.startswith("hf-hub:")
    return load(name) if is_file else None


def variant_config(name: str) -> dict[str, Any]:
    """The arguments of ``Mixer`` for a variant of Table 1 as the paper pre-trains it."""
    import torch

    from allmlp.factory import create

    with torch.device("meta"):
        return dict(create(name).config)


def variant(model: "Mixer") -> str | None:
    from allmlp.weights.published import variant_of

    return variant_of(model.config)


def about(model: "Mixer") -> dict[str, Any]:
    """What the file says of itself, and the published files it may be."""
    from allmlp.weights.published import candidates

    source = model.metadata.provenance.get("source")
    source = source if isinstance(source, dict) else {}
    known, publisher = source.get("known_as"), source.get("publisher")
    possible = candidates(model.config, authors=publisher == "authors") if publisher else []
    named = [asdict(one) for one in possible if known in (None, one.file)]
    return {**asdict(model.metadata), "head_is_zero": not model.get_parameter("head.weight").any().item()
            if model.config["num_classes"] else None, "may_be": named}  # fmt: skip


def compare_costs(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What a resize changes: sizes and counts of both, and how many times as much."""
    from allmlp.factory import build_meta
    from allmlp.flops import cost

    keys = ("image_size", "tokens_mlp_dim")
    old, new = asdict(cost(build_meta(before))), asdict(cost(build_meta(after)))
    return {
        "from": {key: before[key] for key in keys} | old,
        "to": {key: after[key] for key in keys} | new,
        "times": {key: new[key] / old[key] for key in COUNTS},
    }


def show(found: dict[str, Any], config: dict[str, Any]) -> None:
    height, width = config["image_size"]
    named = f" (Mixer-{found['variant']})" if found.get("variant") else ""
    print(f"{printable(found['model'])}{named} at {height} × {width} px, {config['num_classes']} classes")
    print(f"  parameters         {found['parameters']:>15,}")
    print(f"  MACs an image      {found['macs']:>15,}   ({found['macs'] / 1e9:.3g} G; FLOPs are twice that)")
    print(
        f"  activations        {found['activation_bytes']:>15,}   bytes an image, kept for the backward pass, float32"
    )
    print("  " + ", ".join(f"{key} {config[key]}" for key in config if key not in ("image_size", "num_classes")))
    if "resize" in found:
        show_resize(found["resize"])
    if found.get("head_is_zero"):
        print("  the head is all zero: features, no classes")
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


def show_resize(costs: dict[str, Any]) -> None:
    old, new, times = costs["from"], costs["to"], costs["times"]
    sizes = " → ".join("×".join(map(str, one["image_size"])) for one in (old, new))
    counts = f"parameters {old['parameters']:,} → {new['parameters']:,} (× {times['parameters']:.2f})"
    more = f"FLOPs × {times['flops']:.2f}, activations × {times['activation_bytes']:.2f}"
    print(f"  resized {sizes} px: {counts}, {more}, D_S {old['tokens_mlp_dim']} → {new['tokens_mlp_dim']}")
