"""mixer train"""

import dataclasses
import datetime
import itertools
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlp_mixer.cli.arguments import parse
from mlp_mixer.errors import UserError
from mlp_mixer.files import to_json
from mlp_mixer.recipes import RECIPES, get_recipe, listed
from mlp_mixer.training.recipe import DataRecipe, ModelRecipe, OptimizationRecipe, Recipe, RunRecipe, from_json

DESCRIPTION = """Trains a Mixer from scratch and writes a folder with its weights, metrics and report.html.

usage: mixer train [RECIPE] [OPTIONS], where RECIPE is one of {recipes}; without one, digits for no --data, photos for a
folder or zip. The paper's have reduced twins, RECIPE-small. Every field can be overridden.

examples: mixer train photos --data flowers.zip --image-size 160 --epochs 50
          mixer train imagenet-b16 --data imagenet/ --micro-batch-size 128

The defaults below are those of the recipe {name}."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    out: Path | None = None
    """Folder of the run, which must not exist; by default runs/RECIPE-DATE-TIME."""
    recipe_file: Path | None = None
    """A recipe.json of an earlier run, in place of RECIPE."""
    json: bool = False
    """Print the summary as one JSON object."""
    model: ModelRecipe
    data: DataRecipe
    optimization: OptimizationRecipe
    run: RunRecipe


def run(args: Sequence[str]) -> None:
    args = [dashed(arg) for arg in args]
    recipe = base_recipe(args)
    words = args[1:] if args and not args[0].startswith("-") else args
    if option(args, "--model"):  # a variant's own sizes, not those of the recipe
        free = dict.fromkeys(("patch_size", "num_blocks", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim"))
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, image_size=224, **free))
    elif option(args, "--weights"):  # all of the model is theirs
        recipe = dataclasses.replace(recipe, model=ModelRecipe(image_size=None))
    recipe = prefer(recipe, args)
    given = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(Recipe) if field.name != "name"}
    chosen = parse(
        Arguments,
        words,
        verb="train",
        description=DESCRIPTION.format(recipes=listed(RECIPES), name=recipe.name),
        default=Arguments(**given),
    )
    recipe = dataclasses.replace(recipe, **{name: getattr(chosen, name) for name in given})
    out = chosen.out or Path("runs") / f"{recipe.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    carry_out(recipe, out, chosen.json, f"mixer train {shlex.join(args)}".strip())


def base_recipe(args: Sequence[str]) -> Recipe:
    """The recipe named by the first word or by --recipe-file; else the one for the --data."""
    saved = option(args, "--recipe-file")
    named = args[0] if args and not args[0].startswith("-") else None
    if saved and named:
        raise UserError(f"both a recipe, {named!r}, and --recipe-file {saved}: give one of them")
    if saved:
        return from_json(Path(saved))
    return get_recipe(
        named or {None: "digits"}.get(data := option(args, "--data"), data if data in RECIPES else "photos")
    )


def dashed(arg: str) -> str:
    """--batch_size is --batch-size, as tyro takes it."""
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value if arg.startswith("--") else arg


def prefer(recipe: Recipe, args: Sequence[str]) -> Recipe:
    """Where epochs are given, the recipe's own steps do not count."""
    if option(args, "--epochs") and not option(args, "--steps"):
        recipe = dataclasses.replace(recipe, optimization=dataclasses.replace(recipe.optimization, steps=None))
    if option(args, "--evaluate-every-epochs") and not option(args, "--evaluate-every-steps"):
        recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, evaluate_every_steps=None))
    return recipe


def option(args: Sequence[str], name: str) -> str | None:
    """The value of an option before the rest is parsed, as ``--name value`` or ``--name=value``."""
    for word, following in itertools.zip_longest(args, args[1:]):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.removeprefix(f"{name}=")
    return None


def carry_out(recipe: Recipe, out: Path, as_json: bool, command: str) -> None:
    announce(train_and_report(recipe, out, command), out, as_json)


def train_and_report(recipe: Recipe, out: Path, command: str) -> dict[str, Any]:
    """Trains, with a progress bar, writes the run's folder with its report, and returns the summary."""
    from mlp_mixer.cli.display import progress_bar
    from mlp_mixer.evaluation.classification import classify
    from mlp_mixer.evaluation.showcase import report
    from mlp_mixer.training.run import train

    with progress_bar() as bar:
        done = train(recipe, out, classify, bar, command)
    report(done)
    return done.summary


def announce(summary: dict[str, Any], out: Path, as_json: bool) -> None:
    """The scores, and what to do next; as JSON, all of the summary."""
    from mlp_mixer.cli.display import list_unreadable

    if as_json:
        print(to_json({"out": str(out), **summary}))
    else:
        scores = {"validation": summary["val_top1"], "test": summary["test_top1"]}
        shown = ", ".join(f"{name} top-1 {score:.4f}" for name, score in scores.items() if score is not None)
        print(f"{shown or 'no held-out images'} after {summary['train_seconds']:.1f} s of training")
        for rate, score in summary.get("search", {}).items():
            mark = " (chosen)" if float(rate) == summary["learning_rate"] else ""
            print(f"rate     {rate}: " + ("diverged" if score is None else f"held-out top-1 {score:.4f}{mark}"))
        if summary.get("test_top1_std") is not None:
            mean, deviation = summary["test_top1_mean"], summary["test_top1_std"]
            print(f"test     top-1 {mean:.4f} ± {deviation:.4f} over {len(summary['seeds'])} seeds")
        print(f"weights  {out}/model.safetensors")
        print(f"report   {out}/report.html")
        if (out / "examples").is_dir():
            print(f"try      mixer predict {out}/model.safetensors {out}/examples")
    if summary["unreadable"]:
        print(list_unreadable(summary["unreadable"]), file=sys.stderr)
