"""mixer predict"""

import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import tyro

from allmlp.cli.arguments import Weights, parse
from allmlp.cli.docstrings import help_from_docstrings
from allmlp.errors import UserError, printable
from allmlp.files import to_json

if TYPE_CHECKING:
    from allmlp.inference.predict import Prediction

DESCRIPTION = """Prints labels and probabilities for images, in the order given, in constant memory.

example: mixer predict runs/photos/model.safetensors a.jpg holiday/ more.zip --format csv"""


@dataclass(frozen=True, kw_only=True)
@help_from_docstrings
class Arguments:
    weights: Weights
    images: tyro.conf.Positional[tuple[str, ...]]
    """Image files, folders of images, .zip files of images."""
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
    from allmlp.files import as_path
    from allmlp.inference.images import find_images
    from allmlp.inference.predict import predict_stream
    from allmlp.weights.load import load

    paths = [as_path("image", image) for image in arguments.images]
    for path in paths:  # so that a mistake is reported before the first row is printed
        next(find_images(path))
    images = (image for path in paths for image in find_images(path))
    predictions = predict_stream(
        load(arguments.weights),
        images,
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
    write = print_json if arguments.json else formats[arguments.format]
    with progress_bar(
        False if sys.stdout.isatty() else None
    ) as bar:  # on a terminal, the rows themselves show the progress
        write(rows())
    if problems and not count:
        raise UserError(next(iter(problems.values())) if len(problems) == 1 else describe_unreadable(list(problems)))
    if problems:
        print(describe_unreadable(list(problems)), file=sys.stderr)


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


def print_json(rows: Iterator["Prediction"]) -> None:
    """One JSON object, written row by row, so that memory stays constant."""
    print('{"predictions": [', end="")
    for i, row in enumerate(rows):
        print(", " if i else "", to_json(to_dict(row)), sep="", end="")
    print("]}")


def to_dict(row: "Prediction") -> dict:
    if row.problem is not None:
        return {"image": row.image, "problem": row.problem}
    best = [{"class": name, "probability": probability} for name, probability in row.classes]
    return {"image": row.image, "predictions": best}
