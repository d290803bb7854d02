"""mixer finetune"""

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from allmlp.cli.arguments import Weights, height_and_width, parse_with_overrides
from allmlp.cli.docstrings import help_from_docstrings
from allmlp.cli.overrides import (
    Option,
    Overrides,
    option_group,
    options_of,
    override,
    override_search,
    recipe_groups,
    section_group,
)
from allmlp.cli.training import (
    LaunchOptions,
    default_folder,
    distributed_run,
    launch_processes,
    must_launch,
    print_summary,
    requested_folder,
    train_and_report,
)
from allmlp.config.recipe import FinetuneRecipe, ModelRecipe, Recipe
from allmlp.errors import UserError
from allmlp.recipes import FINETUNE_RECIPES, get_finetune_recipe, list_names

if TYPE_CHECKING:
    from allmlp.distributed.context import DistributedContext

DESCRIPTION = """Trains weights further on your own classes: the head starts at zero, the rest from the weights.

usage: mixer finetune WEIGHTS [RECIPE] [OPTIONS], where RECIPE is one of {recipes}; without one, photos, for a small
machine. Each has a small version, RECIPE-small.

examples: mixer finetune Mixer-B_16.npz --data photos/ --image-size 448
          mixer finetune Mixer-B_16.npz pets --micro-batch-size 32

The learning rate is chosen among --learning-rates on held-out training images, never on test images; then all training
images are used, in one run for each of --seeds. With one --learning-rate, there is no search. The same command with the
same --out resumes what was stopped. At another image size, token mixing is resized first (see mixer resize --help).

The defaults below are those of the recipe {name}."""
MODEL_FIELDS = ("frozen", "dropout", "stochastic_depth", "rescale")


@dataclass(frozen=True, kw_only=True)
@help_from_docstrings
class Arguments:
    weights: Weights = ""
    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[RECIPE]", help_behavior_hint="")] = "photos"
    """How to fine-tune, by name; mixer finetune WEIGHTS RECIPE --help shows its defaults."""
    out: Path | None = None
    """The run's folder; by default runs/RECIPE-DATE-TIME. If it holds an unfinished run, that is resumed."""
    json: bool = False
    """Print the summary as one JSON object."""
    launch: LaunchOptions = field(default_factory=LaunchOptions)


def run(args: Sequence[str]) -> int:
    arguments, given = parse_arguments(args)
    if not arguments.weights:
        raise UserError("no weights: name a file, or hf-hub:OWNER/NAME (mixer finetune --help)")
    plan = override_finetune(get_finetune_recipe(arguments.recipe), arguments.weights, given)
    recipe, search = plan.recipe, plan.search
    if not recipe.data.data:
        raise UserError("no --data: name the images to fine-tune on (cifar10, pets, …, a folder, or a .zip of one)")
    searches = bool(search.learning_rates) or search.seeds > 1
    launch = arguments.launch
    launch = dataclasses.replace(launch, resume=launch.resume or ("auto" if arguments.out else None))
    out = requested_folder(arguments.out, launch)
    if must_launch(recipe, launch):
        return launch_processes(launch, ["finetune", *args])
    command = shlex.join(["mixer", "finetune", *args])
    with distributed_run(recipe) as context:
        folder = context.broadcast_from_rank0(lambda: out or default_folder(recipe))
        if searches:
            resume_command = command if out else f"{command} --out {shlex.quote(str(folder))}"
            summary = search_and_train(plan, folder, command, launch, context, resume_command)
        else:
            summary = train_and_report(recipe, folder, command, launch, context)
        if context.is_rank0:
            print_summary(summary, folder, arguments.json)
    return 0


def search_and_train(
    plan: FinetuneRecipe,
    out: Path,
    command: str,
    launch: LaunchOptions,
    context: "DistributedContext",
    resume_command: str,
) -> dict[str, Any]:
    """Tries the learning rates and trains once per seed; runs that are complete are not repeated."""
    from allmlp.data.sources import walk_once
    from allmlp.training.build import check_validation
    from allmlp.training.sweep import sweep

    launch = dataclasses.replace(launch, resume="auto")

    def run_one(recipe: Recipe, folder: Path) -> dict[str, Any]:
        return train_and_report(recipe, folder, command, launch, context, resume_command)

    with walk_once():
        context.broadcast_from_rank0(lambda: check_validation(plan.recipe))  # before hours of searching
        return sweep(plan, out, run_one, context)


def parse_arguments(args: Sequence[str]) -> tuple[Arguments, Overrides]:
    """The arguments, and the fields of the recipe and of the search that were given as options."""
    plan = get_finetune_recipe(args[1] if len(args) > 1 and args[1] in FINETUNE_RECIPES else "photos")
    size = plan.recipe.model.image_size
    size_help = "In pixels, one number, or height and width: multiples of the patch size; none: that of the weights."
    model = {"image_size": Option(tuple[int, ...], size_help, () if size is None else (size,))}
    model |= {name: option for name, option in options_of(plan.recipe.model).items() if name in MODEL_FIELDS}
    groups = {"search": section_group(plan.search), **recipe_groups(plan.recipe)}
    groups["model"] = option_group("The model made from the weights.", model)
    description = DESCRIPTION.format(recipes=list_names(FINETUNE_RECIPES), name=plan.recipe.name)
    return parse_with_overrides(Arguments, groups, args, command="finetune", description=description)


def override_finetune(plan: FinetuneRecipe, weights: str, given: Overrides) -> FinetuneRecipe:
    """The recipe for these weights, with the fields given."""
    model = override_finetune_model(plan.recipe.model, weights, given["model"])
    return FinetuneRecipe(recipe=override(plan.recipe, model, given), search=override_search(plan.search, given))


def override_finetune_model(model: ModelRecipe, weights: str, given: dict[str, Any]) -> ModelRecipe:
    if "image_size" in given:
        height, width = height_and_width(given["image_size"]) if given["image_size"] else (None, None)
        given = given | {"image_size": height, "image_width": None if width == height else width}
    return dataclasses.replace(model, weights=weights, **given)
