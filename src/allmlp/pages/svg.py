"""Charts as inline SVG, in the colors of the page, light or dark."""

import html
import io
import re
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

# Placeholders: `to_svg` inserts the colors of the page
INK, TRAIN, VALIDATION = "#010203", "#010204", "#010205"
CSS = {INK: "currentColor", TRAIN: "var(--train)", VALIDATION: "var(--validation)"}
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


def to_svg(figure: Figure, name: str, title: str) -> Markup:
    """The figure as inline SVG in the colors of the page; ``name`` makes its ids unique on the page."""
    stream = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # it contains URLs and differs between runs
    figure.savefig(stream, format="svg", transparent=True, metadata=no_metadata)

    def adapt(tag: re.Match) -> str:
        text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag[0])
        return re.sub("|".join(CSS), lambda color: CSS[color[0]], text)

    text = re.sub(r"<[^>]+>", adapt, stream.getvalue().partition("<svg ")[2])
    return Markup(f'<svg role="img" aria-label="{html.escape(title)}" {text}')
