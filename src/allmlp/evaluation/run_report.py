"""From a finished run to its report and its folder of example images."""

from pathlib import Path

import numpy as np

from allmlp.config.serialize import to_json_object
from allmlp.evaluation.classification import Classification
from allmlp.evaluation.report import Example, write_report
from allmlp.runs.folder import disk_error
from allmlp.runs.result import RunResult

GRID_IMAGES = 24  # images in each grid of the report


def write_run_report(run: RunResult[Classification]) -> None:
    """Writes ``report.html`` and ``examples/``, held-out images to try ``mixer predict`` on, into the run's folder.

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
    chosen = choose_examples(result) if result else []
    if result:
        save_examples(run.folder / "examples", result, chosen[:8])
    wrong = find_mistakes(result) if result else []
    write_report(
        run.folder / "report.html",
        recipe=to_json_object(run.recipe),
        summary=run.summary,
        metrics=run.metrics,
        confusion=result.confusion if result else None,
        classes=run.data.classes,
        examples=[make_example(result, i) for i in chosen] if result else [],
        mistakes=[make_example(result, i) for i in wrong] if result else [],
        split=split,
    )  # written last: a run with a report is complete


def choose_examples(result: Classification, count: int = GRID_IMAGES) -> list[int]:
    """Rows of the result that cover the classes evenly: the first image of each class, then the second, and so on."""
    rank = np.zeros(len(result.labels), dtype=int)
    for label in np.unique(result.labels):
        members = np.flatnonzero(result.labels == label)
        rank[members] = np.arange(len(members))
    return np.lexsort((result.labels, rank))[:count].tolist()


def find_mistakes(result: Classification, count: int = GRID_IMAGES) -> list[int]:
    """Rows of the result with wrong predictions, in order of decreasing confidence."""
    wrong = np.flatnonzero(result.best[:, 0] != result.labels)
    return wrong[np.argsort(-result.probabilities[wrong, 0], kind="stable")][:count].tolist()


def make_example(result: Classification, row: int) -> Example:
    index, classes = int(result.indices[row]), result.dataset.classes
    best = zip(result.best[row, :3], result.probabilities[row, :3], strict=True)
    return Example(
        image=result.dataset.read(index),
        name=result.dataset.names[index],
        label=classes[int(result.labels[row])],
        predictions=tuple((classes[int(label)], float(probability)) for label, probability in best),
    )


def save_examples(folder: Path, result: Classification, rows: list[int]) -> None:
    """Saves images as PNG files, upright and in RGB as decoded for the model, named by number and true class."""
    folder.mkdir(exist_ok=True)
    for number, row in enumerate(rows):
        example = make_example(result, row)
        label = "".join(c if c.isalnum() or c in "-_ " else "_" for c in example.label)[:80]
        example.image.save(folder / f"{number}-{label}.png")
