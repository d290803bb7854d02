"""The report of a training run: one HTML file that needs no network, no script and no other file.

Every name in it (classes, files, devices) is untrusted text: the template escapes all but the charts drawn here, and
those hold no names.
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

from allmlp.evaluation.charts import curves, matrix_picture
from allmlp.files import atomic_write

TABLE_CLASSES = 30  # above this, a confusion matrix with numbers in it is no longer readable


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image with what the model said of it: top classes with probability, best first."""

    image: Image.Image
    name: str
    label: str
    predictions: tuple[tuple[str, float], ...]

    @property
    def right(self) -> bool:
        return bool(self.predictions) and self.predictions[0][0] == self.label


def write_report(
    path: Path,
    *,
    recipe: dict,
    summary: dict,
    metrics: list[dict],
    confusion: np.ndarray | None,
    classes: Sequence[str],
    examples: Sequence[Example],
    mistakes: Sequence[Example],
    part: str,
) -> None:
    """Writes the report of a run to ``path``, whole or not at all.

    Args:
        path: of the HTML file; its folder exists.
        recipe: the resolved recipe, shown as JSON.
        summary: as in ``summary.json``; rates are fractions, anything may be missing or None.
        metrics: the records of ``metrics.jsonl``, of training and of evaluation; None and NaN leave a gap.
        confusion: (K, K) counts of images, rows the true class, columns the predicted; None without labels.
        classes: K names, in the order of the logits.
        examples, mistakes: images of ``part`` in the order to show; mistakes are the most confident wrong ones.
        part: "test" or "val", what confusion, examples and mistakes come from.

    Raises:
        OSError: the file cannot be written.
    """
    assert confusion is None or confusion.shape == (len(classes), len(classes)), (confusion.shape, len(classes))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "data_uri": data_uri}
    template = environment.from_string(resources.files("allmlp.evaluation").joinpath("report.html").read_text("utf-8"))
    page = template.render(
        summary=summary,
        part={"val": "validation"}.get(part, part),
        tiles=tiles(summary, confusion, part),
        details=details(summary),
        charts=curves(metrics),
        confusion=None if confusion is None else confusion_view(confusion, classes),
        examples=examples,
        mistakes=mistakes,
        recipe=json.dumps(recipe, indent=2, ensure_ascii=False, default=str),
    )
    with atomic_write(path) as draft:
        draft.write_text(page, encoding="utf-8", errors="backslashreplace")  # file names may hold lone surrogates


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion, as fractions; (0, 1) when nothing was counted.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22 (158). Unlike
    p ± 1.96 σ it stays within [0, 1] and keeps a width when all or none are correct.
    """
    if total == 0:
        return 0.0, 1.0
    z = 1.959964
    p, shrink = correct / total, 1 + z * z / total
    centre = (p + z * z / (2 * total)) / shrink
    half = z * math.sqrt(p * (1 - p) / total + (z / (2 * total)) ** 2) / shrink
    return max(centre - half, 0.0), min(centre + half, 1.0)


# Words and numbers


def percent(fraction: float | None, digits: int = 1) -> str:
    return "—" if fraction is None or not math.isfinite(fraction) else f"{100 * fraction:.{digits}f} %"


def count(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:.3g}"


def short(number: int) -> str:
    scale, unit = next(((s, u) for s, u in ((1e9, " G"), (1e6, " M"), (1e3, " k")) if number >= s), (1, ""))
    return f"{number / scale:.{1 if number >= 1e6 else 0}f}{unit}"


def duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole, minutes = round(seconds), round(seconds / 60)
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{minutes // 60} h {minutes % 60} min"


def memory(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return " · ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    return f"{value:,}" if type(value) is int else f"{value:.4g}" if isinstance(value, float) else str(value)


ROWS = {  # entries of the summary that are not shown as they are called or as they are
    "test_top1": ("test top-1", lambda value: percent(value, 2)),
    "val_top1": ("validation top-1", lambda value: percent(value, 2)),
    "train_seconds": ("training time", duration),
    "images_per_second": ("images per second", count),
    "peak_memory_bytes": ("peak memory", memory),
    "seed": ("seed", str),
}


def known(summary: Mapping, key: str) -> bool:
    value = summary.get(key)
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def write(summary: Mapping, key: str) -> str:
    return ROWS.get(key, (key, plain))[1](summary[key]) if known(summary, key) else "—"


def details(summary: Mapping) -> list[tuple[str, str]]:
    """Label and text of all that the summary knows, in its order; the template has a place for the two left out."""
    keys = [key for key in summary if key not in ("command", "unreadable") and known(summary, key)]
    return [(ROWS.get(key, (key.replace("_", " "),))[0], write(summary, key)) for key in keys]


def tiles(summary: Mapping, confusion: np.ndarray | None, part: str) -> list[tuple[str, str, str]]:
    """Label, figure and small print of the headline; "—" where a number is not known."""

    def note(key: str, text: str) -> str:
        return text.format(write(summary, key)) if known(summary, key) else ""

    small = {"test": "" if known(summary, "test_top1") else "no labelled test part", "val": ""}
    if confusion is not None:
        correct, total = int(np.trace(confusion)), int(confusion.sum())
        low, high = wilson(correct, total)
        small[part] = (
            f"{correct:,} of {total:,} correct, 95\u00a0%\u00a0interval {100 * low:.1f}–{100 * high:.1f}\u00a0%"
        )
    return [
        ("test top-1", write(summary, "test_top1"), small["test"]),
        ("validation top-1", write(summary, "val_top1"), small["val"]),
        ("parameters", short(summary["parameters"]) if known(summary, "parameters") else "—", note("model", "{}")),
        ("training time", write(summary, "train_seconds"), note("steps", "{} steps")),
        ("images per second", write(summary, "images_per_second"), note("device", "in training, on {}")),
    ]


# Images


def data_uri(image: Image.Image) -> str:
    """At most 160 px a side; an image of a few pixels is enlarged by a whole factor, so that they can be seen."""
    thumb, stream = image.convert("RGB"), io.BytesIO()
    if factor := max(thumb.size) < 80 and 128 // max(thumb.size):
        thumb = thumb.resize((thumb.width * factor, thumb.height * factor), Image.Resampling.NEAREST)
        thumb.save(stream, "png", optimize=True)
        return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    thumb.thumbnail((160, 160))
    thumb.save(stream, "jpeg", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


# The confusion matrix


def confusion_view(confusion: np.ndarray, classes: Sequence[str]) -> dict:
    """What the template shows of (K, K) counts: a table of all cells, or a picture and the most confused pairs."""
    images, predicted, correct = confusion.sum(1), confusion.sum(0), np.diag(confusion)
    recall = correct / np.where(images, images, np.nan)
    precision = correct / np.where(predicted, predicted, np.nan)
    order = np.argsort(recall, kind="stable")  # the weakest first; NaN, a class without images, last
    per_class = [(int(k), classes[k], int(images[k]), float(recall[k]), float(precision[k])) for k in order]
    view = {"classes": classes, "per_class": per_class, "cells": [], "picture": None, "pairs": []}
    share = confusion / np.maximum(images, 1)[:, None]
    if len(classes) <= TABLE_CLASSES:
        strength = np.sqrt(share)  # so that a class mistaken once in a hundred times still shows
        rows = zip(confusion.tolist(), strength.tolist(), strict=True)
        return view | {"cells": [list(zip(*row, strict=True)) for row in rows]}
    wrong = np.where(np.eye(len(classes), dtype=bool), 0, confusion)
    most = [divmod(int(cell), len(classes)) for cell in np.argsort(-wrong, axis=None, kind="stable")[:20]]
    pairs = [(classes[i], classes[j], int(wrong[i, j]), float(share[i, j])) for i, j in most if wrong[i, j]]
    return view | {"picture": matrix_picture(confusion), "pairs": pairs}
