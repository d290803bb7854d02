"""Compares the pre-training recipes with Table 4 of the paper, and marks every difference.

python benchmarks/table4.py table4.csv     # columns model, dataset, epochs, learning_rate, weight_decay, …
"""

import argparse
import csv
from pathlib import Path

from common import print_table

from allmlp.config.recipe import Recipe
from allmlp.recipes.pretrain import PRETRAIN

COLUMNS = ("epochs", "learning_rate", "weight_decay", "randaugment_magnitude", "mixup_strength_p", "dropout_rate")
COLUMNS += ("stochastic_depth_max_rate",)
DATA = {"imagenet": "ImNet", "imagenet21k": "ImNet-21k", "jft": "JFT-300M"}


def cells(recipe: Recipe) -> dict[str, float | None]:
    """The recipe's values for the columns of the table; where the rows for JFT are empty, the setting is off."""
    values = (
        recipe.optimization.epochs,
        recipe.optimization.learning_rate,
        recipe.optimization.weight_decay,
        recipe.data.randaugment,
        recipe.data.mixup,
        recipe.model.dropout,
        recipe.model.stochastic_depth,
    )
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    with parser.parse_args().table.open() as file:
        published = {(row["model"], row["dataset"]): row for row in csv.DictReader(file)}
    rows, differences, compared = [], 0, set()
    for name, make in PRETRAIN.items():
        recipe = make()
        key = (f"Mixer-{(recipe.model.model or '')[0]}", DATA[recipe.data.data])
        compared.add(key)
        row = [name, *key]
        for column, value in cells(recipe).items():
            allowed = [float(text) for text in published[key][column].split("/") if text] or [None, 0.0]
            shown = "-" if value is None else f"{value:g}"
            differences += value not in allowed
            row.append(shown if value in allowed else f"{shown} (paper: {published[key][column]})")
        rows.append(row)
    print_table(["recipe", "model", "data", *COLUMNS], rows)
    missing = sorted(published.keys() - compared)
    print(f"{differences} differences, {len(missing)} rows of the table without a recipe {missing or ''}".strip())


if __name__ == "__main__":
    main()
