"""mixer reproduce"""

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from allmlp.cli.arguments import parse
from allmlp.cli.docstrings import help_from_docstrings
from allmlp.files import to_json

if TYPE_CHECKING:
    from allmlp.reproduce.tables.table import Table

DESCRIPTION = """Prints the paper's numbers with ours beside them, and writes them as CSV and JSON, and as pictures.

examples: mixer reproduce table1
          mixer reproduce table3 --budget 10m
          mixer reproduce figure3 --no-measure
          mixer reproduce table3 --models model.safetensors --data imagenet/
          mixer reproduce figure2 --data cifar10

TARGET is one of table1 (the Mixers), table2 and table3 (accuracy, throughput and cost of the systems compared), table4
(hyperparameters), figure2 (accuracy against the cost of pre-training; with --data its right part, accuracy against the
number of pre-training images, as an experiment with small models: half an hour for CIFAR-10 on two cores), figure3
(accuracy against cost and throughput), patches (cost by the number of patches, Section 2).

Throughput is measured within the budget: for --models the named rows alone. Weights after --models are evaluated on
--data; their accuracy stands in the row that is about them, or in a row of its own."""


@dataclass(frozen=True, kw_only=True)
@help_from_docstrings
class Arguments:
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET", help_behavior_hint="(required)")]
    models: tuple[str, ...] = ()
    """table2, table3, figure3: only these rows (Mixer-B/16, HaloNet, …); table2, table3: WEIGHTS to evaluate too;
    figure2 with --data: of Mixer, ViT and ResNet only these."""
    data: str | None = None
    """table2, table3: SOURCE that the weights are evaluated on: imagenet, a folder of images, or a .zip of one.
    figure2: SOURCE that the small models are trained on."""
    part: Literal["test", "val", "train", "all"] = "test"
    """Split of --data to evaluate on."""
    real_labels: Path | None = None
    """The real.json of ImageNet-ReaL, for ImageNet's validation images; None: the labels that timm contains."""
    measure: bool = True
    """Measure throughput and training on this device; without it, published and counted numbers alone."""
    budget: str = "10m"
    """Time for all measurements of speed together, such as 90s, 10m or 1h."""
    out: Path = Path("reproduced")
    """Folder of the files, which replace those of the same names."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of matrix products; auto: bfloat16 if the hardware supports it. patches always uses float32."""
    json: bool = False
    """Print one JSON object: what the JSON file holds."""


def run(args: Sequence[str]) -> None:
    arguments = parse(Arguments, args, command="reproduce", description=DESCRIPTION)
    from allmlp.reproduce.run import Options, reproduce
    from allmlp.throughput.budget import parse_budget

    options = Options(
        out=arguments.out,
        models=arguments.models,
        data=arguments.data,
        part=arguments.part,
        real_labels=arguments.real_labels,
        measure=arguments.measure,
        budget_seconds=parse_budget(arguments.budget),
        device=arguments.device,
        precision=arguments.precision,
    )
    table, found = reproduce(arguments.target, options)
    if arguments.json:
        print(to_json(found))
    else:
        print_result(table, found)


def print_result(table: "Table", found: dict[str, Any]) -> None:
    """Prints the views of the table, in which letters stand for long names of rows."""
    from allmlp.cli.display import output_width, print_letters, print_table

    print(table.title)
    letters = print_letters([table.label(row) for row in table.rows]) if table.label is not None else []
    for view in table.views:
        columns = [key for key in view.columns if key in {column.key for column in table.columns}]
        rows = [[table.column(key).show(row) for key in columns] for row in table.rows]
        if letters:
            rows = [[letter, *row] for letter, row in zip(letters, rows, strict=True)]
        heads = [*([""] if letters else []), *(table.column(key).short for key in columns)]
        print_table(f"\n{view.title}" if view.title else "", heads, rows)
    for note in table.notes:
        print(textwrap.fill(note, max(min(output_width(), 120) - 1, 20)))
    print(f"files    {', '.join(found['files'])}", file=sys.stderr)
