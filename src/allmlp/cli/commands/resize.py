"""mixer resize"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from allmlp.api.recipe import height_and_width
from allmlp.cli.arguments import Weights, parse
from allmlp.cli.costs import compare_costs, print_comparison
from allmlp.cli.docstrings import help_from_docstrings
from allmlp.cli.streams import saved_result
from allmlp.files import to_json

DESCRIPTION = """Writes weights for another image size, ready to be fine-tuned at that size.

example: mixer resize Mixer-B_16.npz b16-448.safetensors --image-size 448

An integer factor follows Supplement C of the paper: each part of the image is processed as the whole image was before,
and D_S grows by the number of parts. At other sizes, token mixing is resampled over the grid of patches, and D_S stays
the same."""


@dataclass(frozen=True, kw_only=True)
@help_from_docstrings
class Arguments:
    weights: Weights
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The file to write, .safetensors."""
    image_size: tuple[int, ...]
    """In pixels, one number, or height and width, such as 448 320; multiples of the patch size."""
    json: bool = False
    """Print one JSON object."""


def run(args: Sequence[str]) -> None:
    arguments = parse(Arguments, args, command="resize", description=DESCRIPTION)
    from allmlp.weights.load import load
    from allmlp.weights.native import save
    from allmlp.weights.resize import resize

    model = load(arguments.weights)
    resized = resize(model, height_and_width(arguments.image_size))
    save(resized, arguments.out)
    costs = compare_costs(model.config, resized.config)
    with saved_result(arguments.out, arguments.json):
        if arguments.json:
            print(to_json({"weights": arguments.weights, "out": str(arguments.out), **costs}))
        else:
            print_comparison(costs)
            print(f"weights  {arguments.out}")
