"""Figure 2 (right) as it was found here: its table and its picture."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from allmlp.reproduce.figures.charts import ATTENTION, CONVOLUTION, MIXER, STYLE
from allmlp.reproduce.tables.table import Column, Table, View, integer

COLORS = {"Mixer": MIXER, "ViT": ATTENTION, "ResNet": CONVOLUTION}
PANELS = (
    ("fewshot_top1", "5-shot top-1 (%), other classes"),
    ("finetuned_top1", "fine-tuned top-1 (%), other classes"),
    ("pretraining_test_top1", "test top-1 (%), pre-training classes"),
)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


COLUMNS = (
    Column(key="model", name="model", short="model"),
    Column(key="percent", name="part of the images", unit="%", short="%"),
    Column(key="images", name="pre-training images", short="images", form=integer),
    Column(key="epochs", name="epochs", short="epochs", form=integer),
    Column(key="steps", name="steps", short="steps", form=integer),
    Column(key="kept_step", name="step with the best validation accuracy", source="measured", short="kept",
           form=integer),
    Column(key="parameters", name="parameters", source="computed", short="parameters", form=integer),
    Column(key="macs", name="cost of an image", unit="MAC", source="computed", short="MMACs",
           form=lambda value: f"{value / 1e6:.2f}"),
    Column(key="pretraining_val_top1", name="validation top-1 in pre-training", source="measured", short="val",
           form=percent),
    Column(key="pretraining_test_top1", name="test top-1 in pre-training", source="measured", short="test",
           form=percent),
    Column(key="fewshot_top1", name="5-shot top-1", source="measured", short="5-shot", form=percent),
    Column(key="finetuned_top1", name="fine-tuned top-1", source="measured", short="tuned", form=percent),
    Column(key="commonest_class_top1", name="top-1 of the commonest class", source="measured", short="commonest",
           form=percent),
    Column(key="seconds", name="training time", unit="s", source="measured", short="s", form=integer),
    Column(key="seed", name="seed", short="seed"),
)  # fmt: skip


def data_size_table(result: Mapping[str, Any]) -> Table:
    """The rows of ``data_size.run_data_size``; top-1 in percent in the terminal, as fractions in files."""
    classes, settings = result["classes"], result["settings"]
    return Table(
        name="figure2-right",
        title=f"Figure 2 (right), small: accuracy by the number of pre-training images, {result['steps']:,} steps each",
        columns=COLUMNS,
        rows=result["rows"],
        views=(
            View(
                title="top-1 in %",
                columns=(
                    "model", "percent", "images", "epochs", "kept_step", "pretraining_val_top1",
                    "pretraining_test_top1", "fewshot_top1", "finetuned_top1",
                ),
            ),
        ),
        notes=[
            f"Pre-trained on {', '.join(classes['upstream'])}; 5-shot (mean of three draws of the shots) and "
            f"fine-tuned on {', '.join(classes['downstream'])}. val and test are of pre-training; the weights with the "
            "best val are kept.",
            f"One seed, {settings['seed']}: differences of a few points between rows may be chance.",
        ],
        details={key: result[key] for key in ("source", "classes", "steps", "settings", "models")},
    )  # fmt: skip


def draw_data_size(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy against the part of the images that was pre-trained on, one line for each model."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.6), dpi=150, layout="constrained")
        parts = sorted({row["percent"] for row in rows})
        for axes, (key, title) in zip(figure.subplots(1, 3), PANELS, strict=True):
            for model in dict.fromkeys(row["model"] for row in rows):
                mine = sorted((row for row in rows if row["model"] == model), key=lambda row: row["percent"])
                axes.plot(
                    [row["percent"] for row in mine],
                    [100 * row[key] for row in mine],
                    color=COLORS.get(model, "0.3"),
                    marker="o",
                    markersize=4,
                    label=model,
                )
            axes.set(xscale="log", xlabel="part of the pre-training images (%)")
            axes.set_title(title, fontsize=9)
            axes.set_xticks(parts, [f"{part:g}" for part in parts])
            axes.minorticks_off()
            axes.grid(color="0.9", linewidth=0.6)
        figure.axes[0].legend(loc="upper left")
    return figure
