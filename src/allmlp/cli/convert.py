"""mixer convert"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from allmlp.cli.arguments import pair, parse
from allmlp.errors import UserError
from allmlp.files import to_json

DESCRIPTION = """Writes weights in another format, every tensor bit for bit.

example: mixer convert Mixer-B_16.npz b16.safetensors

Read are our safetensors, the authors' .npz in both layouts, and state dicts of timm and lucidrains as .safetensors, .pt
or .pth. Where a file cannot tell how its pixels were normalised, say it here, and it travels with the weights."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    weights: tyro.conf.Positional[str]
    """A file of ours, the authors' (.npz), timm's or lucidrains', or hf-hub:OWNER/NAME."""
    out: tyro.conf.Positional[Path]
    """The file to write."""
    to: Literal["auto", "native", "npz", "timm"] = "auto"
    """auto: npz (the authors' layout) for a name that ends so, else native; timm: its names, as safetensors."""
    image_size: tuple[int, ...] = ()
    """That the weights were trained at, where their grid is no square: height and width in pixels, as 224 448."""
    in_channels: int | None = None
    """Of the images, where lucidrains' stem does not tell."""
    classes: Path | None = None
    """A text file with the name of a class on each line, in the order of the logits."""
    mean: tuple[float, ...] = ()
    """Of pixels in [0, 1], one number or three."""
    std: tuple[float, ...] = ()
    """Of pixels in [0, 1], one number or three."""
    json: bool = False
    """Print one JSON object."""


def run(args: Sequence[str]) -> None:
    chosen = parse(Arguments, args, verb="convert", description=DESCRIPTION)
    from allmlp.weights.convert import save_as
    from allmlp.weights.load import load

    size = pair(chosen.image_size) if chosen.image_size else None
    model = load(chosen.weights, image_size=size, in_channels=chosen.in_channels)
    view = {key: channels(key, getattr(chosen, key)) for key in ("mean", "std") if getattr(chosen, key)}
    names = read_names(chosen.classes, model.config["num_classes"]) if chosen.classes else model.metadata.classes
    model.metadata = dataclasses.replace(
        model.metadata, classes=names, preprocessing=dataclasses.replace(model.metadata.preprocessing, **view)
    )
    to = chosen.to if chosen.to != "auto" else "npz" if chosen.out.suffix == ".npz" else "native"
    save_as(model, chosen.out, to)
    if chosen.json:
        print(to_json({"weights": chosen.weights, "out": str(chosen.out), "to": to}))
    else:
        print(f"weights  {chosen.out}")


def channels(key: str, values: tuple[float, ...]) -> tuple[float, ...]:
    if len(values) not in (1, 3) or (key == "std" and min(values) <= 0):
        raise UserError(
            f"--{key} {' '.join(map(str, values))}: one number or three{', above 0' if key == 'std' else ''}"
        )
    return values * 3 if len(values) == 1 else values


def read_names(path: Path, count: int) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a text file with one class name on each line") from None
    if len(names) != count:
        raise UserError(f"{path} names {len(names)} classes, and the head has {count}: one name on each line")
    return names
