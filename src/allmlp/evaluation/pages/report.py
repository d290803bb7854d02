"""The report of a run: one HTML file with inline SVG and images as data URIs, viewable without a network.

Names of files and classes are text, never markup, and SVG, which jinja does not escape, contains no names.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from allmlp.errors import printable
from allmlp.evaluation.classification import Classification
from allmlp.evaluation.pages.charts import draw_curves
from allmlp.evaluation.pages.confusion import describe_confusion, worst_classes
from allmlp.evaluation.pages.examples import Example
from allmlp.evaluation.significance import wilson
from allmlp.pages.page import (
    format_count,
    format_duration,
    format_memory,
    format_percent,
    format_short,
    format_value,
    write_page,
)

PER_CLASS_FILE = "per_class.csv"


def write_report(
    path: Path,
    *,
    recipe: dict,
    summary: dict,
    metrics: list[dict],
    result: Classification | None,
    examples: Sequence[Example],
    mistakes: Sequence[Example],
    split: str,
) -> None:
    """Writes the report of a run to ``path``, atomically.

    Args:
        path: the HTML file to write, in an existing folder.
        recipe: the resolved recipe, which is shown as JSON.
        summary: as in ``summary.json``; rates are fractions, and any entry may be missing or None.
        metrics: the records of ``metrics.jsonl``, of training and evaluation; None and NaN make gaps in the curves.
        result: the predictions for the split; None: no labels.
        examples, mistakes: images of the split in the order shown; mistakes are the most confident wrong predictions.
        split: "test" or "val", the source of result, examples and mistakes.

    Raises:
        OSError: the file cannot be written.
    """
    write_page(
        path,
        "allmlp.evaluation.pages",
        "report.html",
        summary=summary,
        verdict=None if result is None else result.majority.verdict,
        split={"val": "validation"}.get(split, split),
        tiles=make_tiles(summary, result, split),
        details=list_details(summary),
        charts=draw_curves(metrics),
        confusion=None if result is None else describe_confusion(result),
        scores=None if result is None else worst_classes(result),
        per_class_file=PER_CLASS_FILE,
        examples=examples,
        mistakes=mistakes,
        recipe=json.dumps(recipe, indent=2, ensure_ascii=False, default=str),
    )


ENTRIES = {  # entries of the summary with their own label or format: key → (label, format)
    "test_top1": ("test top-1", lambda value: format_percent(value, 2)),
    "val_top1": ("validation top-1", lambda value: format_percent(value, 2)),
    "train_seconds": ("training time", format_duration),
    "images_per_second": ("images per second", format_count),
    "peak_memory_bytes": ("peak memory", format_memory),
    "seed": ("seed", str),
}


def has_value(summary: Mapping, key: str) -> bool:
    value = summary.get(key)
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def format_entry(summary: Mapping, key: str) -> str:
    return ENTRIES.get(key, (key, format_value))[1](summary[key]) if has_value(summary, key) else "—"


def list_details(summary: Mapping) -> list[tuple[str, str]]:
    """Label and text of all entries that have a value, in order, except two that the template shows elsewhere."""
    keys = [key for key in summary if key not in ("command", "unreadable") and has_value(summary, key)]
    return [(ENTRIES.get(key, (key.replace("_", " "),))[0], format_entry(summary, key)) for key in keys]


def make_tiles(summary: Mapping, result: Classification | None, split: str) -> list[tuple[str, str, str]]:
    """Label, figure and note of each headline number; the figure is "—" where there is no value."""

    def note(key: str, text: str) -> str:
        return text.format(format_entry(summary, key)) if has_value(summary, key) else ""

    notes = {"test": "" if has_value(summary, "test_top1") else "no labeled test split", "val": ""}
    if result is not None:
        correct, total = int((result.best[:, 0] == result.labels).sum()), len(result.labels)
        low, high = wilson(correct, total)
        notes[split] = (
            f"{correct:,} of {total:,} correct, 95\u00a0%\u00a0interval {100 * low:.1f}–{100 * high:.1f}\u00a0%; "
            f"always answering {printable(result.majority.name)}: {format_percent(result.majority.top1)}"
        )
    parameters = format_short(summary["parameters"]) if has_value(summary, "parameters") else "—"
    return [
        ("test top-1", format_entry(summary, "test_top1"), notes["test"]),
        ("validation top-1", format_entry(summary, "val_top1"), notes["val"]),
        ("parameters", parameters, note("model", "{}")),
        ("training time", format_entry(summary, "train_seconds"), note("steps", "{} steps")),
        ("images per second", format_entry(summary, "images_per_second"), note("device", "in training, on {}")),
    ]
