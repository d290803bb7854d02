"""mixer train"""

import dataclasses
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from allmlp.api.recipe import Overrides, base_recipe, override, override_model
from allmlp.cli.arguments import parse_with_overrides
from allmlp.cli.docstrings import help_from_docstrings
from allmlp.cli.overrides import recipe_groups
from allmlp.cli.processes import LaunchOptions, join_processes, launch_processes, must_launch
from allmlp.cli.training import (
    print_summary,
    recipe_or_data,
    requested_folder,
    resume_with,
)
from allmlp.config.batch_size import check_world_size
from allmlp.config.recipe import Recipe
from allmlp.config.serialize import from_json
from allmlp.errors import UserError
from allmlp.recipes import RECIPES, get_recipe, list_names

log = logging.getLogger(__name__)

DESCRIPTION = """Trains a Mixer from scratch and writes a folder with its weights, metrics and report.html.

usage: mixer train [RECIPE] [OPTIONS], where RECIPE is one of {recipes}; without one, photos for a --data that is a
folder or zip, else digits. The paper's recipes have small versions, RECIPE-small. Options override their fields. In
place of RECIPE, a path that ends in / or begins with ./ or / is a folder to train on.

examples: mixer train flowers/
          mixer train photos --data flowers.zip --image-size 160 --epochs 50
          mixer train imagenet-b16 --data imagenet/ --micro-batch-size 128
          mixer train imagenet-b16 --data imagenet/ --processes 8 --out runs/b16 --resume auto

The defaults below are those of the recipe {name}."""


@dataclass(frozen=True, kw_only=True)
@help_from_docstrings
class Arguments:
    recipe: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RECIPE]", help_behavior_hint="")] = None
    """What to train, by name; mixer train RECIPE --help shows its defaults."""
    out: Path | None = None
    """The run's folder, which must be empty or new unless the run is resumed; by default runs/RECIPE-DATE-TIME."""
    recipe_file: Path | None = None
    """The recipe.json of an earlier run, in place of RECIPE."""
    json: bool = False
    """Print the summary as one JSON object."""
    launch: LaunchOptions = field(default_factory=LaunchOptions)


def run(args: Sequence[str]) -> int:
    arguments, given = parse_arguments(args)
    choice = recipe_or_data(arguments.recipe, RECIPES, given)
    recipe = choose_recipe(dataclasses.replace(arguments, recipe=choice.recipe), given)
    recipe = override(recipe, override_model(recipe.model, given["model"]), given)
    launch, out = arguments.launch, requested_folder(arguments.out, arguments.launch)
    if must_launch(launch, recipe.run.device, partial(check_world_size, recipe)):
        return launch_processes(launch, ["train", *args])
    from allmlp.api.train import train_and_report
    from allmlp.runs.folder import claimed_folder
    from allmlp.training.run import RunOptions

    with (
        join_processes(recipe.run.device, recipe.run.timeout_seconds) as context,
        claimed_folder(out, recipe.name, context) as folder,
    ):
        if choice.note and recipe.data.data != arguments.recipe:
            log.info("%s", choice.note)
        options = RunOptions(
            command=shlex.join(["mixer", "train", *args]),
            resume=launch.resume is not None,
            resume_command=resume_with(folder, launch, context),
        )
        summary = train_and_report(recipe, folder, options, context)
        if context.is_rank0:
            print_summary(summary, folder, arguments.json)
    return 0


def parse_arguments(args: Sequence[str]) -> tuple[Arguments, Overrides]:
    """The arguments, and the recipe's fields that were given as options."""
    documented = get_recipe(args[0] if args and args[0] in RECIPES else "digits")
    description = DESCRIPTION.format(recipes=list_names(RECIPES), name=documented.name)
    return parse_with_overrides(Arguments, recipe_groups(documented), args, command="train", description=description)


def choose_recipe(arguments: Arguments, given: Overrides) -> Recipe:
    """The recipe of --resume, --recipe-file or RECIPE; without any of these, the one that suits --data."""
    name, file, resumed = arguments.recipe, arguments.recipe_file, arguments.launch.resume
    if resumed not in (None, "auto") and (name is not None or file is not None):
        raise UserError(f"--resume {resumed} has its own recipe: leave out the other, or give --resume auto")
    if name is not None and file is not None:
        raise UserError(f"both a recipe, {name!r}, and --recipe-file {file}: give one of them")
    if file is not None:
        return from_json(file)
    return base_recipe(name, given["data"].get("data", "digits"), None if resumed in (None, "auto") else Path(resumed))
