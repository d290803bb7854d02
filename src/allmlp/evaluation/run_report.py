"""From a finished run to its report and its folder of example images."""

from pathlib import Path

import numpy as np

from allmlp.config.serialize import to_json_object
from allmlp.evaluation.classification import Classification
from allmlp.evaluation.report import Example, write_report
from allmlp.runs.folder import disk_error
from allmlp.training.run import Run

SHOWN = 24  # images of each grid


def report(run: Run[Classification]) -> None:
    """Writes ``report.html`` and ``examples/``, held-out images to try ``mixer predict`` on, into the run's folder.

    Raises:
        RunError: the disk is full; the weights are there all the same.
    """
    try:
        write(run)
    except OSError as error:
        raise disk_error(run.out, error) from error


write_run_report = report


def write(run: Run[Classification]) -> None:
    part = next((name for name in ("test", "val") if name in run.results), "test")
    result = run.results.get(part)
    chosen = spread(result) if result else []
    if result:
        save_examples(run.out / "examples", result, chosen[:8])
    wrong = mistakes(result) if result else []
    write_report(
        run.out / "report.html",
        recipe=to_json_object(run.recipe),
        summary=run.summary,
        metrics=run.metrics,
        confusion=result.confusion if result else None,
        classes=run.source.classes,
        examples=[example(result, i) for i in chosen] if result else [],
        mistakes=[example(result, i) for i in wrong] if result else [],
        part=part,
    )  # last: with it, a run is whole


def spread(result: Classification, count: int = SHOWN) -> list[int]:
    """Rows of the result: the first images of each class in turn, so that every class is seen."""
    rank = np.zeros(len(result.labels), dtype=int)
    for label in np.unique(result.labels):
        members = np.flatnonzero(result.labels == label)
        rank[members] = np.arange(len(members))
    return np.lexsort((result.labels, rank))[:count].tolist()


def mistakes(result: Classification, count: int = SHOWN) -> list[int]:
    """Rows of the result: the wrong predictions, the surest first."""
    wrong = np.flatnonzero(result.best[:, 0] != result.labels)
    return wrong[np.argsort(-result.probabilities[wrong, 0], kind="stable")][:count].tolist()


def example(result: Classification, row: int) -> Example:
    index, classes = int(result.indices[row]), result.part.classes
    best = zip(result.best[row, :3], result.probabilities[row, :3], strict=True)
    return Example(
        image=result.part.read(index),
        name=result.part.names[index],
        label=classes[result.labels[row]],
        predictions=tuple((classes[label], float(probability)) for label, probability in best),
    )


def save_examples(folder: Path, result: Classification, rows: list[int]) -> None:
    """As PNG, named by number and true class: upright and in RGB, as the model was shown them."""
    folder.mkdir(exist_ok=True)
    for number, row in enumerate(rows):
        shown = example(result, row)
        label = "".join(c if c.isalnum() or c in "-_ " else "_" for c in shown.label)[:80]
        shown.image.save(folder / f"{number}-{label}.png")
