"""Words of the command line to dataclasses, by tyro; its boxed errors become one line."""

import contextlib
import dataclasses
import difflib
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from allmlp.errors import UserError

if TYPE_CHECKING:
    from allmlp.model import Mixer

T = TypeVar("T")


def parse(kind: type[T], args: Sequence[str], *, verb: str, description: str, default: T | None = None) -> T:
    """The verb's arguments; a UserError, naming the nearest options, for one that does not exist.

    ``description`` is shown by --help, which ends the process, as it should.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            found, unknown = tyro.cli(
                kind,
                prog=f"mixer {verb}",
                description=description,
                args=list(args),
                return_unknown_args=True,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
                default=tyro.MISSING_NONPROP if default is None else default,
            )
    except SystemExit as end:
        if end.code == 0:
            raise
        raise UserError(f"{one_line(errors.getvalue())} (mixer {verb} --help)") from None
    if unknown:
        raise UserError(f"{explain(unknown[0], option_names(kind))} (mixer {verb} --help)")
    return found


def explain(word: str, options: list[str]) -> str:
    if not word.startswith("-"):
        return f"unexpected argument {word!r}: a recipe's or file's name comes before the options"
    near = difflib.get_close_matches(word.split("=")[0], options, 3)
    return f"unknown option {word.split('=')[0]}: " + (
        f"did you mean {', '.join(near)}?" if near else "there is no such"
    )


def option_names(kind: Any) -> list[str]:
    names = []
    for field in dataclasses.fields(kind):
        name = f"--{field.name.replace('_', '-')}"
        names += option_names(field.type) if dataclasses.is_dataclass(field.type) else [name]
    return names


def one_line(box: str) -> str:
    """The first paragraph of tyro's error box."""
    words: list[str] = []
    for line in box.splitlines():
        if line.startswith("│"):
            text = line.strip("│ ")
            if text.startswith("──"):
                break
            words += text.split()
    return " ".join(words) or " ".join(box.split())


def pair(size: tuple[int, ...]) -> tuple[int, int]:
    """(height, width) from one word of the command line, or two."""
    if len(size) not in (1, 2):
        raise UserError(f"--image-size {' '.join(map(str, size))}: one number of pixels, or two, height and width")
    return size[0], size[-1]


def load_sized(weights: str, image_size: tuple[int, ...]) -> "Mixer":
    """The model of a WEIGHTS argument, resized where an --image-size is given."""
    from allmlp.weights.load import load
    from allmlp.weights.resize import resize

    model = load(weights)
    return resize(model, pair(image_size)) if image_size else model
