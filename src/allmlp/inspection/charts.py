"""Charts of a data set, without names of classes or files."""

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from allmlp.pages.svg import STYLE, TRAIN, VALIDATION, to_svg

Chart = tuple[str, Markup]  # caption and SVG


def draw_classes(images: np.ndarray) -> Chart:
    """The (K,) numbers of images of the classes, largest first."""
    sizes = -np.sort(-images)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.5, 2.8), layout="constrained")
        axes = figure.add_subplot(xlabel="classes, largest first", ylabel="images")
        axes.bar(np.arange(1, len(sizes) + 1), sizes, 0.85 if len(sizes) < 200 else 1.0, color=TRAIN, linewidth=0)
        axes.xaxis.set(major_locator=MaxNLocator(6, integer=True))
        axes.yaxis.set(major_locator=MaxNLocator(5, integer=True), major_formatter="{x:,.0f}")
        title = f"Images of {len(sizes)} classes, from {sizes.min():,} to {sizes.max():,}"
        return "Images by class", to_svg(figure, "classes", title)


def draw_sizes(sizes: np.ndarray) -> Chart:
    """Widths and heights, from (N, 2)."""
    top = max(float(np.quantile(sizes, 0.99)), 1.0)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.5, 2.8), layout="constrained")
        axes = figure.add_subplot(xlabel="pixels", ylabel="images")
        for values, name, color in ((sizes[:, 0], "width", TRAIN), (sizes[:, 1], "height", VALIDATION)):
            axes.hist(np.minimum(values, top), bins=40, range=(0, top * 1.02), color=color, alpha=0.55, label=name)
        axes.legend()
        axes.yaxis.set(major_locator=MaxNLocator(5, integer=True), major_formatter="{x:,.0f}")
        return "Sizes (the largest 1 % at the right end)", to_svg(figure, "sizes", "Widths and heights of the images")
