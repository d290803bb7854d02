"""mixer predict"""

import csv
import functools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import tyro

from allmlp.cli.arguments import Weights, parse
from allmlp.cli.docstrings import help_from_docstrings
from allmlp.errors import UserError, printable
from allmlp.files import to_json

if TYPE_CHECKING:
    from allmlp.data.stores import Store
    from allmlp.inference.predict import Prediction

DESCRIPTION = """Prints labels and probabilities for images, in the order given, in constant memory.

example: mixer predict runs/photos/model.safetensors a.jpg holiday/ more.zip --format csv
example: find photos -name '*.jpg' | mixer predict runs/photos -"""


@dataclass(frozen=True, kw_only=True)
@help_from_docstrings
class Arguments:
    weights: Weights
    images: tyro.conf.Positional[tuple[str, ...]]
    """Image files, folders of images, .zip files of images, URLs; - for a list of these on standard input."""
    top: int = 5
    """Number of classes to print per image, the most probable first."""
    format: Literal["table", "jsonl", "csv"] = "table"
    """Output: one line per image, one JSON object per image, or CSV with one row per class."""
    json: bool = False
    """Print one JSON object for all images, in place of --format."""
    batch_size: int = 32
    """Images per forward pass."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products; auto: bfloat16 if the hardware supports it."""
    max_pixels: int = 64_000_000
    """Largest image that is read, in pixels; larger ones count as unreadable."""


def run(args: Sequence[str]) -> None:
    arguments = parse(Arguments, args, command="predict", description=DESCRIPTION)
    if not arguments.images:
        raise UserError("no images: name files, folders or zips, as in mixer predict WEIGHTS a.jpg photos/ more.zip")
    from allmlp.api.progress import progress_bar
    from allmlp.cli.display import describe_unreadable
    from allmlp.inference.predict import predict_stream
    from allmlp.weights.load import load

    left_out: Counter[str] = Counter()
    predictions = predict_stream(
        load(arguments.weights),
        find_all(arguments.images, left_out),
        arguments.top,
        batch_size=arguments.batch_size,
        device=arguments.device,
        precision=arguments.precision,
        max_pixels=arguments.max_pixels,
    )
    problems: dict[str, str] = {}
    count = 0

    def rows() -> Iterator["Prediction"]:
        nonlocal count
        for prediction in predictions:
            if prediction.problem is None:
                count += 1
            else:
                problems[prediction.image] = prediction.problem
            bar.update(count + len(problems), None, f"{count + len(problems):,} images")
            yield prediction

    formats = {"table": print_table, "jsonl": print_json_lines, "csv": print_csv}
    write = functools.partial(print_json, left_out) if arguments.json else formats[arguments.format]
    with progress_bar(
        False if sys.stdout.isatty() else None
    ) as bar:  # on a terminal, the rows themselves show the progress
        write(rows())
    if not problems and not count:
        raise UserError("no images: standard input names none")
    if problems and not count:
        raise UserError(next(iter(problems.values())) if len(problems) == 1 else describe_unreadable(list(problems)))
    if problems:
        print(describe_unreadable(list(problems)), file=sys.stderr)


def find_all(names: Sequence[str], left_out: Counter[str]) -> "Iterator[tuple[Store, str, str]]":
    """The images of all arguments, after these are checked: a mistake is reported before the first row is printed."""
    from allmlp.files import as_path
    from allmlp.inference.images import find_images, find_listed, find_named
    from allmlp.inference.listing import read_names
    from allmlp.inference.urls import is_url

    if names.count("-") > 1:
        raise UserError("- is given twice: standard input can be read once")
    if "-" in names and sys.stdin.isatty():
        print("reading the names of images from the terminal, one a line (Ctrl-D ends the list)", file=sys.stderr)
    for name in names:
        if name != "-" and not is_url(name):
            next(find_images(as_path("image", name)))

    def images() -> "Iterator[tuple[Store, str, str]]":
        for name in names:
            if name == "-":
                yield from find_listed(read_names(sys.stdin.buffer), left_out)
            else:
                yield from find_named(name) if is_url(name) else find_images(as_path("image", name), left_out)

    return images()


def print_table(rows: Iterator["Prediction"]) -> None:
    for row in rows:
        shown = "  ".join(f"{name} {probability:.4f}" for name, probability in row.classes)
        print(f"{printable(row.image)}\t{printable(shown or row.problem or '')}", flush=True)


def print_json_lines(rows: Iterator["Prediction"]) -> None:
    for row in rows:
        print(to_json(to_dict(row)), flush=True)


def print_csv(rows: Iterator["Prediction"]) -> None:
    """One row per class: image, rank, class, probability, problem."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["image", "rank", "class", "probability", "problem"])
    for row in rows:
        for rank, (name, probability) in enumerate(row.classes, 1):
            writer.writerow([row.image, rank, name, f"{probability:.6g}", ""])
        if row.problem is not None:
            writer.writerow([row.image, "", "", "", row.problem])


def print_json(left_out: Counter[str], rows: Iterator["Prediction"]) -> None:
    """One JSON object, written row by row, so that memory stays constant."""
    print('{"predictions": [', end="")
    for i, row in enumerate(rows):
        print(", " if i else "", to_json(to_dict(row)), sep="", end="")
    print(f'], "left_out": {to_json(dict(left_out))}}}')


def to_dict(row: "Prediction") -> dict:
    if row.problem is not None:
        return {"image": row.image, "problem": row.problem}
    best = [{"class": name, "probability": probability} for name, probability in row.classes]
    return {"image": row.image, "predictions": best}
