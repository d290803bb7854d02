"""Table 4: the hyperparameters of pre-training beside those of our recipes."""

from collections.abc import Mapping
from typing import Any

from allmlp.config.recipe import Recipe
from allmlp.recipes.pretrain import PRETRAIN
from allmlp.reproduce.published import IMAGENET, IMAGENET21K, JFT, number_in, read_table
from allmlp.reproduce.tables.table import Column, Table, View

FIELDS = {  # key → header of the published table, name, short name
    "epochs": ("epochs", "epochs", "epochs"),
    "learning_rate": ("learning_rate", "learning rate", "lr"),
    "weight_decay": ("weight_decay", "weight decay", "wd"),
    "randaugment": ("randaugment_magnitude", "RandAugment magnitude", "RandAug"),
    "mixup": ("mixup_strength_p", "mixup strength", "mixup"),
    "dropout": ("dropout_rate", "dropout rate", "dropout"),
    "stochastic_depth": ("stochastic_depth_max_rate", "stochastic depth", "st. depth"),
}
DATA = {"ImNet": (IMAGENET, "imagenet"), "ImNet-21k": (IMAGENET21K, "imagenet21k"), "JFT-300M": (JFT, "jft")}

COLUMNS = (
    Column(key="model", name="model", short="model"),
    Column(key="data", name="pre-training data", short="data"),
    Column(key="recipe", name="recipe", short="recipe", source="computed"),
    *(
        Column(key=f"{source}_{key}", name=name, short=short, source=source)
        for source in ("published", "computed")
        for key, (_, name, short) in FIELDS.items()
    ),
    *(Column(key=key, name=name, short=short, in_files=False) for key, (_, name, short) in FIELDS.items()),
    Column(key="differences", name="fields that differ", short="differ"),
)


def table4() -> Table:
    """Every row of Table 4 for each recipe that it describes."""
    rows = [
        row_of(published, name, make()) for published in read_table(4) for name, make in recipes_of(published).items()
    ]
    different = [f"{row['recipe']} ({row['differences']})" for row in rows if row["differences"]]
    cells = len(rows) * len(FIELDS)
    verdict = f"Recipes that differ: {', '.join(different)}." if different else "There is no difference."
    shown = [row | {key: cell(row, key) for key in FIELDS} for row in rows]
    return Table(
        name="table4",
        title="Table 4: hyperparameters of pre-training, published and in our recipes",
        columns=COLUMNS,
        rows=shown,
        views=(View(title="", columns=("recipe", *FIELDS)),),
        notes=[
            f"All {cells} cells of the {len(rows)} recipes are compared; published ≠ ours where they differ. {verdict}",
            "off: the table leaves the cell empty, and the recipe does not use it.",
        ],
    )


def recipes_of(published: Mapping[str, str]) -> dict[str, Any]:
    """Our recipes of this model and data, by name. "7/14" epochs are two runs of one row."""
    scale, prefix = published["model"].removeprefix("Mixer-"), DATA[published["dataset"]][1]
    return {name: make for name, make in PRETRAIN.items() if name.startswith(f"{prefix}-{scale.lower()}")}


def row_of(published: Mapping[str, str], name: str, recipe: Recipe) -> dict[str, Any]:
    ours = {
        "epochs": recipe.optimization.epochs,
        "learning_rate": recipe.optimization.learning_rate,
        "weight_decay": recipe.optimization.weight_decay,
        "randaugment": recipe.data.randaugment or 0.0,
        "mixup": recipe.data.mixup or 0.0,
        "dropout": recipe.model.dropout,
        "stochastic_depth": recipe.model.stochastic_depth,
    }
    row: dict[str, Any] = {
        "model": f"Mixer-{recipe.model.model}",
        "data": DATA[published["dataset"]][0],
        "recipe": name,
    }
    differences = []
    for key, (header, _, _) in FIELDS.items():
        text = published[header]
        allowed = [number_in(part) or 0.0 for part in text.split("/")]
        row |= {f"published_{key}": text or None, f"computed_{key}": ours[key]}
        if ours[key] not in allowed:
            differences.append(key)
    return row | {"differences": ", ".join(differences) or None}


def cell(row: Mapping[str, Any], key: str) -> str:
    """The value once if both agree, else both."""
    published, ours = row[f"published_{key}"], row[f"computed_{key}"]
    if key in (row["differences"] or "").split(", "):
        return f"{published or 'off'} ≠ {ours:g}"
    return "off" if published is None else f"{ours:g}"
