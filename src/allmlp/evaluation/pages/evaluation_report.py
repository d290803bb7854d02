"""The page of an evaluation: the metrics of one model or several, how they differ, and the hardest images."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from allmlp.evaluation.classification import Classification
from allmlp.evaluation.comparison import NamedPair, hardest
from allmlp.evaluation.pages.charts import draw_reliability
from allmlp.evaluation.pages.confusion import describe_confusion, worst_classes
from allmlp.evaluation.pages.examples import GRID_IMAGES, read_examples
from allmlp.evaluation.scores import Score, list_scores
from allmlp.evaluation.significance import Interval
from allmlp.pages.page import format_percent, write_page


class Evaluated(NamedTuple):
    """A model, by the name that the user gave for it, and its predictions."""

    name: str
    result: Classification


def write_evaluation_report(
    path: Path, evaluated: Sequence[Evaluated], pairs: Sequence[NamedPair], images: str
) -> None:
    """Writes the page to ``path``, atomically. The confusion matrix and the examples are those of the first model.

    Args:
        path: the HTML file to write, in an existing folder.
        evaluated: models on the same images.
        pairs: their comparisons, of at least two models.
        images: which images these are, for the heading.

    Raises:
        OSError: the file cannot be written.
    """
    first, results = evaluated[0], [result for _, result in evaluated]
    scores = [{score.key: score for score in list_scores(result)} for result in results]
    columns = {score.key: score.label for one in scores for score in one.values()}
    write_page(
        path,
        "allmlp.evaluation.pages",
        "evaluation.html",
        images=images,
        names=[name for name, _ in evaluated],
        count=len(first.result.labels),
        unreadable=first.result.unreadable,
        tiles=make_tiles(first.result),
        columns=columns,
        scores=[{key: describe_score(one[key]) if key in one else ("—", "") for key in columns} for one in scores],
        losses=[f"{result.loss:.4f}" for result in results],
        errors=[format_percent(result.calibration.ece) for result in results],
        verdicts=[(name, result.majority.verdict) for name, result in evaluated if result.majority.verdict],
        pairs=[
            (evaluated[first].name, evaluated[second].name, pair, describe_interval(pair.interval))
            for first, second, pair in pairs
        ],
        diagrams=[
            (name, draw_reliability(result.calibration, f"reliability{i}"))
            for i, (name, result) in enumerate(evaluated)
        ],
        confusion=describe_confusion(first.result),
        class_scores=worst_classes(first.result),
        mistakes=read_examples(first.result, hardest(results, GRID_IMAGES)),
    )


def make_tiles(result: Classification) -> list[tuple[str, str, str]]:
    """Label, figure and note of each headline number."""
    majority = result.majority
    return [
        *((score.label, *describe_score(score)) for score in list_scores(result)),
        ("commonest class", format_percent(majority.top1), f"top-1 of always answering {majority.name}"),
        ("calibration error", format_percent(result.calibration.ece), "between probability and accuracy (ECE)"),
    ]


def describe_score(score: Score) -> tuple[str, str]:
    """The figure, and its interval in words."""
    return format_percent(score.value, 2), describe_interval(score.interval)


def describe_interval(interval: Interval) -> str:
    low, high = interval
    return f"95\u00a0%\u00a0interval {100 * low:.1f} to {100 * high:.1f}\u00a0%"
