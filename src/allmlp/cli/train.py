"""mixer train"""

import dataclasses
import datetime
import itertools
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allmlp.cli.arguments import parse
from allmlp.config.recipe import (
    DataRecipe,
    ModelRecipe,
    OptimizationRecipe,
    Recipe,
    RunRecipe,
    check,
    check_ranks,
    from_json,
)
from allmlp.errors import UserError
from allmlp.files import to_json
from allmlp.recipes import RECIPES, get_recipe, listed

if TYPE_CHECKING:
    from allmlp.distributed.context import DistributedContext

DESCRIPTION = """Trains a Mixer from scratch and writes a folder with its weights, metrics and report.html.

usage: mixer train [RECIPE] [OPTIONS], where RECIPE is one of {recipes}; without one, digits for no --data, photos for a
folder or zip. The paper's have reduced twins, RECIPE-small. Every field can be overridden.

examples: mixer train photos --data flowers.zip --image-size 160 --epochs 50
          mixer train imagenet-b16 --data imagenet/ --micro-batch-size 128
          mixer train imagenet-b16 --data imagenet/ --processes 8 --out runs/b16 --resume auto

The defaults below are those of the recipe {name}."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    resume: str | None = None
    """A run's folder, to go on with it from its newest checkpoint; auto: with --out, if there is a run in it."""
    trust_checkpoint: bool = False
    """Go on from checkpoints that no run of yours on this machine has written; loading them can execute code."""
    processes: int = 1
    """Train in so many processes on this machine, one a GPU. torchrun does it too."""
    machines: int = 1
    """Train on so many machines, with so many processes on each; the command runs on each of them."""
    machine: int = 0
    """Which of them this is, from 0."""
    meet: str | None = None
    """HOST:PORT of machine 0, where they meet."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    out: Path | None = None
    """Folder of the run, which must not exist unless it is gone on with; by default runs/RECIPE-DATE-TIME."""
    recipe_file: Path | None = None
    """A recipe.json of an earlier run, in place of RECIPE."""
    json: bool = False
    """Print the summary as one JSON object."""
    launch: Launch = field(default_factory=Launch)
    model: ModelRecipe
    data: DataRecipe
    optimization: OptimizationRecipe
    run: RunRecipe


def run(args: Sequence[str]) -> int:
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
    out = folder(chosen.out, chosen.launch)
    return carry_out(recipe, out, chosen.json, ["train", *args], chosen.launch)


def base_recipe(args: Sequence[str]) -> Recipe:
    """The recipe named by the first word, by --recipe-file or by --resume; else the one for the --data."""
    saved, resumed = option(args, "--recipe-file"), option(args, "--resume")
    if resumed not in (None, "auto"):
        if saved or (args and not args[0].startswith("-")):
            raise UserError(f"--resume {resumed} has a recipe of its own: leave out the other, or give --resume auto")
        return recipe_of(Path(resumed))
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


def recipe_of(run: Path) -> Recipe:
    if not (run / "recipe.json").is_file():
        raise UserError(f"--resume {run}: there is no run, or it was stopped before it began; name its folder, or auto")
    return from_json(run / "recipe.json")


def folder(out: Path | None, launch: Launch) -> Path | None:
    """Of the run, where the words of the call say it."""
    if launch.resume in (None, "auto"):
        if launch.resume and out is None:
            raise UserError("--resume auto without --out: name the folder that the run is, or will be, in")
        return out
    if out is not None and out != Path(launch.resume):
        raise UserError(f"--resume {launch.resume} and --out {out}: a run stays in its folder, so leave out --out")
    return Path(launch.resume)


def carry_out(recipe: Recipe, out: Path | None, as_json: bool, words: Sequence[str], launch: Launch) -> int:
    """Trains in one process or in many, and tells how it went; the exit status."""
    if starts_others(recipe, launch):
        return start_all(launch, words)
    from allmlp.distributed.context import init_distributed

    with init_distributed(recipe.run.timeout_seconds, recipe.run.device) as context:
        speak_for(context)
        chosen = context.broadcast_from_rank0(lambda: out or new_folder(recipe))
        summary = train_and_report(recipe, chosen, f"mixer {shlex.join(words)}", context, launch)
        if context.is_rank0:
            announce(summary, chosen, as_json)
    return 0


def starts_others(recipe: Recipe, launch: Launch) -> bool:
    """Whether this process is to start those of the run, and not one of them."""
    world_size = launch.processes * launch.machines
    if launch.processes < 1 or launch.machines < 1:
        raise UserError(f"--processes {launch.processes} --machines {launch.machines}: at least 1")
    if not 0 <= launch.machine < launch.machines:
        raise UserError(f"--machine {launch.machine} of --machines {launch.machines}: from 0 to {launch.machines - 1}")
    host, _, port = (launch.meet or "").rpartition(":")
    if (launch.machines > 1 or launch.meet) and not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise UserError(f"--meet {launch.meet}: give HOST:PORT of machine 0, as --meet node1:29500")
    started = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else None
    if started is not None and world_size not in (1, int(started) if started.isdecimal() else 0):
        raise UserError(
            f"--processes {launch.processes}, but this is one of {started} that something else has started (RANK and "
            "WORLD_SIZE are set): leave it out, or unset them"
        )
    if world_size == 1 or started is not None:
        return False
    check_ranks(check(recipe), world_size)  # told once, not by each
    return True


def start_all(launch: Launch, words: Sequence[str]) -> int:
    from allmlp.distributed.launcher import Plan
    from allmlp.distributed.launcher import launch as start

    plan = Plan(processes=launch.processes, machines=launch.machines, machine=launch.machine, meet=launch.meet)
    return start(plan, words)


def speak_for(context: "DistributedContext") -> None:
    """What concerns all is said by one."""
    if not context.is_rank0:
        logging.getLogger("allmlp").setLevel(logging.ERROR)


def new_folder(recipe: Recipe) -> Path:
    return Path("runs") / f"{recipe.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def train_and_report(
    recipe: Recipe, out: Path, command: str, context: "DistributedContext", launch: Launch, again: str = ""
) -> dict[str, Any]:
    """Trains, with a progress bar, writes the run's folder with its report, and returns the summary.

    A run to go on with that is complete already is left as it is.
    """
    from allmlp.cli.display import progress_bar
    from allmlp.evaluation.classification import classify
    from allmlp.evaluation.run_report import write_run_report
    from allmlp.runs.resume import finished
    from allmlp.training.run import train

    done = context.broadcast_from_rank0(lambda: finished(recipe, out)) if launch.resume else None
    if done is not None:
        if context.is_rank0:
            print(f"{out} is complete: nothing is left to do", file=sys.stderr)
        return done
    with_all = f" --processes {context.local_world_size}" if context.world_size > 1 else ""
    if launch.machines > 1:
        with_all += f" --machines {launch.machines} --machine {launch.machine} --meet {launch.meet}"
    with progress_bar(context.is_rank0) as bar:
        run = train(
            recipe,
            out,
            classify,
            bar,
            command,
            context=context,
            resume=launch.resume is not None,
            trusted=launch.trust_checkpoint,
            again=again or f"mixer train --resume {shlex.quote(str(out))}{with_all}",
        )
    context.broadcast_from_rank0(lambda: write_run_report(run))
    return run.summary


def announce(summary: dict[str, Any], out: Path, as_json: bool) -> None:
    """The scores, and what to do next; as JSON, all of the summary."""
    from allmlp.cli.display import list_unreadable

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
