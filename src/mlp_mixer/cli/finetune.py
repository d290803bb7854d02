"""mixer finetune"""

import dataclasses
import datetime
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from mlp_mixer.cli.arguments import pair, parse
from mlp_mixer.cli.train import carry_out, dashed, option
from mlp_mixer.errors import UserError
from mlp_mixer.recipes.finetune import finetune
from mlp_mixer.training.recipe import DataRecipe, ModelRecipe, OptimizationRecipe, RunRecipe

DESCRIPTION = """Trains weights further on your own classes: the head starts at zero, the rest as it was.

example: mixer finetune Mixer-B_16.npz --data photos/ --image-size 448

At another image size token mixing is first resized (mixer resize --help says how). The run's folder is that of mixer
train, and mixer train --recipe-file runs it again."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    weights: tyro.conf.Positional[str]
    """A file of ours, the authors' (.npz), timm's or lucidrains', or hf-hub:OWNER/NAME."""
    out: Path | None = None
    """Folder of the run, which must not exist; by default runs/finetune-DATE-TIME."""
    json: bool = False
    """Print the summary as one JSON object."""
    image_size: tuple[int, ...] = ()
    """In pixels, one number, or height and width; multiples of the patch size; by default that of the weights."""
    dropout: float = 0.0
    """After each dense layer of an MLP block."""
    stochastic_depth: float = 0.0
    """Probability to drop the last block's branches; rises linearly from 0 at the first."""
    rescale: bool = False
    """Divide surviving branches by 1 − p (timm does, the authors' code does not)."""
    data: DataRecipe
    optimization: OptimizationRecipe
    run: RunRecipe


def run(args: Sequence[str]) -> None:
    args = [dashed(arg) for arg in args]
    recipe = finetune(weights="", data=option(args, "--data") or "")
    chosen = parse(
        Arguments,
        args,
        verb="finetune",
        description=DESCRIPTION,
        default=Arguments(weights="", data=recipe.data, optimization=recipe.optimization, run=recipe.run),
    )
    if not chosen.weights:
        raise UserError("no weights: name a file, or hf-hub:OWNER/NAME (mixer finetune --help)")
    if not chosen.data.data:
        raise UserError("no --data: name the images to fine-tune on (digits, cifar10, a folder, or a .zip of one)")
    settings = ("dropout", "stochastic_depth", "rescale")
    height, width = pair(chosen.image_size) if chosen.image_size else (None, None)
    recipe = dataclasses.replace(
        recipe,
        model=ModelRecipe(
            weights=chosen.weights,
            image_size=height,
            image_width=None if width == height else width,
            **{name: getattr(chosen, name) for name in settings},
        ),
        **{name: getattr(chosen, name) for name in ("data", "optimization", "run")},
    )
    out = chosen.out or Path("runs") / f"{recipe.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    carry_out(recipe, out, chosen.json, f"mixer finetune {shlex.join(args)}")
