"""mixer finetune"""

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from allmlp.cli.arguments import pair, parse
from allmlp.cli.train import (
    Launch,
    announce,
    carry_out,
    dashed,
    folder,
    new_folder,
    option,
    prefer,
    speak_for,
    start_all,
    starts_others,
    train_and_report,
)
from allmlp.config.recipe import (
    DataRecipe,
    OptimizationRecipe,
    Recipe,
    RunRecipe,
    SearchRecipe,
    Transfer,
    check_transfer,
)
from allmlp.errors import UserError
from allmlp.recipes import TRANSFERS, get_transfer, listed

DESCRIPTION = """Trains weights further on your own classes: the head starts at zero, the rest as it was.

usage: mixer finetune WEIGHTS [RECIPE] [OPTIONS], where RECIPE is one of {recipes}; without one, photos, for a small
machine. Each has a reduced twin, RECIPE-small.

examples: mixer finetune Mixer-B_16.npz --data photos/ --image-size 448
          mixer finetune Mixer-B_16.npz pets --micro-batch-size 32

The learning rate is chosen among --learning-rates on held-out training images, never on test; then all are trained on,
once for each of --seeds. One --learning-rate, and it is not searched. The same command with the same --out goes on
where it was stopped. At another image size token mixing is first resized (mixer resize --help says how).

The defaults below are those of the recipe {name}."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    weights: tyro.conf.Positional[str]
    """A file of ours, the authors' (.npz), timm's or lucidrains', or hf-hub:OWNER/NAME."""
    out: Path | None = None
    """Folder of the run; by default runs/RECIPE-DATE-TIME. One that was not finished is gone on with."""
    json: bool = False
    """Print the summary as one JSON object."""
    launch: Launch = field(default_factory=Launch)
    image_size: tuple[int, ...] = ()
    """In pixels, one number, or height and width; multiples of the patch size; by default that of the weights."""
    frozen: bool = False
    """Only the new head is trained."""
    dropout: float = 0.0
    """After each dense layer of an MLP block."""
    stochastic_depth: float = 0.0
    """Probability to drop the last block's branches; rises linearly from 0 at the first."""
    rescale: bool = False
    """Divide surviving branches by 1 − p (timm does, the authors' code does not)."""
    search: SearchRecipe
    data: DataRecipe
    optimization: OptimizationRecipe
    run: RunRecipe


def run(args: Sequence[str]) -> int:
    args = [dashed(arg) for arg in args]
    plan, words = base_transfer(args)
    recipe, size = prefer(plan.recipe, args), plan.recipe.model.image_size
    if option(args, "--learning-rate"):
        if option(args, "--learning-rates"):
            raise UserError("both --learning-rate and --learning-rates: one rate, or several to choose from")
        plan = dataclasses.replace(plan, search=dataclasses.replace(plan.search, learning_rates=()))
    chosen = parse(
        Arguments,
        words,
        verb="finetune",
        description=DESCRIPTION.format(recipes=listed(TRANSFERS), name=recipe.name),
        default=Arguments(
            weights="",
            image_size=() if size is None else (size,),
            search=plan.search,
            data=recipe.data,
            optimization=recipe.optimization,
            run=recipe.run,
        ),
    )
    if not chosen.weights:
        raise UserError("no weights: name a file, or hf-hub:OWNER/NAME (mixer finetune --help)")
    if not chosen.data.data:
        raise UserError("no --data: name the images to fine-tune on (cifar10, pets, …, a folder, or a .zip of one)")
    settings = ("dropout", "stochastic_depth", "rescale", "frozen")
    height, width = pair(chosen.image_size) if chosen.image_size else (None, None)
    recipe = dataclasses.replace(
        recipe,
        model=dataclasses.replace(
            recipe.model,
            weights=chosen.weights,
            image_size=height,
            image_width=None if width == height else width,
            **{name: getattr(chosen, name) for name in settings},
        ),
        **{name: getattr(chosen, name) for name in ("data", "optimization", "run")},
    )
    plan = check_transfer(Transfer(recipe=recipe, search=chosen.search))
    launch = dataclasses.replace(chosen.launch, resume=chosen.launch.resume or ("auto" if chosen.out else None))
    out, command = folder(chosen.out, launch), ["finetune", *args]
    if not (plan.search.learning_rates or plan.search.seeds > 1):
        return carry_out(recipe, out, chosen.json, command, launch)
    return search_and_train(plan, out, chosen.json, command, launch)


def base_transfer(args: Sequence[str]) -> tuple[Transfer, Sequence[str]]:
    """The recipe named by the second word, else photos, and the words without its name."""
    if len(args) > 1 and not args[0].startswith("-") and not args[1].startswith("-"):
        return get_transfer(args[1]), [args[0], *args[2:]]
    return get_transfer("photos"), args


def search_and_train(plan: Transfer, out: Path | None, as_json: bool, words: Sequence[str], launch: Launch) -> int:
    """As ``carry_out``, for many runs; those that are complete are not made again."""
    if starts_others(plan.recipe, launch):
        return start_all(launch, words)
    from allmlp.distributed.context import init_distributed
    from allmlp.training.run import check_validation
    from allmlp.training.sweep import transfer

    launch = dataclasses.replace(launch, resume="auto")
    command = f"mixer {shlex.join(words)}"
    with init_distributed(plan.recipe.run.timeout_seconds, plan.recipe.run.device) as context:
        speak_for(context)
        context.local_rank0_first(lambda: check_validation(plan.recipe))  # before hours of searching
        chosen = context.broadcast_from_rank0(lambda: out or new_folder(plan.recipe))
        again = command if out else f"{command} --out {shlex.quote(str(chosen))}"

        def run_one(recipe: Recipe, folder: Path) -> dict[str, Any]:
            return train_and_report(recipe, folder, command, context, launch, again)

        summary = transfer(plan, chosen, run_one, context)
        if context.is_rank0:
            announce(summary, chosen, as_json)
    return 0
