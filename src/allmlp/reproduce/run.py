"""Any of the paper's tables and figures by name, with its files."""

import difflib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from allmlp.api.evaluate import Part
from allmlp.api.progress import progress_bar
from allmlp.device import Precision, choose_device, select_precision
from allmlp.errors import UserError
from allmlp.reproduce.accuracy import Accuracy, AccuracyOptions, measure_accuracy
from allmlp.reproduce.data_size import SMALL_MODELS, DataSizeSettings, run_data_size
from allmlp.reproduce.figures.contents import figure2_left, figure3, patches_table, pictures, rows_of_figure_3
from allmlp.reproduce.figures.data_size import data_size_table
from allmlp.reproduce.outputs import check_folder, describe_machine, write_table
from allmlp.reproduce.patches import measure_patches
from allmlp.reproduce.published import PublishedRow
from allmlp.reproduce.selection import Selection, select
from allmlp.reproduce.speeds import Measure, Speed, SpeedOptions, check_budget, measure_speeds
from allmlp.reproduce.tables.comparison import TABLES, assign, comparison, plan, systems_of
from allmlp.reproduce.tables.table import Table
from allmlp.reproduce.tables.table1 import table1
from allmlp.reproduce.tables.table4 import table4

RIGHT = "figure2-right"  # folder of the experiment's data sets and runs
PATCHES_SECONDS = 60.0  # more time would change little


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to reproduce.

    models: rows of the tables, by name, and weights to evaluate; none: all rows.
    data, part, real_labels: what weights are evaluated on.
    measure: measure speeds too, within the budget; False: published and computed numbers alone.
    speed_of: measures the speeds.
    """

    out: Path
    models: Sequence[str] = ()
    data: str | None = None
    part: Part = "test"
    real_labels: Path | None = None
    measure: bool = True
    budget_seconds: float = 600.0
    device: str = "auto"
    precision: Precision = "auto"
    progress: bool | None = None
    speed_of: Measure = measure_speeds


def reproduce(target: str, options: Options) -> tuple[Table, dict[str, Any]]:
    """Reproduces a table or figure, and writes its files.

    Returns:
        The table, and the content of its JSON file.

    Raises:
        UserError: an unknown name, models without a row, weights without data, a budget that is too small.
        RunError: too little memory, or a device that failed.
    """
    if target not in TARGETS:
        near = difflib.get_close_matches(target, TARGETS, 2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"unknown table or figure {target!r}: {hint}there are {', '.join(TARGETS)}")
    check_folder(options.out)
    check_options(target, options)
    device = choose_device(options.device)
    table = TARGETS[target](options)
    machine = describe_machine(device)
    name = machine["hardware"]["device"]
    figures = pictures(table, "cpu, 1 thread" if target == "patches" and device.type == "cpu" else name)
    return table, write_table(table, figures, machine, options.out)


def check_options(target: str, options: Options) -> None:
    """Raises a UserError for options that the target would ignore."""
    if options.models and target == "figure2" and options.data is None:
        raise UserError(f"--models {options.models[0]}: the left part of figure2 shows all; give --data for the right")
    if options.models and target not in (*TABLES, "figure2", "figure3"):
        raise UserError(f"--models {options.models[0]}: {target} always shows all models: leave the option out")
    if options.data is not None and target not in (*TABLES, "figure2"):
        have = ", ".join((*TABLES, "figure2"))
        raise UserError(f"--data {options.data}: {target} has no accuracies to measure; {have} have")
    if options.real_labels is not None and target == "figure2":
        raise UserError(f"--real-labels {options.real_labels}: figure2 does not use them: leave the option out")
    if options.real_labels is not None and options.data is None:
        raise UserError(f"--real-labels {options.real_labels}: give --data with ImageNet's validation images too")
    if target == "patches" and not options.measure:
        raise UserError("--no-measure: the paper has no numbers for patches; leave the option out")


def compared(name: Literal["table2", "table3"], options: Options) -> Table:
    """Table 2 or 3: accuracies of weights, then speeds."""
    selection = select(name, TABLES[name](), options.models, options.data is not None)
    accuracies = evaluate_all(name, selection, options)
    of_row, others = assign(name, accuracies)
    rows = tuple(row for row in TABLES[name]() if row in selection.rows or row in of_row)
    speeds, details = speeds_of(rows, others, options)
    return comparison(name, rows, accuracies, speeds, details)


def evaluate_all(name: Literal["table2", "table3"], selection: Selection, options: Options) -> list[Accuracy]:
    if options.data is None:
        return []
    evaluation = AccuracyOptions(
        data=options.data,
        part=options.part,
        real_labels=options.real_labels,
        device=options.device,
        precision=options.precision,
        progress=options.progress,
    )
    return [measure_accuracy(weights, name, evaluation) for weights in selection.weights]


def speeds_of(
    rows: Sequence[PublishedRow], accuracies: Sequence[Accuracy], options: Options, train: bool = True
) -> tuple[dict[str, Speed] | None, dict[str, Any]]:
    """The speeds for these rows, None without measuring; and what the JSON tells about how they were measured."""
    if not options.measure:
        return None, {"measured": False}
    check_budget(len(systems_of(rows)) + len(accuracies), options.budget_seconds)  # before anything is computed
    start = time.perf_counter()
    configs, trained = plan(rows, accuracies)  # counts operations, which takes its time for the largest models
    with progress_bar(options.progress) as bar:
        settings = SpeedOptions(
            device=options.device,
            precision=options.precision,
            budget_seconds=options.budget_seconds - (time.perf_counter() - start),
            on_progress=lambda text: bar.update(0, None, text),
        )
        speeds = options.speed_of(configs, trained if train else (), settings)
    precision = select_precision(options.precision, choose_device(options.device))
    details = {
        "measured": True,
        "budget_seconds": options.budget_seconds,
        "precision": str(precision).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "speeds": {name: vars(speed) for name, speed in speeds.items()},
    }
    return speeds, details


def scales(options: Options) -> Table:
    """Figure 3."""
    selection = select("figure3", rows_of_figure_3(), options.models, has_data=False)
    speeds, details = speeds_of(selection.rows, (), options, train=False)
    return figure3(speeds, selection.rows, details)


def growth_with_patches(options: Options) -> Table:
    budget = min(options.budget_seconds, PATCHES_SECONDS)
    with progress_bar(options.progress) as bar:
        rows = measure_patches(device=options.device, budget_seconds=budget, on_progress=bar.update)
    return patches_table(rows, {"budget_seconds": budget, "precision": "float32", "threads": 1})


def figure2(options: Options) -> Table:
    """The left part, of published numbers; with data, the right part as an experiment."""
    if options.data is None:
        return figure2_left()
    settings = DataSizeSettings(device=options.device, precision=options.precision)
    models = tuple(options.models) or tuple(SMALL_MODELS)
    return data_size_table(
        run_data_size(options.data, options.out / RIGHT, models, settings, progress=options.progress)
    )


TARGETS: dict[str, Callable[[Options], Table]] = {
    "table1": lambda options: table1(),
    "table2": lambda options: compared("table2", options),
    "table3": lambda options: compared("table3", options),
    "table4": lambda options: table4(),
    "figure2": figure2,
    "figure3": scales,
    "patches": growth_with_patches,
}
