"""From a finished run to its report, its scores per class and its folder of example images."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from allmlp.config.serialize import to_json_object
from allmlp.data.decode import UnreadableImage
from allmlp.data.transforms import EvaluationTransform, resize_for_crop
from allmlp.errors import RunError
from allmlp.evaluation.classification import Classification, ClassScore
from allmlp.evaluation.report import PER_CLASS_FILE, THUMBNAIL, Example, write_report
from allmlp.files import atomic_write
from allmlp.runs.folder import disk_error
from allmlp.runs.result import RunResult

GRID_IMAGES = 24  # images in each grid of the report
SAVED_IMAGES = 8  # of the examples, to try ``mixer predict`` on


def write_run_report(run: RunResult[Classification]) -> None:
    """Writes ``report.html``, ``per_class.csv`` and the images of ``examples/`` into the run's folder.

    Raises:
        RunError: the disk is full. The weights have been saved before.
    """
    try:
        write_files(run)
    except OSError as error:
        raise disk_error(run.folder, error) from error


def write_files(run: RunResult[Classification]) -> None:
    split = next((name for name in ("test", "val") if name in run.results), "test")
    result = run.results.get(split)
    chosen, wrong = (choose_examples(result), find_mistakes(result)) if result else ([], [])
    examples = {}
    if result:
        write_scores(run.folder / PER_CLASS_FILE, result.per_class())
        examples = read_examples(run, result, [*chosen, *wrong], saved=chosen[:SAVED_IMAGES])
    write_report(
        run.folder / "report.html",
        recipe=to_json_object(run.recipe),
        summary=run.summary,
        metrics=run.metrics,
        result=result,
        examples=[examples[row] for row in chosen if row in examples],
        mistakes=[examples[row] for row in wrong if row in examples],
        split=split,
    )  # written last: a run with a report is complete


def choose_examples(result: Classification, count: int = GRID_IMAGES) -> list[int]:
    """Rows of the result that cover the classes evenly: the first image of each class, then the second, and so on."""
    by_label = np.argsort(result.labels, kind="stable")
    _, starts, sizes = np.unique(result.labels[by_label], return_index=True, return_counts=True)
    rank = np.empty(len(by_label), dtype=int)
    rank[by_label] = np.arange(len(by_label)) - np.repeat(starts, sizes)
    return np.lexsort((result.labels, rank))[:count].tolist()


def find_mistakes(result: Classification, count: int = GRID_IMAGES) -> list[int]:
    """Rows of the result with wrong predictions, in order of decreasing confidence."""
    wrong = np.flatnonzero(result.best[:, 0] != result.labels)
    return wrong[np.argsort(-result.probabilities[wrong, 0], kind="stable")][:count].tolist()


def read_examples(
    run: RunResult[Classification], result: Classification, rows: Sequence[int], saved: Sequence[int]
) -> dict[int, Example]:
    """Row → example, of the images that are still there.

    Each image is read once, at the size for evaluation, and only its thumbnail is kept.

    The images of the rows ``saved`` are written to the folder ``examples`` of the run, named by number and true class.
    """
    transform = EvaluationTransform(image_size=run.model.image_size, preprocessing=run.model.metadata.preprocessing)
    folder = run.folder / "examples"
    folder.mkdir(exist_ok=True)
    examples = {}
    for row in dict.fromkeys(rows):
        try:
            image = result.dataset.read(int(result.indices[row]), transform.min_side)
        except (UnreadableImage, RunError):  # deleted since it was evaluated; the run is complete without it
            continue
        if row in saved:
            label = result.dataset.classes[int(result.labels[row])]
            name = "".join(c if c.isalnum() or c in "-_ " else "_" for c in label)[:60]  # a name has a limit, in bytes
            shrink(image, transform).save(folder / f"{saved.index(row)}-{name}.png")
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        examples[row] = make_example(result, row, image)
    return examples


def make_example(result: Classification, row: int, image: Image.Image) -> Example:
    index, classes = int(result.indices[row]), result.dataset.classes
    best = zip(result.best[row, :3], result.probabilities[row, :3], strict=True)
    return Example(
        image=image,
        name=result.dataset.names[index],
        label=classes[int(result.labels[row])],
        predictions=tuple((classes[int(label)], float(probability)) for label, probability in best),
    )


def shrink(image: Image.Image, transform: EvaluationTransform) -> Image.Image:
    """The image as resized for evaluation, if that is smaller: to the model, it is still the same image.

    Evaluation finds that it has the right size, and crops the same pixels from it.
    """
    resized = resize_for_crop(image, transform.image_size, transform.preprocessing)
    return resized if resized.width * resized.height < image.width * image.height else image


def write_scores(path: Path, scores: Iterable[ClassScore]) -> None:
    """Writes the scores of all classes as CSV; a field is empty where a score does not exist."""
    with (
        atomic_write(path) as draft,
        draft.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["number", *ClassScore._fields])
        writer.writerows([number, *score] for number, score in enumerate(scores))
