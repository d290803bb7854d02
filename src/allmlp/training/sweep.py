"""Fine-tuning as in the paper: chooses the learning rate on held-out training images, then trains once per seed."""

import dataclasses
import json
import logging
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from allmlp.config.recipe import FinetuneRecipe, Recipe
from allmlp.config.serialize import check_version
from allmlp.data.sources import walk_once
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.errors import RunError, UserError
from allmlp.files import to_json, write_text
from allmlp.runs.folder import is_empty, run_folder
from allmlp.training.trainer import Diverged

log = logging.getLogger(__name__)

TrainOne = Callable[[Recipe, Path], dict[str, Any]]  # trains into a folder, with its report; returns the summary
PLAN_FILE = "transfer.json"
LAST_FILE = "report.html"  # written last: a run's folder that has it is complete


def sweep(
    plan: FinetuneRecipe, out: Path, train_one: TrainOne, context: DistributedContext = SINGLE_PROCESS
) -> dict[str, Any]:
    """Chooses the learning rate, trains with every seed, and leaves one folder. Resumes if it was interrupted.

    ``out`` then holds ``search/rate-…`` and ``seed-…``, each the folder of a run; the first seed's weights, report and
    recipe; and ``summary.json``, the first seed's with the rates tried, and the accuracies of all seeds with their mean
    and standard deviation (of a sample, n − 1).

    Args:
        plan: the recipe of each run, and the search.
        out: the folder, new or of the same plan.
        train_one: ``training.run.train`` and its report; resumes a run that is not complete.
        context: the processes that train together. Collective.

    Returns:
        The content of summary.json.

    Raises:
        UserError: a mistake in the recipe, or a folder that holds something else.
        RunError: every rate diverged, or a run failed.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a folder with --out")
    with walk_once(), run_folder(out, context.is_rank0, worth_keeping="**/*.safetensors"):
        context.broadcast_from_rank0(lambda: write_or_check_plan(plan, out))
        tried, rate = choose_rate(plan, out, train_one, context)
        recipe = replace(plan.recipe, optimization=replace(plan.recipe.optimization, learning_rate=rate))
        seeds = range(recipe.run.seed, recipe.run.seed + plan.search.seeds)
        runs = []
        for seed in seeds:
            with_seed = replace(recipe, run=replace(recipe.run, seed=seed))
            runs.append(complete_run(with_seed, out / f"seed-{seed}", train_one, context))
        if failures := [run["failed"] for run in runs if "failed" in run]:
            raise RunError(failures[0])
        accuracies = [run["test_top1"] for run in runs]
        summary = runs[0] | {
            "learning_rate": rate,
            "search": {str(rate): run["val_top1"] for rate, run in tried.items()},
            "seeds": list(seeds),
            "test_top1s": accuracies,
            **mean_and_std(accuracies),
            "total_train_seconds": sum(run.get("train_seconds", 0.0) for run in (*tried.values(), *runs)),
        }
        context.broadcast_from_rank0(lambda: copy_first_run(out / f"seed-{seeds[0]}", summary, out))
    return summary


def copy_first_run(first: Path, summary: dict[str, Any], out: Path) -> None:
    """Copies what the first seed's run produced into the sweep's folder, with the summary of all."""
    for name in ("recipe.json", "model.safetensors", LAST_FILE):
        shutil.copyfile(first / name, out / name)
    if (first / "examples").is_dir():
        shutil.copytree(first / "examples", out / "examples", dirs_exist_ok=True)
    write_text(out / "summary.json", to_json(summary, indent=2) + "\n")


def choose_rate(
    plan: FinetuneRecipe, out: Path, train_one: TrainOne, context: DistributedContext
) -> tuple[dict[float, dict[str, Any]], float]:
    """The summary of each rate's run with part of the training images held out, and the best rate."""
    recipe, tried = plan.recipe, {}
    for rate in plan.search.learning_rates:
        at_rate = replace(
            recipe,
            data=replace(recipe.data, holdout=plan.search.search_fraction),
            optimization=replace(recipe.optimization, learning_rate=rate),
        )
        tried[rate] = complete_run(at_rate, out / "search" / f"rate-{rate}", train_one, context)
        log.info("learning rate %g: held-out top-1 %s", rate, tried[rate]["val_top1"])
    scores = {rate: summary["val_top1"] for rate, summary in tried.items() if summary["val_top1"] is not None}
    if tried and not scores:
        raise RunError(
            f"training diverged at every learning rate ({', '.join(map(str, tried))}): give lower --learning-rates and "
            "a new --out"
        )
    return tried, min(scores, key=lambda rate: (-scores[rate], rate), default=recipe.optimization.learning_rate)


def write_or_check_plan(plan: FinetuneRecipe, out: Path) -> None:
    """Writes the plan into an empty folder, or checks that the folder holds the same plan."""
    if is_empty(out):
        write_text(out / PLAN_FILE, plan_text(plan))
    else:
        check_plan(plan, out)
        log.info("resuming the fine-tuning in %s", out)


def check_plan(plan: FinetuneRecipe, out: Path) -> None:
    """Raises a UserError unless the folder holds this plan; the message names the fields that differ."""
    path = out / PLAN_FILE
    if not path.is_file():
        raise UserError(
            f"{out} exists and holds no unfinished fine-tuning: name another folder with --out, or remove it"
        )
    stored, wanted = read_plan(path), json.loads(plan_text(plan))
    if stored != wanted:
        fields = ", ".join(differing_fields(stored, wanted))
        raise UserError(f"{out} holds another fine-tuning ({fields} differ): repeat its options, or name another --out")


def plan_text(plan: FinetuneRecipe) -> str:
    return to_json(dataclasses.asdict(plan), indent=2) + "\n"


def read_plan(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        check_version(stored["recipe"], path)
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): name another folder with --out, or remove it") from None
    return stored


def differing_fields(a: Any, b: Any, name: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [field for key in sorted({*a, *b}) for field in differing_fields(a.get(key), b.get(key), str(key))]
    return [] if a == b else [name]


def complete_run(recipe: Recipe, folder: Path, train_one: TrainOne, context: DistributedContext) -> dict[str, Any]:
    """The summary of the run in the folder, which is trained or resumed first unless it is complete."""
    summary_file = folder / "summary.json"

    def stored_summary() -> dict[str, Any] | None:
        summary = json.loads(summary_file.read_text(encoding="utf-8")) if summary_file.exists() else {}
        return summary if (folder / LAST_FILE).exists() or "failed" in summary else None

    summary = context.broadcast_from_rank0(stored_summary)
    if summary is not None:
        return summary
    try:
        return train_one(recipe, folder)
    except Diverged as error:
        log.warning("%s", error)
        failed = {"val_top1": None, "test_top1": None, "failed": str(error)}
        context.broadcast_from_rank0(lambda: write_text(summary_file, to_json(failed, indent=2) + "\n"))
        return failed


def mean_and_std(accuracies: list[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation (n − 1; null for one run) of the test accuracies, null where there is no test."""
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    return {
        "test_top1_mean": statistics.mean(known) if known else None,
        "test_top1_std": statistics.stdev(known) if len(known) > 1 else None,
    }
