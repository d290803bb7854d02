"""Tables 2 and 3: the systems that the paper compares, published beside measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from allmlp.errors import UserError
from allmlp.factory import build_meta, describe_model, name_of
from allmlp.flops import Cost, cost
from allmlp.reproduce.accuracy import Accuracy
from allmlp.reproduce.published import PRETRAINING_SIZE, PublishedRow, system_key, table_2, table_3
from allmlp.reproduce.selection import row_of_weights
from allmlp.reproduce.speeds import Speed
from allmlp.reproduce.systems import system_at
from allmlp.reproduce.tables.table import Column, Table, View, decimals, integer, significant
from allmlp.throughput.device_days import DAY
from allmlp.zoo.systems import SYSTEMS

TABLES = {"table2": table_2, "table3": table_3}
REFERENCE = system_key("Mixer-B/16", PRETRAINING_SIZE)  # speeds are also given as multiples of this one's
percent = decimals(2)

COLUMNS = (
    Column(key="model", name="model", short="model"),
    Column(key="built_as", name="built as", short="built as"),
    Column(key="data", name="pre-training data", short="data"),
    Column(key="image_size", name="image size", unit="pixels", short="px", form=integer),
    Column(key="epochs", name="pre-training epochs", short="epochs", source="published", form=integer),
    Column(key="preprint_only", name="only in the preprint", short="preprint"),
    Column(key="top1", name="ImageNet top-1", unit="percent", short="top-1", source="published", form=percent),
    Column(key="measured_top1", name="ImageNet top-1", unit="percent", short="our top-1", source="measured",
           form=percent),
    Column(key="real_top1", name="ReaL top-1", unit="percent", short="ReaL", source="published", form=percent),
    Column(key="measured_real_top1", name="ReaL top-1", unit="percent", short="our ReaL", source="measured",
           form=percent),
    Column(key="average_of_five", name="average of 5 tasks", unit="percent", short="Avg. 5", source="published",
           form=percent),
    Column(key="vtab", name="VTAB-1k 19 tasks", unit="percent", short="VTAB-1k", source="published", form=percent),
    Column(key="parameters", name="parameters with a head of 1000 classes", short="params", source="computed",
           form=lambda value: f"{value / 1e6:,.1f} M"),
    Column(key="gmacs", name="cost of an image", unit="GMAC", short="GMAC", source="computed", form=decimals(1)),
    Column(key="images_per_second", name="throughput of a TPU-v3 core", unit="images/s", short="img/s",
           source="published", form=integer),
    Column(key="measured_images_per_second", name="throughput of this device", unit="images/s", short="our img/s",
           source="measured", form=significant),
    Column(key="measured_lowest", name="lowest throughput", unit="images/s", short="lowest", source="measured"),
    Column(key="measured_highest", name="highest throughput", unit="images/s", short="highest", source="measured"),
    Column(key="batch_size", name="batch size", unit="images", short="batch", source="measured", form=integer),
    Column(key="relative", name="throughput relative to Mixer-B/16 at 224", short="× B/16", source="published",
           form=decimals(3)),
    Column(key="measured_relative", name="throughput relative to Mixer-B/16 at 224", short="our ×",
           source="measured", form=decimals(3)),
    Column(key="core_days", name="pre-training on TPU-v3", unit="core-days", short="TPU core-days", source="published",
           form=integer),
    Column(key="train_images_per_second", name="training at 224 pixels", unit="images/s", short="our training img/s",
           source="measured", form=significant),
    Column(key="device_days", name="pre-training on this device", unit="device-days", short="our device-days",
           source="measured", form=significant),
    Column(key="problem", name="why something is not measured", short="problem"),
    Column(key="note", name="note", short="note"),
)  # fmt: skip
LABEL = "row"  # stands for the letter of a row, in views
ACCURACY = View(
    title="accuracy in %",
    columns=(LABEL, "top1", "measured_top1", "real_top1", "measured_real_top1", "average_of_five", "vtab"),
)
SPEED = View(
    title="images/s of a TPU-v3 core, and ours; × B/16: as multiples of Mixer-B/16 at 224",
    columns=(
        LABEL, "parameters", "gmacs", "images_per_second", "measured_images_per_second", "batch_size", "relative",
        "measured_relative",
    ),
)  # fmt: skip
PRETRAINING = View(
    title="pre-training on TPU-v3 cores, and on this device at its speed of training",
    columns=(LABEL, "core_days", "train_images_per_second", "device_days"),
)
LEGEND = "–: in a column of the paper, not published; in one of ours, not measured."


def systems_of(rows: Sequence[PublishedRow]) -> dict[str, tuple[str, int]]:
    """The name and image size of what is measured for these rows, each once, by key."""
    keys = {REFERENCE: ("Mixer-B/16", PRETRAINING_SIZE)}
    keys |= {row.key: (row.system, row.image_size) for row in rows}
    return keys | {row.pretraining_key: (row.system, PRETRAINING_SIZE) for row in rows if row.pretraining_key}


def plan(
    rows: Sequence[PublishedRow], accuracies: Sequence[Accuracy] = ()
) -> tuple[dict[str, Mapping[str, Any]], frozenset[str]]:
    """What to measure for these rows: configurations by key, each once, and the keys whose training is measured."""
    keys = systems_of(rows)
    trained = frozenset(row.pretraining_key for row in rows if row.pretraining_key is not None)
    found = {key: system_or_problem(*named)[0] for key, named in keys.items()}
    configs = {key: system[0] for key, system in found.items() if system is not None}
    return configs | {one.weights: one.config for one in accuracies}, trained


def assign(name: str, accuracies: Sequence[Accuracy]) -> tuple[dict[PublishedRow, Accuracy], list[Accuracy]]:
    """The rows that are about these weights, and the accuracies without such a row."""
    of_row: dict[PublishedRow, Accuracy] = {}
    others = []
    for accuracy in accuracies:
        found = row_of_weights(TABLES[name](), accuracy.config, accuracy.provenance)
        if found is None or found in of_row:
            others.append(accuracy)
        else:
            of_row[found] = accuracy
    return of_row, others


def system_or_problem(system: str, image_size: int) -> tuple[tuple[Mapping[str, Any], Cost] | None, str | None]:
    """The configuration and cost; else why there is none, such as that timm is not installed."""
    try:
        return system_at(system, image_size), None
    except UserError as error:
        return None, str(error)


def comparison(
    name: str,
    rows: Sequence[PublishedRow],
    accuracies: Sequence[Accuracy] = (),
    speeds: Mapping[str, Speed] | None = None,
    details: Mapping[str, Any] | None = None,
) -> Table:
    """Table 2 or 3 with what was measured.

    Args:
        name: "table2" or "table3".
        rows: of the published table.
        accuracies: of weights; each stands in the row that is about these weights, or in a row of its own.
        speeds: by the keys of ``plan``; None: nothing was measured.
        details: of the measurement, for the JSON.
    """
    speeds = speeds or {}
    of_row, others = assign(name, accuracies)
    shown = [row for row in TABLES[name]() if row in rows or row in of_row]
    cells = [published_cells(row) | measured_cells(row, of_row.get(row), speeds) for row in shown]
    cells += [cells_of_weights(accuracy, speeds) for accuracy in others]
    cells = [row | compare(row, speeds.get(REFERENCE)) for row in cells]
    problems = {f"{row['built_as']}: {row['problem']}" for row in cells if row["problem"] is not None}
    has_vtab = any(row.get("vtab") is not None for row in cells)
    accuracy = ACCURACY if has_vtab else View(title=ACCURACY.title, columns=ACCURACY.columns[:-1])
    return Table(
        name=name,
        title=f"Table {name[-1]}: transfer accuracy, throughput and cost of pre-training",
        columns=COLUMNS,
        rows=cells,
        views=(accuracy, SPEED, PRETRAINING),
        label=describe_row,
        notes=[LEGEND, *describe_sources(name, shown), *(f"not measured: {text}" for text in sorted(problems))],
        details=details or {},
    )


def published_cells(row: PublishedRow) -> dict[str, Any]:
    reference = next(one.images_per_second for one in table_3() if one.key == REFERENCE) or 1.0
    speed = row.images_per_second
    note = SYSTEMS[row.system].note if row.system in SYSTEMS else ""
    return {
        "model": row.model,
        "built_as": row.key,
        "data": row.data,
        "image_size": row.image_size,
        "epochs": row.epochs,
        "preprint_only": "yes" if row.preprint_only else None,
        "top1": row.top1,
        "real_top1": row.real_top1,
        "average_of_five": row.average_of_five,
        "vtab": row.vtab,
        "images_per_second": speed,
        "relative": None if speed is None else speed / reference,
        "core_days": row.core_days,
        "note": "; ".join(filter(None, (row.note, note))) or None,
    }


def measured_cells(row: PublishedRow, accuracy: Accuracy | None, speeds: Mapping[str, Speed]) -> dict[str, Any]:
    system, missing = system_or_problem(row.system, row.image_size)
    speed = speeds.get(row.key, Speed())
    training = speeds.get(row.pretraining_key or "", Speed())
    rate, seen = training.train_images_per_second, row.images_seen
    return {
        **accuracy_cells(accuracy),
        **speed_cells(system and system[1], speed),
        "train_images_per_second": rate,
        "device_days": None if rate is None or seen is None else seen / rate / DAY,
        "problem": missing or speed.problem or training.problem,
    }


def cells_of_weights(accuracy: Accuracy, speeds: Mapping[str, Speed]) -> dict[str, Any]:
    """A row of weights that no row of the paper is about."""
    speed = speeds.get(accuracy.weights, Speed())
    return {
        "model": accuracy.weights,
        "built_as": name_of(accuracy.config) or describe_model(accuracy.config),
        "image_size": max(accuracy.config["image_size"]),
        **accuracy_cells(accuracy),
        **speed_cells(cost(build_meta({**accuracy.config, "num_classes": 1000})), speed),
        "problem": speed.problem,
        "note": "weights of yours: no row of the paper is about this model, image size and pre-training data",
    }


def accuracy_cells(accuracy: Accuracy | None) -> dict[str, Any]:
    if accuracy is None:
        return {"measured_top1": None, "measured_real_top1": None}
    return {"measured_top1": accuracy.top1, "measured_real_top1": accuracy.real_top1}


def speed_cells(costs: Cost | None, speed: Speed) -> dict[str, Any]:
    lowest, highest = speed.range or (None, None)
    return {
        "parameters": costs and costs.parameters,
        "gmacs": costs and costs.macs / 1e9,
        "measured_images_per_second": speed.images_per_second,
        "measured_lowest": lowest,
        "measured_highest": highest,
        "batch_size": speed.batch_size,
    }


def compare(row: Mapping[str, Any], reference: Speed | None) -> dict[str, Any]:
    speed, base = row["measured_images_per_second"], reference and reference.images_per_second
    return {"measured_relative": speed / base if speed and base else None}


def describe_row(row: Mapping[str, Any]) -> str:
    built = row["built_as"].partition(" at ")[0]
    epochs = f", {row['epochs']} epochs" if row.get("epochs") else ""
    return (
        f"{row['model']}{f' ({built})' if built != row['model'] else ''}, {row['image_size']} px"
        f"{', ' + row['data'] if row.get('data') else ''}{epochs}"
        f"{' (preprint only)' if row.get('preprint_only') else ''}"
    )


def describe_sources(name: str, rows: Sequence[PublishedRow]) -> list[str]:
    """What a reader must know of the published numbers and of the systems as they are built here."""
    notes = []
    if any("‡" in row.note for row in rows):
        notes.append("Core-days of ImageNet and ImageNet-21k are the paper's extrapolation from JFT-300M.")
    if name == "table2":
        notes.append(
            "Table 2 prints no image sizes but Mixer's: those of ViT and BiT are from Table 3, of the others from "
            "their papers. Its epochs are those of the same rows of Table 3."
        )
    systems = dict.fromkeys(row.system for row in rows)
    inexact = [
        SYSTEMS[system] for system in systems if system in SYSTEMS and SYSTEMS[system].family not in ("vit", "bit")
    ]
    return notes + [f"{system.name}: {system.note} ({system.source})." for system in inexact]
