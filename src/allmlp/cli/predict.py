"""mixer predict"""

import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from allmlp.cli.arguments import parse
from allmlp.errors import UserError, printable
from allmlp.files import to_json

if TYPE_CHECKING:
    from allmlp.inference.predict import Prediction

DESCRIPTION = """Labels and probabilities for images, in the order given, in constant memory.

example: mixer predict runs/photos/model.safetensors a.jpg holiday/ more.zip --format csv"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    weights: tyro.conf.Positional[str]
    """A file of ours, the authors' (.npz), timm's or lucidrains', or hf-hub:OWNER/NAME."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, folders of images, zips of images."""
    top: int = 5
    """Classes of each image, the most probable first."""
    format: Literal["table", "jsonl", "csv"] = "table"
    """A line an image: for reading, as JSON lines, or as CSV."""
    json: bool = False
    """Print one JSON object instead."""
    batch_size: int = 32
    """Images that are computed together."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto: bfloat16 where the hardware has it."""
    max_pixels: int = 64_000_000
    """Larger images are refused."""


def run(args: Sequence[str]) -> None:
    chosen = parse(Arguments, args, verb="predict", description=DESCRIPTION)
    if not chosen.images:
        raise UserError("no image is named: mixer predict WEIGHTS a.jpg photos/ more.zip")
    from allmlp.cli.display import list_unreadable, progress_bar
    from allmlp.inference.predict import find_images, predict_stream
    from allmlp.weights.load import load

    for path in chosen.images:  # before the first row is printed
        next(find_images(path))
    places = (place for path in chosen.images for place in find_images(path))
    predictions = predict_stream(
        load(chosen.weights),
        places,
        chosen.top,
        batch_size=chosen.batch_size,
        device=chosen.device,
        precision=chosen.precision,
        max_pixels=chosen.max_pixels,
    )
    problems: dict[str, str] = {}
    read = 0

    def rows() -> Iterator["Prediction"]:
        nonlocal read
        for prediction in predictions:
            if prediction.problem is None:
                read += 1
            else:
                problems[prediction.image] = prediction.problem
            bar.update(read + len(problems), None, f"{read + len(problems):,} images")
            yield prediction

    write = as_object if chosen.json else {"table": as_table, "jsonl": as_lines, "csv": as_csv}[chosen.format]
    with progress_bar(wanted=not sys.stdout.isatty()) as bar:  # on a terminal, the rows show how far it is
        write(rows())
    if problems and not read:
        raise UserError(next(iter(problems.values())) if len(problems) == 1 else list_unreadable(list(problems)))
    if problems:
        print(list_unreadable(list(problems)), file=sys.stderr)


def as_table(rows: Iterator["Prediction"]) -> None:
    for row in rows:
        shown = "  ".join(f"{name} {probability:.4f}" for name, probability in row.classes)
        print(f"{printable(row.image)}\t{printable(shown or row.problem or '')}", flush=True)


def as_lines(rows: Iterator["Prediction"]) -> None:
    for row in rows:
        print(to_json(fields(row)), flush=True)


def as_csv(rows: Iterator["Prediction"]) -> None:
    """One row a class: image, rank, class, probability, problem."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["image", "rank", "class", "probability", "problem"])
    for row in rows:
        for rank, (name, probability) in enumerate(row.classes, 1):
            writer.writerow([row.image, rank, name, f"{probability:.6g}", ""])
        if row.problem is not None:
            writer.writerow([row.image, "", "", "", row.problem])


def as_object(rows: Iterator["Prediction"]) -> None:
    """One JSON object, written as it comes, so that its length does not matter."""
    print('{"predictions": [', end="")
    for i, row in enumerate(rows):
        print(", " if i else "", to_json(fields(row)), sep="", end="")
    print("]}")


def fields(row: "Prediction") -> dict:
    if row.problem is not None:
        return {"image": row.image, "problem": row.problem}
    best = [{"class": name, "probability": probability} for name, probability in row.classes]
    return {"image": row.image, "predictions": best}
