"""Charts of a run and of an evaluation, without names of classes or files."""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from allmlp.evaluation.calibration import Calibration
from allmlp.pages.svg import INK, STYLE, TRAIN, VALIDATION, to_svg

CURVE_POINTS = 2000
CORRECT, WRONG = (0.22, 0.47, 0.74), (0.83, 0.42, 0.18)  # legible on white and on near-black


def extract_curve(metrics: Sequence[Mapping], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of ``key``, NaN where not finite. For a step that a resumed run repeated, the last value."""
    points = {record["step"]: record[key] for record in metrics if key in record and "step" in record}
    values = np.array([points[step] for step in sorted(points)], dtype=float)  # None becomes NaN
    return np.array(sorted(points), dtype=float), np.where(np.isfinite(values), values, np.nan)


def downsample(values: np.ndarray, limit: int = CURVE_POINTS) -> np.ndarray:
    """Indices of at most ``limit`` points: the minimum and maximum of each interval, so that spikes are kept."""
    if len(values) <= limit:
        return np.arange(len(values))
    intervals = np.array_split(np.arange(len(values)), limit // 2)
    low, high = np.nan_to_num(values, nan=np.inf), np.nan_to_num(values, nan=-np.inf)
    return np.unique([[one[np.argmin(low[one])], one[np.argmax(high[one])]] for one in intervals])


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centered window of 1/40 of the curve; gaps are kept."""
    half, finite, position = len(values) // 80, np.isfinite(values), np.arange(len(values))
    low, high = np.maximum(position - half, 0), np.minimum(position + half + 1, len(values))
    sums = np.cumsum([np.r_[0.0, np.where(finite, values, 0)], np.r_[0.0, finite]], axis=1)
    total, number = sums[:, high] - sums[:, low]
    return np.where(finite, total / np.maximum(number, 1), np.nan)


def draw_curves(metrics: Sequence[Mapping]) -> list[tuple[str, Markup]]:
    """Caption and chart of each quantity that was recorded at least once, all with the same horizontal axis."""
    last = max((record["step"] for record in metrics if "step" in record), default=0)
    accuracies = [("val_top1", "validation", VALIDATION, 100), ("val_majority", "commonest class", TRAIN, 100)]
    plots = [  # caption, label of the vertical axis, its scale, lines: (key, name, color, factor)
        ("Loss", "loss (nats)", "linear", [("loss", "training", TRAIN, 1), ("val_loss", "validation", VALIDATION, 1)]),
        ("Validation top-1", "correct (%)", "linear", accuracies),
        ("Learning rate", "learning rate", "linear", [("learning_rate", "learning rate", TRAIN, 1)]),
        ("Gradient norm", "ℓ2 norm, logarithmic", "log", [("gradient_norm", "gradient norm", TRAIN, 1)]),
    ]
    probes = [key for key in dict.fromkeys(key for record in metrics for key in record) if key.startswith("fewshot_")]
    for i, key in enumerate(probes):
        name, color = key.removeprefix("fewshot_").replace("_", " "), (VALIDATION, TRAIN)[i % 2]
        plots.append((f"Few-shot top-1: {name}", "correct (%)", "linear", [(key, name, color, 100)]))
    charts = []
    for caption, label, scale, lines in plots:
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(4.5, 2.8), layout="constrained")
            axes = figure.add_subplot(xlabel="step", ylabel=label, yscale=scale, xlim=(0, max(last, 1) * 1.02))
            if scale == "log":
                axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_formatter=NullFormatter())
                axes.yaxis.set_major_formatter("{x:g}")
            texts = [
                draw_line(axes, *extract_curve(metrics, key), name, color, factor) for key, name, color, factor in lines
            ]
            if not (texts := [text for text in texts if text]):
                continue
            if len(texts) > 1:
                axes.legend(loc="upper right")
            axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
            axes.xaxis.set(major_locator=MaxNLocator(6, integer=True), major_formatter="{x:,.0f}")
            charts.append((caption, to_svg(figure, f"chart{len(charts)}", f"{caption} by step: {'; '.join(texts)}")))
    return charts


def draw_line(axes: Axes, steps: np.ndarray, values: np.ndarray, name: str, color: str, factor: float) -> str:
    """Draws one line, smoothed over its recorded values if it is long.

    Returns:
        Its first and last value in words; "" if there is nothing to draw.
    """
    values = np.where(values > 0, values, np.nan) if axes.get_yscale() == "log" else values * factor
    finite = np.isfinite(values)
    if not finite.any():
        return ""
    first, last = values[finite][[0, -1]]
    if len(values) >= 80 and name != "learning rate":  # which has no noise: smoothing would only round its corners
        kept = downsample(values)
        axes.plot(steps[kept], values[kept], color=color, linewidth=0.5, alpha=0.3)
        values = smooth(values)
    kept = downsample(values)
    axes.plot(steps[kept], values[kept], color=color, label=name, marker="o" if len(kept) <= 40 else "", markersize=3)
    return f"{name} from {first:.3g} to {last:.3g}"


def draw_confusion_image(pairs: np.ndarray, size: int) -> Markup:
    """The confusion matrix of many classes as an image of at most 250 × 250 blocks of adjacent classes.

    Args:
        pairs: (M, 3) true class, predicted class and number of images.
        size: number of classes.
    """
    block = math.ceil(size / 250)
    counts = np.zeros([math.ceil(size / block)] * 2, dtype=int)
    np.add.at(counts, (pairs[:, 0] // block, pairs[:, 1] // block), pairs[:, 2])
    pixels = np.zeros((*counts.shape, 4))
    pixels[..., :3] = np.where(np.eye(len(counts), dtype=bool)[..., None], CORRECT, WRONG)
    pixels[..., 3] = np.sqrt(counts / np.maximum(counts.sum(1, keepdims=True), 1))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, 4.7), layout="constrained")
        unit = "by number" if block == 1 else f"by number, in blocks of {block}"
        axes = figure.add_subplot(xlabel=f"predicted class, {unit}", ylabel=f"true class, {unit}")
        axes.spines[:].set_visible(True)
        axes.imshow(pixels, extent=(0, len(counts) * block, len(counts) * block, 0), interpolation="none")
        diagonal = "correct predictions" if block == 1 else "predictions of a class in the same block"
        return to_svg(figure, "confusion", f"Confusion matrix of {size} classes; {diagonal} on the diagonal")


def draw_reliability(calibration: Calibration, name: str) -> Markup:
    """The reliability diagram: accuracy by the probability of the predicted class, with the share of images below.

    ``name`` makes the ids of the SVG unique on the page.
    """
    bins, filled = len(calibration.images), calibration.images > 0
    centers = (np.arange(bins) + 0.5) / bins
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.5, 4.2), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.set(ylabel="correct (%)", xlim=(0, 100), ylim=(0, 100))
        upper.plot([0, 100], [0, 100], color=INK, linewidth=0.8, linestyle="--", label="calibrated")
        upper.bar(
            100 * centers[filled], 100 * calibration.accuracy[filled], 90 / bins, color=TRAIN, alpha=0.35, linewidth=0
        )
        upper.plot(
            100 * calibration.confidence[filled],
            100 * calibration.accuracy[filled],
            color=TRAIN,
            marker="o",
            markersize=3,
            label="this model",
        )
        upper.legend(loc="upper left")
        lower.bar(
            100 * centers, 100 * calibration.images / calibration.images.sum(), 90 / bins, color=TRAIN, linewidth=0
        )
        lower.set(xlabel="probability of the predicted class (%)", ylabel="images (%)")
        return to_svg(figure, name, f"Reliability diagram; expected calibration error {calibration.ece:.3f}")
