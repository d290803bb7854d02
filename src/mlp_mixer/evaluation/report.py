"""The report of a training run: one HTML file that needs no network, no script and no other file.

Every name in it (classes, files, devices) is untrusted text: the template escapes all but the charts drawn here, and
those hold no names.
"""

import base64
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from mlp_mixer.files import replacing

TABLE_CLASSES = 30  # above this, a confusion matrix with numbers in it is no longer readable
CURVE_POINTS = 2000
INK, TRAIN, VALIDATION = "#010203", "#010204", "#010205"  # stand-ins that `svg` turns into the page's light or dark
CSS = {INK: "currentColor", TRAIN: "var(--train)", VALIDATION: "var(--validation)"}
HIT, MISS = (0.22, 0.47, 0.74), (0.83, 0.42, 0.18)  # legible on white and on near-black
STYLE: dict[Any, Any] = dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
) | {
    "svg.fonttype": "none",
    "svg.hashsalt": "mlp_mixer",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "legend.frameon": False,
}


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
    template = environment.from_string(
        resources.files("mlp_mixer.evaluation").joinpath("report.html").read_text("utf-8")
    )
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
    with replacing(path) as draft:
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


# Images and charts


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


def svg(figure: Figure, name: str, title: str) -> Markup:
    """The figure as inline SVG in the page's colours; ``name`` keeps its ids apart from other figures'."""
    stream = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # it holds addresses, and differs by run
    figure.savefig(stream, format="svg", transparent=True, metadata=no_metadata)

    def adapt(tag: re.Match) -> str:
        text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag[0])
        return re.sub("|".join(CSS), lambda colour: CSS[colour[0]], text)

    text = re.sub(r"<[^>]+>", adapt, stream.getvalue().partition("<svg ")[2])
    return Markup(f'<svg role="img" aria-label="{html.escape(title)}" {text}')


def curve(metrics: Sequence[Mapping], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of ``key``; of a step that a resumed run repeated, the last. NaN where it is not finite."""
    points = {record["step"]: record[key] for record in metrics if key in record and "step" in record}
    values = np.array([points[step] for step in sorted(points)], dtype=float)  # None becomes NaN
    return np.array(sorted(points), dtype=float), np.where(np.isfinite(values), values, np.nan)


def thin(values: np.ndarray, limit: int = CURVE_POINTS) -> np.ndarray:
    """Indices of at most ``limit`` points, the lowest and the highest of each stretch, so that spikes survive."""
    if len(values) <= limit:
        return np.arange(len(values))
    stretches = np.array_split(np.arange(len(values)), limit // 2)
    low, high = np.nan_to_num(values, nan=np.inf), np.nan_to_num(values, nan=-np.inf)
    return np.unique([[part[np.argmin(low[part])], part[np.argmax(high[part])]] for part in stretches])


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of 1/40 of the curve, centred so that it does not lag; gaps stay gaps."""
    half, seen, at = len(values) // 80, np.isfinite(values), np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    sums = np.cumsum([np.r_[0.0, np.where(seen, values, 0)], np.r_[0.0, seen]], axis=1)
    total, number = sums[:, high] - sums[:, low]
    return np.where(seen, total / np.maximum(number, 1), np.nan)


def curves(metrics: Sequence[Mapping]) -> list[tuple[str, Markup]]:
    """Caption and chart of each quantity that was recorded at least once, all over the same steps."""
    last = max((record["step"] for record in metrics if "step" in record), default=0)
    plots = [  # caption, vertical axis, its kind, lines: (key, name, colour, scale)
        ("Loss", "loss (nats)", "linear", [("loss", "training", TRAIN, 1), ("val_loss", "validation", VALIDATION, 1)]),
        ("Validation top-1", "correct (%)", "linear", [("val_top1", "validation", VALIDATION, 100)]),
        ("Learning rate", "learning rate", "linear", [("learning_rate", "learning rate", TRAIN, 1)]),
        ("Gradient norm", "ℓ2 norm, logarithmic", "log", [("gradient_norm", "gradient norm", TRAIN, 1)]),
    ]
    charts = []
    for caption, label, kind, lines in plots:
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(4.5, 2.8), layout="constrained")
            axes = figure.add_subplot(xlabel="step", ylabel=label, yscale=kind, xlim=(0, max(last, 1) * 1.02))
            if kind == "log":
                axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_formatter=NullFormatter())
                axes.yaxis.set_major_formatter("{x:g}")
            told = [draw(axes, *curve(metrics, key), name, colour, scale) for key, name, colour, scale in lines]
            if not (drawn := [text for text in told if text]):
                continue
            if len(drawn) > 1:
                axes.legend(loc="upper right")
            axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
            axes.xaxis.set(major_locator=MaxNLocator(6, integer=True), major_formatter="{x:,.0f}")
            charts.append((caption, svg(figure, f"chart{len(charts)}", f"{caption} by step: {'; '.join(drawn)}")))
    return charts


def draw(axes: Axes, steps: np.ndarray, values: np.ndarray, name: str, colour: str, scale: float) -> str:
    """One line, and behind a long one its points as they were; where it starts and ends in words, or "" if nowhere."""
    values = np.where(values > 0, values, np.nan) if axes.get_yscale() == "log" else values * scale
    seen = np.isfinite(values)
    if not seen.any():
        return ""
    first, last = values[seen][[0, -1]]
    if len(values) >= 80 and name != "learning rate":  # exact already: a mean would round off its corners
        at = thin(values)
        axes.plot(steps[at], values[at], color=colour, linewidth=0.5, alpha=0.3)
        values = smooth(values)
    at = thin(values)
    axes.plot(steps[at], values[at], color=colour, label=name, marker="o" if len(at) <= 40 else "", markersize=3)
    return f"{name} from {first:.3g} to {last:.3g}"


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


def matrix_picture(confusion: np.ndarray) -> Markup:
    """The matrix of many classes as an image of at most 250 × 250 blocks of neighbouring classes."""
    size = len(confusion)
    block = math.ceil(size / 250)
    starts = np.arange(0, size, block)
    counts = np.add.reduceat(np.add.reduceat(confusion, starts, axis=0), starts, axis=1)
    pixels = np.zeros((*counts.shape, 4))
    pixels[..., :3] = np.where(np.eye(len(counts), dtype=bool)[..., None], HIT, MISS)
    pixels[..., 3] = np.sqrt(counts / np.maximum(counts.sum(1, keepdims=True), 1))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, 4.7), layout="constrained")
        unit = "by number" if block == 1 else f"by number, in blocks of {block}"
        axes = figure.add_subplot(xlabel=f"predicted class, {unit}", ylabel=f"true class, {unit}")
        axes.spines[:].set_visible(True)
        axes.imshow(pixels, extent=(0, len(counts) * block, len(counts) * block, 0), interpolation="none")
        return svg(figure, "confusion", f"Confusion matrix of {size} classes; correct predictions on the diagonal")
