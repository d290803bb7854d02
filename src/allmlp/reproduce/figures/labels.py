"""Labels of the points of a chart, placed so that they cover neither one another nor points and lines."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

NEAR, FAR = 6, 46  # points between a marker and its label
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (0.8, -0.8), (-0.8, 0.8), (-0.8, -0.8))
MARKER = 4  # half of a marker's size, in points
SPACING = 4  # pixels
AMBIGUOUS = 500  # square pixels that a label may cover rather than be nearer to another point than to its own


class Label(NamedTuple):
    x: float
    y: float
    text: str
    color: str


def place_labels(axes: Axes, labels: Sequence[Label], size: float = 7.5) -> list[Annotation]:
    """Draws the labels beside their points, with a line to it where the label is farther away.

    Each label takes the place, of those around its point, that covers least; those with the most neighbors are first.
    """
    figure: Any = axes.figure
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # the layout, from which positions in pixels follow
    renderer, scale = canvas.get_renderer(), figure.dpi / 72
    points = [axes.transData.transform((label.x, label.y)) for label in labels]
    taken = [around(point, MARKER * scale) for point in points]
    lines = [
        around(point, scale)
        for line in axes.lines
        for point in along(line.get_transform().transform(line.get_xydata()))
    ]
    frame = axes.get_window_extent(renderer)
    drawn: list[Annotation] = []
    for i in sorted(range(len(labels)), key=lambda i: -crowd(points, i)):
        label = labels[i]
        candidates = []
        for distance in range(NEAR, FAR, 4):
            for dx, dy in DIRECTIONS:
                text = annotate(axes, label, (dx * distance, dy * distance), size, line=distance > 2 * NEAR)
                box = text_box(text, renderer)
                outside = box.width * box.height - overlap(box, frame)
                covered = 50 * (sum(overlap(box, other) for other in taken) + outside)
                covered += sum(overlap(box, other) for other in lines)
                covered += AMBIGUOUS * (away(box, points[i]) > min_away(box, points, i))
                candidates.append((round(covered) + distance * 0.5, len(candidates), text, box))
        best = min(candidates)
        for candidate in candidates:
            if candidate is not best:
                candidate[2].remove()
        taken.append(best[3])
        drawn.append(best[2])
    return drawn


def text_box(label: Annotation, renderer: Any) -> Bbox:
    """Where the text is, without the line to its point, in pixels."""
    label.update_positions(renderer)
    return Text.get_window_extent(label, renderer)


def annotate(axes: Axes, label: Label, offset: tuple[float, float], size: float, line: bool) -> Annotation:
    """The text on the side of the point that the offset, in points, leads to."""
    horizontal = "left" if offset[0] > 0 else "right" if offset[0] < 0 else "center"
    vertical = "bottom" if offset[1] > 0 else "top" if offset[1] < 0 else "center"
    return axes.annotate(
        label.text,
        (label.x, label.y),
        offset,
        textcoords="offset points",
        fontsize=size,
        color=label.color,
        ha=horizontal,
        va=vertical,
        arrowprops={"arrowstyle": "-", "color": label.color, "linewidth": 0.5, "shrinkB": 3} if line else None,
    )


def crowd(points: Sequence[Any], i: int) -> int:
    """How many points lie within 60 pixels."""
    return sum(abs(x - points[i][0]) < 60 and abs(y - points[i][1]) < 60 for x, y in points)


def along(corners: Any) -> Iterator[Any]:
    """Points a few pixels apart on the line through the corners, (N, 2) pixels."""
    for start, end in pairwise(corners):
        steps = int(max(abs(end - start)) // SPACING) + 1
        yield from (start + (end - start) * step / steps for step in range(steps))


def away(box: Bbox, point: Any) -> float:
    """Pixels between a box and a point."""
    x, y = (max(low - at, at - high, 0.0) for low, at, high in zip(box.min, point, box.max, strict=True))
    return math.hypot(x, y)


def min_away(box: Bbox, points: Sequence[Any], i: int) -> float:
    """Pixels between a box and the nearest point but point ``i``."""
    return min((away(box, point) for j, point in enumerate(points) if j != i), default=math.inf)


def around(point: Any, half: float) -> Bbox:
    return Bbox.from_extents(point[0] - half, point[1] - half, point[0] + half, point[1] + half)


def overlap(first: Bbox, second: Bbox) -> float:
    """The common area, in square pixels."""
    width = min(first.x1, second.x1) - max(first.x0, second.x0)
    height = min(first.y1, second.y1) - max(first.y0, second.y0)
    return max(width, 0.0) * max(height, 0.0)
