"""The report of a training run: a single HTML file without scripts, which needs neither a network nor other files.

The names in it (classes, files, devices) are untrusted text. The template escapes everything but the charts that are
drawn here, which contain no names.
"""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from allmlp.evaluation.charts import draw_confusion_image, draw_curves
from allmlp.evaluation.classification import Classification, ClassScore, wilson
from allmlp.files import atomic_write

MAX_TABLE_CLASSES = 30  # with more classes, a confusion matrix is drawn as an image instead of a table of counts
MAX_CLASS_ROWS = 1000  # with more classes, only those with the lowest recall have a row in the table of scores
THUMBNAIL = 160  # pixels of its longer side
PER_CLASS_FILE = "per_class.csv"


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image with its true class and the predicted classes with their probabilities, most probable first."""

    image: Image.Image  # small, as all are held in memory
    name: str
    label: str
    predictions: tuple[tuple[str, float], ...]

    @property
    def correct(self) -> bool:
        return bool(self.predictions) and self.predictions[0][0] == self.label


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
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": format_percent, "data_uri": data_uri}
    template = environment.from_string(resources.files("allmlp.evaluation").joinpath("report.html").read_text("utf-8"))
    page = template.render(
        summary=summary,
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
    with atomic_write(path) as draft:
        draft.write_text(page, encoding="utf-8", errors="backslashreplace")  # file names may hold lone surrogates


# Numbers as text


def format_percent(fraction: float | None, digits: int = 1) -> str:
    return "—" if fraction is None or not math.isfinite(fraction) else f"{100 * fraction:.{digits}f} %"


def format_count(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:.3g}"


def format_short(number: int) -> str:
    scale, unit = next(((s, u) for s, u in ((1e9, " G"), (1e6, " M"), (1e3, " k")) if number >= s), (1, ""))
    return f"{number / scale:.{1 if number >= 1e6 else 0}f}{unit}"


def format_duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole, minutes = round(seconds), round(seconds / 60)
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{minutes // 60} h {minutes % 60} min"


def format_memory(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def format_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return " · ".join(f"{key} {format_value(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(format_value(item) for item in value)
    return f"{value:,}" if type(value) is int else f"{value:.4g}" if isinstance(value, float) else str(value)


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
            f"{correct:,} of {total:,} correct, 95\u00a0%\u00a0interval {100 * low:.1f}–{100 * high:.1f}\u00a0%"
        )
    parameters = format_short(summary["parameters"]) if has_value(summary, "parameters") else "—"
    return [
        ("test top-1", format_entry(summary, "test_top1"), notes["test"]),
        ("validation top-1", format_entry(summary, "val_top1"), notes["val"]),
        ("parameters", parameters, note("model", "{}")),
        ("training time", format_entry(summary, "train_seconds"), note("steps", "{} steps")),
        ("images per second", format_entry(summary, "images_per_second"), note("device", "in training, on {}")),
    ]


# Images


def data_uri(image: Image.Image) -> str:
    """A thumbnail of at most 160 px per side; an image below 80 px is enlarged by a whole factor."""
    thumb, stream = image.convert("RGB"), io.BytesIO()
    if factor := max(thumb.size) < 80 and 128 // max(thumb.size):
        thumb = thumb.resize((thumb.width * factor, thumb.height * factor), Image.Resampling.NEAREST)
        thumb.save(stream, "png", optimize=True)
        return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    thumb.thumbnail((THUMBNAIL, THUMBNAIL))
    thumb.save(stream, "jpeg", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


# The confusion matrix and the scores


def describe_confusion(result: Classification) -> dict:
    """What the template shows: a table of all cells for few classes, else an image and the most confused pairs."""
    classes, pairs = result.dataset.classes, result.confusion_counts
    images = np.bincount(result.labels, minlength=len(classes))
    shares = pairs[:, 2] / images[pairs[:, 0]]
    description = {"classes": classes, "cells": [], "image": None, "pairs": []}
    if len(classes) <= MAX_TABLE_CLASSES:
        cells = [[(0, 0.0)] * len(classes) for _ in classes]
        for (true, predicted, number), share in zip(pairs.tolist(), shares.tolist(), strict=True):
            cells[true][predicted] = (number, math.sqrt(share))  # so that one mistake in a hundred is still visible
        return description | {"cells": cells}
    wrong = np.flatnonzero(pairs[:, 0] != pairs[:, 1])
    most = wrong[np.argsort(-pairs[wrong, 2], kind="stable")[:20]]
    confused = [
        (classes[true], classes[predicted], number, share)
        for (true, predicted, number), share in zip(pairs[most].tolist(), shares[most].tolist(), strict=True)
    ]
    return description | {"image": draw_confusion_image(pairs, len(classes)), "pairs": confused}


def worst_classes(result: Classification) -> list[tuple[int, ClassScore]]:
    """Number and scores of the classes, lowest recall first, at most ``MAX_CLASS_ROWS``; those without images last."""
    scores = enumerate(result.per_class())
    return sorted(scores, key=lambda row: math.inf if row[1].recall is None else row[1].recall)[:MAX_CLASS_ROWS]
