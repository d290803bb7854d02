"""mixer convert"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from allmlp.api.recipe import height_and_width
from allmlp.cli.arguments import Weights, parse
from allmlp.cli.docstrings import help_from_docstrings
from allmlp.cli.streams import saved_result
from allmlp.errors import UserError, printable
from allmlp.files import to_json

DESCRIPTION = """Writes weights in another format, every tensor bit for bit.

example: mixer convert Mixer-B_16.npz b16.safetensors

Reads allmlp's .safetensors, the authors' .npz in both layouts, and state dicts of timm and lucidrains as .safetensors,
.pt or .pth. Give the class names and the normalization of pixels here if a file does not record them; allmlp's own
format stores both."""


@dataclass(frozen=True, kw_only=True)
@help_from_docstrings
class Arguments:
    weights: Weights
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The file to write."""
    to: Literal["auto", "native", "npz", "timm"] = "auto"
    """native: allmlp's .safetensors; npz: the authors' layout; timm: timm's names; auto: from the suffix of OUT."""
    image_size: tuple[int, ...] = ()
    """Size that the weights were trained at, for a grid that is not square: height and width in pixels, as 224 448."""
    in_channels: int | None = None
    """Number of image channels, for lucidrains' files whose stem leaves it ambiguous."""
    classes: Path | None = None
    """A text file with one class name per line, in the order of the logits."""
    mean: tuple[float, ...] = ()
    """Mean that normalized pixels in [0, 1], one number or three."""
    std: tuple[float, ...] = ()
    """Standard deviation that normalized pixels in [0, 1], one number or three."""
    json: bool = False
    """Print one JSON object."""


def run(args: Sequence[str]) -> None:
    arguments = parse(Arguments, args, command="convert", description=DESCRIPTION)
    from allmlp.weights.convert import save_as
    from allmlp.weights.load import load

    size = height_and_width(arguments.image_size) if arguments.image_size else None
    model = load(arguments.weights, image_size=size, in_channels=arguments.in_channels)
    statistics = {key: per_channel(key, getattr(arguments, key)) for key in ("mean", "std") if getattr(arguments, key)}
    names = read_names(arguments.classes, model.config["num_classes"]) if arguments.classes else model.metadata.classes
    model.metadata = dataclasses.replace(
        model.metadata, classes=names, preprocessing=dataclasses.replace(model.metadata.preprocessing, **statistics)
    )
    to = arguments.to if arguments.to != "auto" else "npz" if arguments.out.suffix == ".npz" else "native"
    save_as(model, arguments.out, to)
    with saved_result(arguments.out, arguments.json):
        if arguments.json:
            print(to_json({"weights": arguments.weights, "out": str(arguments.out), "to": to}))
        else:
            print(f"weights  {arguments.out}")


def per_channel(key: str, values: tuple[float, ...]) -> tuple[float, ...]:
    """One number per channel; a single one counts for all three."""
    if len(values) not in (1, 3) or (key == "std" and min(values) <= 0):
        above = ", above 0" if key == "std" else ""
        raise UserError(f"--{key} {' '.join(map(str, values))}: give one number or three{above}")
    return values * 3 if len(values) == 1 else values


def read_names(path: Path, count: int) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a text file with one class name per line") from None
    if len(names) != count:
        raise UserError(f"{path} names {len(names)} classes, and the head has {count}: give one name per line")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(
            f"{path} names {printable(twice[0])!r} twice, and labels are matched by name: rename one of them"
        )
    return names
