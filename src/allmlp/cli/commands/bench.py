"""mixer bench"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from allmlp.api.recipe import height_and_width
from allmlp.cli.arguments import parse
from allmlp.cli.docstrings import help_from_docstrings
from allmlp.errors import UserError, printable
from allmlp.files import to_json, write_text

if TYPE_CHECKING:
    from allmlp.throughput.measure import Measurement

DESCRIPTION = """Measures what models cost, side by side: images per second, latency, training, memory, operations.

examples: mixer bench S/16 B/16 ViT-B/16 BiT-R50x1
          mixer bench B/16 model.safetensors --budget 3m --plot bench.png

All models alternate in every round, and medians over rounds are shown. Throughput is swept over batch sizes and the
best is reported, as in the paper. Models by name have random weights; no images are read."""


@dataclass(frozen=True, kw_only=True)
@help_from_docstrings
class Arguments:
    models: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL…", help_behavior_hint="(required)")
    ] = ()
    """Names (B/16, ViT-B/16, …: mixer models lists them) or weights."""
    image_size: tuple[int, ...] = ()
    """In pixels, one number, or height and width, for all models; by default that of each."""
    budget: str = "10m"
    """Time for everything: 90s, 10m, 1h."""
    batch_sizes: tuple[int, ...] = ()
    """Batch sizes to try; by default 1, 2, 4, … as far as it helps."""
    train: bool = True
    """Measure training steps too."""
    out: Path | None = None
    """A file for the results as JSON."""
    plot: Path | None = None
    """A file for the plot: .png, .svg or .pdf."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of matrix products; auto: bfloat16 if the hardware supports it."""
    json: bool = False
    """Print one JSON object."""


def run(args: Sequence[str]) -> None:
    arguments = parse(Arguments, args, command="bench", description=DESCRIPTION)
    from allmlp.api.bench import bench, describe_bench
    from allmlp.throughput.budget import parse_budget
    from allmlp.throughput.charts import check_plot, plot_measurements

    seconds = parse_budget(arguments.budget)
    for option, path in (("--out", arguments.out), ("--plot", arguments.plot)):
        check_writable(option, path)
    if arguments.plot is not None:
        check_plot(arguments.plot)
    rows = bench(
        arguments.models,
        image_size=height_and_width(arguments.image_size) if arguments.image_size else None,
        budget_seconds=seconds,
        batch_sizes=arguments.batch_sizes or None,
        train=arguments.train,
        device=arguments.device,
        precision=arguments.precision,
    )
    described = describe_bench(rows, arguments.device, arguments.precision)
    where = f"{described['device']}, {described['precision']}"
    if arguments.json:
        print(to_json(described))
    else:
        print_rows(rows, where, arguments.train)
    if arguments.out is not None:
        write_text(arguments.out, to_json(described, indent=2) + "\n")
    if arguments.plot is not None:
        plot_measurements(rows, arguments.plot, where)
    for row in rows:
        if row.problem:
            print(f"{printable(row.name)}: {row.problem}", file=sys.stderr)
        elif not row.alternated:
            print(f"{printable(row.name)}: measured by itself, since not all fit into memory together", file=sys.stderr)


def check_writable(option: str, path: Path | None) -> None:
    if path is not None and not path.parent.is_dir():
        raise UserError(f"{option} {path}: {path.parent} is not a folder: create it first")
    if path is not None and path.is_dir():
        raise UserError(f"{option} {path} is a folder: name a file in it")


def print_rows(rows: Sequence["Measurement"], where: str, trained: bool) -> None:
    from allmlp.cli.display import print_letters, print_table
    from allmlp.throughput.device_days import PRETRAININGS, device_days

    letters = print_letters([f"{row.name}, {row.image_size[0]} × {row.image_size[1]} px" for row in rows])
    pairs = list(zip(letters, rows, strict=True))
    print_table(
        f"inference on {where}: median of the rounds (lowest to highest)",
        ["", "images/s", "", f"ratio to {letters[0]}", "batch", "ms p50", "p90", "p99"],
        [
            [letter, number(row.images_per_second), spread(row.images_per_second_range), number(row.ratio),
             str(row.batch_size or "–"), *(number((row.latency_ms or {}).get(key)) for key in ("p50", "p90", "p99"))]
            for letter, row in pairs
        ],
    )  # fmt: skip
    print_table(
        "size, and training: AdamW, images per second",
        ["", "parameters", "GMACs", "peak memory", "train images/s", "", "batch"],
        [
            [letter, f"{number(row.parameters / 1e6)} M", f"{row.macs / 1e9:.3g}", memory(row.peak_memory_bytes),
             number(row.train_images_per_second), spread(row.train_images_per_second_range),
             str(row.train_batch_size or "–")]
            for letter, row in pairs
        ],
    )  # fmt: skip
    if trained and any(row.train_images_per_second for row in rows):
        print_table(
            "days of this device to pre-train as the paper does (epochs)",
            ["", *(f"{one.data} ({one.epochs})" for one in PRETRAININGS)],
            [
                [letter, *(number(device_days(one, rate) if (rate := row.train_images_per_second) else None)
                           for one in PRETRAININGS)]
                for letter, row in pairs
            ],
        )  # fmt: skip


def number(value: float | None) -> str:
    """Three digits; "–" for what was not measured."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def spread(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f"({number(bounds[0])} to {number(bounds[1])})"


def memory(size: int | None) -> str:
    return "–" if size is None else f"{number(size / 1e9)} GB"
