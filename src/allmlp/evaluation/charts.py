"""Charts of a run as inline SVG in the page's colours, light or dark. No name of a class or file is drawn in them."""

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

CURVE_POINTS = 2000
INK, TRAIN, VALIDATION = "#010203", "#010204", "#010205"  # stand-ins that `svg` turns into the page's light or dark
CSS = {INK: "currentColor", TRAIN: "var(--train)", VALIDATION: "var(--validation)"}
HIT, MISS = (0.22, 0.47, 0.74), (0.83, 0.42, 0.18)  # legible on white and on near-black
STYLE: dict[Any, Any] = dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
) | {
    "svg.fonttype": "none",
    "svg.hashsalt": "allmlp",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "legend.frameon": False,
}


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
