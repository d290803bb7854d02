"""The pictures, in the paper's colors: Mixer pink, convolutions yellow, attention blue."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from allmlp.factory import resolve_name
from allmlp.reproduce.figures.frontier import pareto_frontier
from allmlp.reproduce.figures.labels import Label, place_labels
from allmlp.reproduce.patches import KINDS
from allmlp.reproduce.published import IMAGENET, IMAGENET21K, JFT, WEB
from allmlp.zoo.systems import SYSTEMS

MIXER, CONVOLUTION, ATTENTION = "#d1308b", "#b8860b", "#2a6fbb"  # pink, yellow (dark enough for text) and blue
COLORS = {"mixer": MIXER, "bit": CONVOLUTION, "nfnet": CONVOLUTION, "efficientnet": CONVOLUTION, "vit": ATTENTION,
          "halonet": ATTENTION, "botnet": ATTENTION}  # fmt: skip
MARKERS = {JFT: "o", IMAGENET21K: "s", IMAGENET: "D", WEB: "^"}
COST = "pre-training (TPU-v3 core-days)"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "allmlp",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
Row = Mapping[str, Any]


def family_of(row: Row) -> str:
    """ "mixer", or the family of a comparison system."""
    name = resolve_name(row["built_as"].partition(" at ")[0])
    return SYSTEMS[name].family if name in SYSTEMS else "mixer"


def draw_frontier(rows: Sequence[Row]) -> Figure:
    """Figure 2, left: accuracy against the cost of pre-training, with the Pareto frontier as a dashed line."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.6), dpi=150, layout="constrained")
        axes = figure.add_subplot(xlabel=COST, ylabel="ImageNet top-1 (%)", xscale="log")
        frontier = [rows[i] for i in pareto_frontier([(row["core_days"], row["top1"]) for row in rows])]
        axes.plot(
            [row["core_days"] for row in frontier],
            [row["top1"] for row in frontier],
            color="0.45",
            linestyle="--",
            linewidth=1,
            zorder=1,
        )
        axes.annotate(
            "Pareto frontier",
            (frontier[-1]["core_days"], frontier[-1]["top1"]),
            (-12, 2),
            ha="right",
            textcoords="offset points",
            color="0.45",
            fontsize=7.5,
        )
        draw_points(axes, rows, "core_days", "top1")
        widen(axes, rows, "core_days", "top1")
        axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
        present = dict.fromkeys(row["data"] for row in rows)
        handles = [
            Line2D([], [], color="0.3", marker=MARKERS[data], linestyle="", markersize=6, label=data)
            for data in MARKERS
            if data in present
        ]
        families = axes.legend(handles=family_handles(), loc="upper left")
        axes.add_artist(families)  # or the next legend would replace it
        axes.legend(handles=handles, loc="lower right", title="pre-trained on", title_fontsize=8, alignment="left")
        place_labels(axes, [label_of(row, "core_days", "top1") for row in rows])
    return figure


def draw_scales(rows: Sequence[Row]) -> Figure:
    """Figure 3: accuracy against the cost of pre-training (left) and throughput (right)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.4), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        left.set(xlabel=COST, ylabel="ImageNet top-1 (%)", xscale="log")
        right.set(xlabel="throughput (images/s on a TPU-v3 core)", xscale="log")
        for axes, key in ((left, "core_days"), (right, "images_per_second")):
            draw_scaling(axes, rows, key)
        left.legend(handles=family_handles(), loc="lower right")
        for axes, key in ((left, "core_days"), (right, "images_per_second")):
            place_labels(axes, [label_of(row, key, "top1") for row in rows])
    return figure


def draw_measured_scales(rows: Sequence[Row], device: str) -> Figure | None:
    """The right part of Figure 3 with the throughput measured here; None where nothing was measured."""
    measured = [row for row in rows if row["measured_images_per_second"] is not None]
    if not measured:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 4.4), dpi=150, layout="constrained")
        axes = figure.add_subplot(xscale="log", ylabel="ImageNet top-1 (%), published")
        axes.set_xlabel(f"throughput measured here (images/s; {device})")
        draw_scaling(axes, measured, "measured_images_per_second")
        axes.legend(handles=family_handles(), loc="lower left")
        place_labels(axes, [label_of(row, "measured_images_per_second", "top1") for row in measured])
    return figure


def draw_scaling(axes: Axes, rows: Sequence[Row], key: str) -> None:
    """Points, and a line through each family from its lowest accuracy to its highest."""
    for family in dict.fromkeys(map(family_of, rows)):
        mine = sorted((row for row in rows if family_of(row) == family), key=lambda row: row["top1"])
        axes.plot(
            [row[key] for row in mine], [row["top1"] for row in mine], color=COLORS[family], linewidth=0.8, alpha=0.4,
            zorder=1,
        )  # fmt: skip
    draw_points(axes, rows, key, "top1")
    widen(axes, rows, key, "top1")
    axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
    axes.grid(color="0.9", linewidth=0.6)


def draw_points(axes: Axes, rows: Sequence[Row], x: str, y: str) -> None:
    for row in rows:
        axes.plot(row[x], row[y], marker=MARKERS[row["data"]], color=COLORS[family_of(row)], markersize=6, zorder=2)


def widen(axes: Axes, rows: Sequence[Row], x: str, y: str) -> None:
    """Room around the points for their labels; the horizontal axis is logarithmic."""
    xs, ys = [row[x] for row in rows], [row[y] for row in rows]
    ratio, span = max((max(xs) / min(xs)) ** 0.16, 1.5), max(max(ys) - min(ys), 1.0)
    axes.set(xlim=(min(xs) / ratio, max(xs) * ratio), ylim=(min(ys) - 0.12 * span, max(ys) + 0.1 * span))


def label_of(row: Row, x: str, y: str) -> Label:
    return Label(row[x], row[y], row["label"], COLORS[family_of(row)])


def family_handles() -> list[Line2D]:
    names = {MIXER: "MLP (Mixer)", CONVOLUTION: "convolution", ATTENTION: "attention"}
    return [Line2D([], [], color=color, linewidth=4, label=name) for color, name in names.items()]


def plain_number(value: float, position: int) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def draw_patches(rows: Sequence[Row], device: str) -> Figure:
    """Operations (left) and time (right) of one image against the number of patches, both axes logarithmic."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.4), dpi=150, layout="constrained")
        counted, timed = figure.subplots(1, 2)
        counted.set_title("multiply-accumulates, counted", fontsize=9)
        timed.set_title(f"time, measured ({device})", fontsize=9)
        counted.set_ylabel("GMAC per image")
        timed.set_ylabel("milliseconds per image")
        for axes, key, scale in ((counted, "macs", 1e-9), (timed, "seconds", 1e3)):
            axes.set(xlabel="number of patches", xscale="log", yscale="log")
            draw_growth(axes, rows, key, scale)
        timed.legend(loc="upper left")
    return figure


def draw_growth(axes: Axes, rows: Sequence[Row], key: str, scale: float) -> None:
    styles = ("-", "--", ":")
    for kind in KINDS:
        mine = [row for row in rows if row["kind"] == kind.key]
        if kind.key == "fused_attention" and key == "macs":
            continue  # the same operations
        same = [other.key for other in KINDS if other.mixer == kind.mixer]
        last = mine[-1][f"{key}_exponent"]
        axes.plot(
            [row["patches"] for row in mine],
            [row[key] * scale for row in mine],
            color=MIXER if kind.mixer else ATTENTION,
            linestyle=styles[same.index(kind.key)],
            marker="o",
            markersize=4,
            label=f"{kind.name}: $S^{{{last:.2f}}}$ at the end" if last is not None else kind.name,
        )
    numbers = sorted({row["patches"] for row in rows})
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set(major_locator=LogLocator(), minor_formatter=NullFormatter())
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_ylim(top=3 * axes.get_ylim()[1])
    if key == "macs":
        axes.legend(loc="upper left")
