"""mixer evaluate"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from allmlp.api.recipe import height_and_width
from allmlp.cli.arguments import Weights, parse
from allmlp.cli.docstrings import help_from_docstrings
from allmlp.files import to_json

if TYPE_CHECKING:
    import numpy as np

    from allmlp.evaluation.classification import Classification
    from allmlp.model import Mixer

DESCRIPTION = """Evaluates weights on labeled images: every image counts once, classes are matched by name.

example: mixer evaluate runs/digits/model.safetensors --data digits

A source without splits is split as it was for training, so that no test image was trained on."""
MAX_CLASSES = 200  # with more classes, the table of scores shows only those with the lowest recall
MAX_ROWS = 20  # of the other tables


@dataclass(frozen=True, kw_only=True)
@help_from_docstrings
class Arguments:
    weights: Weights
    data: str
    """SOURCE: digits, cifar10, cifar100, pets, flowers102, a folder of images, or a .zip of one."""
    image_size: tuple[int, ...] = ()
    """Resize the weights to this size in pixels, one number, or height and width; by default, their own size."""
    part: Literal["test", "val", "train", "all"] = "test"
    """Split of the source to evaluate on."""
    batch_size: int = 256
    """Images per forward pass."""
    workers: int | None = None
    """Processes that load images; None: chosen from the number of images and CPU cores."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products; auto: bfloat16 if the hardware supports it."""
    max_pixels: int = 64_000_000
    """Largest image that is read, in pixels; larger ones count as unreadable."""
    json: bool = False
    """Print one JSON object. Its confusion_counts lists [true class, predicted class, images] for each pair of classes
    that occurs; classes are positions in its list of classes."""


def run(args: Sequence[str]) -> None:
    arguments = parse(Arguments, args, command="evaluate", description=DESCRIPTION)
    from allmlp.api.evaluate import check_evaluation, evaluate_source, load_as_trained, same_data
    from allmlp.cli.display import describe_unreadable

    model = load_resized(arguments.weights, arguments.image_size)
    device = check_evaluation(model, arguments.device, arguments.batch_size, arguments.workers)
    source = load_as_trained(model, arguments.data, arguments.max_pixels)
    result = evaluate_source(
        model, source, arguments.part, device, arguments.precision, arguments.batch_size, arguments.workers
    )
    if arguments.json:
        print(
            to_json(
                {
                    "weights": arguments.weights,
                    "image_size": list(model.image_size),
                    "data": source.description,
                    "part": arguments.part,
                    "left_out": source.left_out,
                    **describe(result),
                }
            )
        )
    else:
        page = Path(arguments.weights).parent / "report.html"  # of a run, with its own held-out images
        where = f"--json lists all; {page} draws those of the run" if page.is_file() else "--json lists all"
        print_result(result, f"{arguments.part} split of {source.description}", where)
        if arguments.part != "all" and not same_data(model, source, arguments.data):
            print("(these weights were trained on other data: --part all evaluates on every image of this source)")
    if result.unreadable:
        print(describe_unreadable(list(result.unreadable)), file=sys.stderr)


def load_resized(weights: str, image_size: tuple[int, ...]) -> "Mixer":
    """The model of a WEIGHTS argument, resized if an --image-size is given."""
    from allmlp.weights.load import load
    from allmlp.weights.resize import resize

    model = load(weights)
    return resize(model, height_and_width(image_size)) if image_size else model


def describe(result: "Classification") -> dict:
    return {
        "images": len(result.labels),
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss,
        "classes": list(result.dataset.classes),
        "per_class": [row._asdict() for row in result.per_class()],
        "confusion_counts": result.confusion_counts.tolist(),
        "unreadable_images": len(result.unreadable),
        "unreadable": result.unreadable,
    }


def print_result(result: "Classification", images: str, where: str) -> None:
    """Prints the scores; ``where``: a hint to what the tables leave out."""
    from allmlp.cli.display import print_table
    from allmlp.evaluation.classification import wilson

    low, high = wilson(round(result.top1 * len(result.labels)), len(result.labels))
    top5 = "" if result.top5 is None else f", top-5 {result.top5:.4f}"
    print(f"{len(result.labels):,} images: the {images}")
    print(f"top-1 {result.top1:.4f} (95 % interval {low:.4f} to {high:.4f}){top5}, cross-entropy {result.loss:.4f}")
    scores, title = result.per_class(), "per class"
    if len(scores) > MAX_CLASSES:
        title = f"per class: {MAX_ROWS} of {len(scores):,} classes, lowest recall first ({where})"
        scores = sorted(scores, key=lambda score: math.inf if score.recall is None else score.recall)[:MAX_ROWS]
    rows = [[r.name, f"{r.images:,}", format_fraction(r.recall), format_fraction(r.precision)] for r in scores]
    print_table(title, ["class", "images", "recall", "precision"], rows)
    print_confusion(result.dataset.classes, result.confusion_counts, where)


def print_confusion(names: Sequence[str], counts: "np.ndarray", where: str) -> None:
    """Prints (M, 3) counts: for few classes as a matrix, else the most frequent mistakes, and where all of them are."""
    from allmlp.cli.display import print_matrix, print_table

    if len(names) <= MAX_ROWS:
        rows = [["0"] * len(names) for _ in names]
        for true, predicted, images in counts.tolist():
            rows[true][predicted] = str(images)
        if print_matrix("confusion: true class down, predicted across", list(names), rows):
            return
    mistakes = counts[counts[:, 0] != counts[:, 1]]
    most = mistakes[(-mistakes[:, 2]).argsort(kind="stable")[:MAX_ROWS]].tolist()
    pairs = [[names[true], names[predicted], f"{images:,}"] for true, predicted, images in most]
    title = f"confusion: {len(most)} of {len(mistakes):,} confused pairs, most frequent first ({where})"
    print_table(title, ["true class", "predicted as", "images"], pairs, names=2)


def format_fraction(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
