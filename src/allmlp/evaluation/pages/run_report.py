"""From a finished run to its report, its scores per class and its folder of example images."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from allmlp.config.serialize import to_json_object
from allmlp.data.transforms import EvaluationTransform, resize_for_crop
from allmlp.evaluation.classification import Classification, ClassScore
from allmlp.evaluation.pages.examples import Example, choose_examples, find_mistakes, make_example, read_images
from allmlp.evaluation.pages.report import PER_CLASS_FILE, write_report
from allmlp.files import atomic_write
from allmlp.runs.folder import disk_error
from allmlp.runs.result import RunResult

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
        examples = keep_examples(run, result, [*chosen, *wrong], saved=chosen[:SAVED_IMAGES])
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


def keep_examples(
    run: RunResult[Classification], result: Classification, rows: Sequence[int], saved: Sequence[int]
) -> dict[int, Example]:
    """Row → example, of the images that are still there. Each is read once, at the size for evaluation.

    The images of the rows ``saved`` are written to the folder ``examples`` of the run, named by number and true class.
    """
    transform = EvaluationTransform(image_size=run.model.image_size, preprocessing=run.model.metadata.preprocessing)
    folder = run.folder / "examples"
    folder.mkdir(exist_ok=True)
    examples = {}
    for row, image in read_images(result, rows, transform.min_side):
        if row in saved:
            label = result.dataset.classes[int(result.labels[row])]
            name = "".join(c if c.isalnum() or c in "-_ " else "_" for c in label)[:60]  # a name has a limit, in bytes
            shrink(image, transform).save(folder / f"{saved.index(row)}-{name}.png")
        examples[row] = make_example(result, row, image)
    return examples


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
