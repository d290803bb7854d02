"""The plot of a benchmark: throughput against batch size, and throughput of inference and training side by side."""

from collections.abc import Sequence
from pathlib import Path

from allmlp.errors import UserError
from allmlp.files import atomic_write
from allmlp.throughput.measure import Measurement

FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raises a UserError for a file name that is no picture's."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--plot {path}: give a file name that ends in {', '.join(FORMATS)}")


def plot_measurements(rows: Sequence[Measurement], path: Path, title: str) -> None:
    """Writes the plot; models without a measurement are left out."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    check_plot(path)
    measured = [row for row in rows if row.images_per_second is not None]
    figure = Figure(figsize=(9, 3.2 + 0.16 * len(measured)), layout="constrained")
    sweep, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    for number, row in enumerate(measured):
        points = [(size, rate) for size, rate in row.sweep.items() if rate is not None]
        color = f"C{number % 10}"
        style = ("-", "--", ":")[number // 10 % 3]
        sweep.plot(*zip(*points, strict=True), color=color, linestyle=style, marker="o", markersize=3, label=row.name)
        sweep.plot([row.batch_size], [row.images_per_second], color=color, marker="o", markersize=8, fillstyle="none")
    sweep.set(xscale="log", yscale="log", xlabel="batch size", ylabel="images / s", title="inference")
    sweep.set_xscale("log", base=2)
    sweep.xaxis.set_major_formatter("{x:g}")
    sweep.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_formatter=NullFormatter())
    sweep.yaxis.set_major_formatter("{x:g}")
    sweep.grid(alpha=0.3, linewidth=0.6)
    if measured:
        sweep.legend(fontsize="small", frameon=False)
    positions = range(len(measured))
    rates = [row.images_per_second or 0 for row in measured]
    trained = [row.train_images_per_second or 0 for row in measured]
    for offset, values, label, color in ((-0.2, rates, "inference", "C0"), (0.2, trained, "training", "C1")):
        drawn = bars.barh([p + offset for p in positions], values, 0.4, label=label, color=color)
        bars.bar_label(drawn, [f"{value:.3g}" if value else "–" for value in values], padding=2, fontsize="small")
    bars.set(xlabel="images / s", yticks=list(positions), yticklabels=[row.name for row in measured])
    bars.margins(x=0.15)
    bars.set_title("best batch size")
    bars.invert_yaxis()
    bars.legend(fontsize="small", frameon=False)
    figure.suptitle(title, fontsize="medium")
    with atomic_write(path) as draft:
        figure.savefig(draft, dpi=150, format=path.suffix[1:].lower())
