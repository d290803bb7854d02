"""Figures 2 (left) and 3 and the growth with the number of patches: what they show, and its tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from allmlp.reproduce.figures import charts
from allmlp.reproduce.figures.data_size import draw_data_size
from allmlp.reproduce.figures.frontier import pareto_frontier
from allmlp.reproduce.patches import ATTENTION, KINDS, TOKEN_MIXING, time_exponents
from allmlp.reproduce.published import IMAGENET21K, JFT, PublishedRow, table_2, table_3
from allmlp.reproduce.speeds import Speed
from allmlp.reproduce.tables.comparison import COLUMNS, LABEL, LEGEND, comparison, describe_row, published_cells
from allmlp.reproduce.tables.table import Column, Table, View, decimals, integer, significant

# Besides Table 2, Figure 2 (left) shows BiT-R200x3 and the smaller ViT-L/16 and Mixer-L/16 (Section 3.1)
ALSO_IN_FIGURE_2 = (("BiT-R200x3", 224), ("ViT-L/16", 512), ("Mixer-L/16", 448))
SHORT = {IMAGENET21K: "21k", JFT: "JFT"}

KEEP = ("model", "built_as", "data", "image_size", "epochs", "top1", "core_days", "images_per_second", "relative")
SPEEDS = ("measured_images_per_second", "measured_lowest", "measured_highest", "batch_size", "measured_relative")


def rows_of_figure_2() -> tuple[PublishedRow, ...]:
    """The points of Figure 2 (left), all of which have a cost and an accuracy."""
    more = [row for row in table_3() if row.data == JFT and (row.system, row.image_size) in ALSO_IN_FIGURE_2]
    longest = [row for row in more if row.epochs == 14]
    return (*table_2(), *longest)


def rows_of_figure_3() -> tuple[PublishedRow, ...]:
    """The points of Figure 3: pre-trained on JFT-300M, fine-tuned at 224."""
    return tuple(row for row in table_3() if row.data == JFT and row.image_size == 224)


def columns(keys: Sequence[str]) -> tuple[Column, ...]:
    return tuple(column for column in COLUMNS if column.key in keys)


def figure2_left() -> Table:
    """Accuracy against the cost of pre-training; "frontier" says which points lie on the Pareto frontier."""
    rows = [published_cells(row) for row in rows_of_figure_2()]
    frontier = pareto_frontier([(row["core_days"], row["top1"]) for row in rows])
    several = [row["model"] for row in rows]
    shown = [
        row
        | {
            "frontier": "yes" if i in frontier else "no",
            "label": row["model"] + (f" ({SHORT[row['data']]})" if several.count(row["model"]) > 1 else ""),
        }
        for i, row in enumerate(rows)
    ]
    names = [shown[i]["label"] for i in frontier]
    return Table(
        name="figure2",
        title="Figure 2 (left): ImageNet top-1 against the cost of pre-training, published",
        columns=(*columns(KEEP), Column(key="frontier", name="on the Pareto frontier", short="frontier")),
        rows=shown,
        views=(View(title="", columns=(LABEL, "core_days", "top1", "frontier")),),
        label=describe_row,
        notes=[
            f"On the Pareto frontier: {', '.join(names)}.",
            "BiT-R200x3 is drawn at its accuracy for 224 px, the only one in the paper's tables. The paper calls it "
            "slightly lower than BiT-R152x4's, so its figure may show that for a higher resolution.",
        ],
    )


def figure3(speeds: Mapping[str, Speed] | None, rows: Sequence[PublishedRow], details: Mapping[str, Any]) -> Table:
    """Accuracy against the cost of pre-training and throughput, published, and against the throughput measured here."""
    table = comparison("table3", rows, (), speeds, details)
    names = [row["model"] for row in table.rows]
    shown = [
        dict(row)
        | {
            "label": row["model"].removeprefix("Mixer-").removeprefix("BiT-").removeprefix("ViT-")
            + (f" ({row['epochs']} epochs)" if names.count(row["model"]) > 1 else "")
        }
        for row in table.rows
    ]
    view = (LABEL, "top1", "core_days", "images_per_second", "measured_images_per_second", "relative")
    return Table(
        name="figure3",
        title="Figure 3: ImageNet top-1 against cost and throughput; JFT-300M, 224 px",
        columns=columns((*KEEP, *SPEEDS, "problem")),
        rows=shown,
        views=(View(title="", columns=(*view, "measured_relative")),),
        label=describe_row,
        notes=[
            LEGEND,
            "The paper's figure also has models that its tables do not list; they are not shown here.",
            *(note for note in table.notes if note.startswith("not measured")),
        ],
        details=details,
    )


PATCH_COLUMNS = (
    Column(key="name", name="operation", short="operation"),
    Column(key="patches", name="patches", short="patches", form=integer),
    Column(key="macs", name="cost of an image", unit="MAC", source="computed", short="GMAC",
           form=lambda value: f"{value / 1e9:.3f}"),
    Column(key="macs_exponent", name="growth exponent of the cost", source="computed", short="grows S^",
           form=decimals(3)),
    Column(key="seconds", name="median time", unit="s", source="measured", short="ms",
           form=lambda value: significant(value * 1e3)),
    Column(key="seconds_exponent", name="growth exponent of the time", source="measured", short="grows S^",
           form=decimals(2)),
    Column(key="fastest", name="shortest time", unit="s", source="measured", short="shortest"),
    Column(key="slowest", name="longest time", unit="s", source="measured", short="longest"),
    Column(key="rounds", name="rounds", source="measured", short="rounds", form=integer),
)  # fmt: skip


def patches_table(rows: Sequence[Mapping[str, Any]], details: Mapping[str, Any]) -> Table:
    exponents = time_exponents(rows)
    last = [row["patches"] for row in rows if row["kind"] == KINDS[0].key][-2:]
    return Table(
        name="patches",
        title="Section 2: cost of one image by the number of patches S, at fixed widths",
        columns=PATCH_COLUMNS,
        rows=rows,
        views=(View(title="", columns=("name", "patches", "macs", "macs_exponent", "seconds", "seconds_exponent")),),
        notes=[
            "grows S^: the exponent of the growth from the number of patches above; 1 is linear, 2 quadratic.",
            "softmax(QKᵀ)V: the two products as written, without the projections; fused: the same by PyTorch's "
            "scaled_dot_product_attention. The operations are counted in matrix products alone.",
            f"Time from {last[0]:,} to {last[1]:,} patches: softmax(QKᵀ)V grows by S^{exponents[ATTENTION]:.2f}, the "
            f"token-mixing MLP by S^{exponents[TOKEN_MIXING]:.2f}.",
        ],
        details={**details, "time_exponents": exponents},
    )


def pictures(table: Table, device: str) -> dict[str, Figure]:
    """The pictures of a table, by the name of their files."""
    if table.name == "figure2":
        return {"figure2-left": charts.draw_frontier(table.rows)}
    if table.name == "figure2-right":
        return {"figure2-right": draw_data_size(table.rows)}
    if table.name == "figure3":
        found = {"figure3": charts.draw_scales(table.rows)}
        measured = charts.draw_measured_scales(table.rows, device)
        return found | ({"figure3-measured": measured} if measured is not None else {})
    if table.name == "patches":
        return {"patches": charts.draw_patches(table.rows, device)}
    return {}
