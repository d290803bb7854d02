"""mixer finetune"""

import dataclasses
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from allmlp.api.recipe import FINETUNE_MODEL_FIELDS, Overrides, check_data, linear_plan, override_finetune
from allmlp.cli.arguments import Weights, parse_with_overrides
from allmlp.cli.docstrings import help_from_docstrings
from allmlp.cli.overrides import Option, option_group, options_of, recipe_groups, section_group
from allmlp.cli.processes import LaunchOptions, join_processes, launch_processes, must_launch
from allmlp.cli.training import (
    print_summary,
    recipe_or_data,
    requested_folder,
    resume_with,
)
from allmlp.config.batch_size import check_world_size
from allmlp.errors import UserError
from allmlp.recipes import FINETUNE_RECIPES, get_finetune_recipe, list_names

log = logging.getLogger(__name__)

DESCRIPTION = """Trains weights further on your own classes: the head starts at zero, the rest from the weights.

usage: mixer finetune WEIGHTS [RECIPE] [OPTIONS], where RECIPE is one of {recipes}; without one, photos, for a small
machine. Each has a small version, RECIPE-small. In place of RECIPE, a path that ends in / or begins with ./ or / is a
folder to train on.

examples: mixer finetune Mixer-B_16.npz --data photos/ --image-size 448
          mixer finetune Mixer-B_16.npz pets --micro-batch-size 32

The learning rate is chosen among --learning-rates on held-out training images, never on test images; then all training
images are used, in one run for each of --seeds. With one --learning-rate, there is no search. The same command with the
same --out resumes what was stopped. At another image size, token mixing is resized first (see mixer resize --help).

The defaults below are those of the recipe {name}."""


@dataclass(frozen=True, kw_only=True)
@help_from_docstrings
class Arguments:
    weights: Weights = ""
    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[RECIPE]", help_behavior_hint="")] = "photos"
    """How to fine-tune, by name; mixer finetune WEIGHTS RECIPE --help shows its defaults."""
    out: Path | None = None
    """The run's folder; by default runs/RECIPE-DATE-TIME. If it holds an unfinished run, that is resumed."""
    head: Literal["trained", "linear"] = "trained"
    """linear: keep the weights frozen and fit a regularized linear classifier to their features, its strength chosen on
    validation images; takes one pass over the images, and no optimization options."""
    json: bool = False
    """Print the summary as one JSON object."""
    launch: LaunchOptions = field(default_factory=LaunchOptions)


def run(args: Sequence[str]) -> int:
    arguments, given = parse_arguments(args)
    if not arguments.weights:
        raise UserError("no weights: name a file, or hf-hub:OWNER/NAME (mixer finetune --help)")
    choice = recipe_or_data(arguments.recipe, FINETUNE_RECIPES, given)
    plan = override_finetune(get_finetune_recipe(choice.recipe or "photos"), arguments.weights, given)
    if choice.note and not plan.recipe.data.data:
        raise UserError(f"no --data: {choice.note}")
    if arguments.head == "linear":
        plan = linear_plan(plan, given)
    check_data(plan.recipe)
    launch = arguments.launch
    launch = dataclasses.replace(launch, resume=launch.resume or ("auto" if arguments.out else None))
    out = requested_folder(arguments.out, launch)
    if must_launch(launch, plan.recipe.run.device, partial(check_world_size, plan.recipe)):
        return launch_processes(launch, ["finetune", *args])
    command = shlex.join(["mixer", "finetune", *args])
    from allmlp.api.finetune import finetune_and_report
    from allmlp.api.linear_head import fit_and_report
    from allmlp.runs.folder import claimed_folder
    from allmlp.training.run import RunOptions

    with (
        join_processes(plan.recipe.run.device, plan.recipe.run.timeout_seconds) as context,
        claimed_folder(out, plan.recipe.name, context) as folder,
    ):
        if choice.note:
            log.info("%s", choice.note)
        again = command if out else f"{command} --out {shlex.quote(str(folder))}"
        options = RunOptions(
            command=command,
            resume=launch.resume is not None,
            resume_command=again if plan.searches else resume_with(folder, launch, context),
        )
        if arguments.head == "linear":
            summary = fit_and_report(plan.recipe, folder, options, context)
        else:
            summary = finetune_and_report(plan, folder, options, context)
        if context.is_rank0:
            print_summary(summary, folder, arguments.json)
    return 0


def parse_arguments(args: Sequence[str]) -> tuple[Arguments, Overrides]:
    """The arguments, and the fields of the recipe and of the search that were given as options."""
    plan = get_finetune_recipe(args[1] if len(args) > 1 and args[1] in FINETUNE_RECIPES else "photos")
    size = plan.recipe.model.image_size
    size_help = "In pixels, one number, or height and width: multiples of the patch size; none: that of the weights."
    model = {"image_size": Option(tuple[int, ...], size_help, () if size is None else (size,))}
    model |= {name: option for name, option in options_of(plan.recipe.model).items() if name in FINETUNE_MODEL_FIELDS}
    groups = {"search": section_group(plan.search), **recipe_groups(plan.recipe)}
    groups["model"] = option_group("The model made from the weights.", model)
    description = DESCRIPTION.format(recipes=list_names(FINETUNE_RECIPES), name=plan.recipe.name)
    return parse_with_overrides(Arguments, groups, args, command="finetune", description=description)
