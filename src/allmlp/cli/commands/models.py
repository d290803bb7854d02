"""mixer models"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import tyro

from allmlp.cli.arguments import parse
from allmlp.cli.docstrings import help_from_docstrings
from allmlp.files import to_json

Kind = Literal["all", "mixer", "systems", "weights"]

DESCRIPTION = """Lists the models that there are: Mixers of Table 1, the systems that the paper compares them with, and
published weights by name.

examples: mixer models weights
          mixer models --json

Parameters are with a head of 1000 classes, those of weights as stored. Names work in every command: mixer train --model
ViT-B/16, mixer finetune mixer-b16-in21k --data photos/. Comparison systems need timm."""


@dataclass(frozen=True, kw_only=True)
@help_from_docstrings
class Arguments:
    kind: tyro.conf.Positional[Kind] = "all"
    """What to list."""
    json: bool = False
    """Print one JSON object."""


def run(args: Sequence[str]) -> None:
    arguments = parse(Arguments, args, command="models", description=DESCRIPTION)
    listed = {
        kind: rows()
        for kind, rows in (("mixer", list_mixers), ("systems", list_systems), ("weights", list_weights))
        if arguments.kind in ("all", kind)
    }
    if arguments.json:
        print(to_json(listed))
    else:
        print_models(listed)


def list_mixers() -> list[dict[str, Any]]:
    from allmlp.variants import COSTS, VARIANTS

    return [
        {"name": f"Mixer-{name}", "parameters": COSTS[name][0], "macs": COSTS[name][1], "image_size": 224, **sizes}
        for name, sizes in VARIANTS.items()
    ]


def list_systems() -> list[dict[str, Any]]:
    from allmlp.zoo.systems import SYSTEMS

    return [
        asdict(system) | {"sizes": dict(system.sizes), "parameters": system.parameters, "macs": system.macs}
        for system in SYSTEMS.values()
    ]


def list_weights() -> list[dict[str, Any]]:
    """Those with a name, then the authors' files, which are downloaded by hand."""
    from allmlp.weights.named import NAMED
    from allmlp.weights.published import CHECKPOINTS

    named = [asdict(weights) | {"download_megabytes": weights.megabytes} for weights in NAMED.values()]
    files = [
        {
            "name": None, "file": one.file, "model": one.variant, "data": one.data, "classes": one.classes,
            "image_size": one.image_size, "license": "apache-2.0", "top1": one.top1, "source": one.source,
            "note": one.note,
        }
        for one in CHECKPOINTS
        if one.authors
    ]  # fmt: skip
    return named + files


def print_models(listed: dict[str, list[dict[str, Any]]]) -> None:
    from allmlp.cli.display import print_table

    for kind, title in (("mixer", "Mixers of Table 1"), ("systems", "comparison systems")):
        if rows := listed.get(kind):
            cells = [
                [row["name"], millions(row["parameters"]), giga(row["macs"]), str(row["image_size"])] for row in rows
            ]
            print_table(title, ["name", "parameters", "GMACs", "px"], cells)
    notes: dict[str, list[str]] = {}
    for row in listed.get("systems", []):
        notes.setdefault(row["note"], []).append(row["name"])
    for note, names in notes.items():
        if note:
            print(f"  {', '.join(names)}: {note}")
    if weights := listed.get("weights"):
        cells = [
            [row["name"], millions(row["parameters"]), str(row["image_size"]), f"{row['classes']:,}",
             "–" if row["top1"] is None else f"{row['top1']:.2%}", f"{row['download_megabytes']:,} MB"]
            for row in weights
            if row["name"]
        ]  # fmt: skip
        columns = ["name", "parameters", "px", "classes", "ImageNet", "download"]
        print_table("published weights (Apache-2.0), with ImageNet top-1 where it is published", columns, cells)
        print("by hand, from gs://mixer_models/: " + ", ".join(row["file"] for row in weights if not row["name"]))


def millions(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M"


def giga(macs: int) -> str:
    return f"{macs / 1e9:.3g}"
