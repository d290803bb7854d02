"""mixer resize"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from allmlp.cli.arguments import pair, parse
from allmlp.files import to_json

DESCRIPTION = """Writes weights for another image size, ready to be fine-tuned at it.

example: mixer resize Mixer-B_16.npz b16-448.safetensors --image-size 448

An integer factor is Supplement C of the paper: each part of the image is processed as a whole one was, and D_S grows by
the number of parts. At any other size token mixing is resampled over the grid of patches, and D_S stays."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    weights: tyro.conf.Positional[str]
    """A file of ours, the authors' (.npz), timm's or lucidrains', or hf-hub:OWNER/NAME."""
    out: tyro.conf.Positional[Path]
    """The file to write, .safetensors."""
    image_size: tuple[int, ...]
    """In pixels, one number, or height and width as 448 320; multiples of the patch size."""
    json: bool = False
    """Print one JSON object."""


def run(args: Sequence[str]) -> None:
    chosen = parse(Arguments, args, verb="resize", description=DESCRIPTION)
    from allmlp.cli.info import compare_costs, show_resize
    from allmlp.weights.load import load
    from allmlp.weights.native import save
    from allmlp.weights.resize import resize

    model = load(chosen.weights)
    resized = resize(model, pair(chosen.image_size))
    save(resized, chosen.out)
    costs = compare_costs(model.config, resized.config)
    if chosen.json:
        print(to_json({"weights": chosen.weights, "out": str(chosen.out), **costs}))
    else:
        show_resize(costs)
        print(f"weights  {chosen.out}")
