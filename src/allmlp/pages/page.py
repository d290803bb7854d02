"""Self-contained HTML pages: one style, numbers as text, and pictures inside the file."""

import base64
import io
import math
from collections.abc import Mapping
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from allmlp.files import atomic_write

THUMBNAIL = 160  # pixels of its longer side


def write_page(path: Path, package: str, template: str, **values: Any) -> None:
    """Writes a page to ``path``, atomically.

    Args:
        path: the HTML file to write, in an existing folder.
        package: the package that holds the template, and those that it imports.
        template: its name; it extends this package's ``page.html``.
        values: what the template shows; text is escaped.

    Raises:
        OSError: the file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(partial(read_template, package)),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": format_percent, "data_uri": data_uri}
    page = environment.get_template(template).render(**values)
    with atomic_write(path) as draft:
        draft.write_text(page, encoding="utf-8", errors="backslashreplace")  # file names may hold lone surrogates


def read_template(package: str, name: str) -> str:
    return resources.files("allmlp.pages" if name == "page.html" else package).joinpath(name).read_text("utf-8")


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
