"""Transfer as the paper does it: the learning rate chosen on held-out training images, then several runs on all."""

import dataclasses
import json
import logging
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from allmlp.config.recipe import Recipe, Transfer
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.errors import RunError, UserError
from allmlp.files import to_json, write_text
from allmlp.runs.folder import run_folder
from allmlp.training.fit import Diverged

log = logging.getLogger(__name__)

RunOne = Callable[[Recipe, Path], dict[str, Any]]  # trains into a folder, report and all; the summary
LAST_FILE = "report.html"  # of a run's folder: with it, the run is whole


def transfer(
    plan: Transfer, out: Path, run_one: RunOne, context: DistributedContext = SINGLE_PROCESS
) -> dict[str, Any]:
    """Searches, trains, and leaves one folder; called again with the same folder, goes on where it was stopped.

    In ``out``: ``search/rate-…`` and ``seed-…``, each a run's folder; the first seed's weights, report and recipe; and
    ``summary.json``, which is that run's with the rates tried, and all seeds' accuracies with mean and standard
    deviation (of a sample, n − 1).

    Args:
        plan: the recipe of each run, and the search.
        out: the folder, new or of the same plan.
        run_one: as ``training.run.train`` with a report; goes on with a run that was not finished.
        world: the processes that train together; each calls this.

    Returns:
        What summary.json holds.

    Raises:
        UserError: a mistake in the recipe, or a folder that holds something else.
        RunError: every rate diverged, or a run failed.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a folder with --out")
    with run_folder(out, context.is_rank0, worth_keeping="**/checkpoints/*"):
        context.broadcast_from_rank0(lambda: claim(plan, out))
        tried, rate = choose(plan, out, run_one, context)
        recipe = replace(plan.recipe, optimization=replace(plan.recipe.optimization, learning_rate=rate))
        seeds = range(recipe.run.seed, recipe.run.seed + plan.search.seeds)
        runs = [
            finished(replace(recipe, run=replace(recipe.run, seed=s)), out / f"seed-{s}", run_one, context)
            for s in seeds
        ]
        if failures := [run["failed"] for run in runs if "failed" in run]:
            raise RunError(failures[0])
        accuracies = [run["test_top1"] for run in runs]
        summary = runs[0] | {
            "learning_rate": rate,
            "search": {str(rate): run["val_top1"] for rate, run in tried.items()},
            "seeds": list(seeds),
            "test_top1s": accuracies,
            **spread(accuracies),
            "total_train_seconds": sum(run.get("train_seconds", 0.0) for run in (*tried.values(), *runs)),
        }
        context.broadcast_from_rank0(lambda: show(out / f"seed-{seeds[0]}", summary, out))
    return summary


sweep = transfer


def show(first: Path, summary: dict[str, Any], out: Path) -> None:
    """What the first seed's run has made, and the summary of all, in the folder itself."""
    for name in ("recipe.json", "model.safetensors", LAST_FILE):
        shutil.copyfile(first / name, out / name)
    if (first / "examples").is_dir():
        shutil.copytree(first / "examples", out / "examples", dirs_exist_ok=True)
    write_text(out / "summary.json", to_json(summary, indent=2) + "\n")


def choose(
    plan: Transfer, out: Path, run_one: RunOne, context: DistributedContext
) -> tuple[dict[float, dict[str, Any]], float]:
    """The summary of each rate's run with a part of the training images held out, and the rate to use."""
    recipe, tried = plan.recipe, {}
    for rate in plan.search.learning_rates:
        at_rate = replace(
            recipe,
            data=replace(recipe.data, holdout=plan.search.search_fraction),
            optimization=replace(recipe.optimization, learning_rate=rate),
        )
        tried[rate] = finished(at_rate, out / "search" / f"rate-{rate}", run_one, context)
        log.info("learning rate %g: held-out top-1 %s", rate, tried[rate]["val_top1"])
    scores = {rate: summary["val_top1"] for rate, summary in tried.items() if summary["val_top1"] is not None}
    if tried and not scores:
        raise RunError(
            f"every learning rate diverged: {', '.join(map(str, tried))}; give lower --learning-rates and a new --out"
        )
    return tried, min(scores, key=lambda rate: (-scores[rate], rate), default=recipe.optimization.learning_rate)


def claim(plan: Transfer, out: Path) -> None:
    """Writes the plan into an empty folder, or finds it to hold the same."""
    text = to_json(dataclasses.asdict(plan), indent=2) + "\n"
    path = out / "transfer.json"
    if not any(out.iterdir()):
        write_text(path, text)
    elif not path.is_file():
        raise UserError(f"{out} exists and holds no unfinished transfer: name another folder with --out, or remove it")
    elif (stored := json.loads(path.read_text(encoding="utf-8"))) != json.loads(text):
        changed = ", ".join(differences(stored, json.loads(text)))
        raise UserError(f"{out} holds another transfer ({changed} differ): repeat its options, or name another --out")
    else:
        log.info("going on with the transfer in %s", out)


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [name for key in sorted({*a, *b}) for name in differences(a.get(key), b.get(key), str(key))]
    return [] if a == b else [where]


def finished(recipe: Recipe, folder: Path, run_one: RunOne, context: DistributedContext) -> dict[str, Any]:
    """The summary of the run in the folder, which is trained first, or to its end, unless it is there, whole."""
    done = folder / "summary.json"

    def known() -> dict[str, Any] | None:
        told = json.loads(done.read_text(encoding="utf-8")) if done.exists() else {}
        return told if (folder / LAST_FILE).exists() or "failed" in told else None

    summary = context.broadcast_from_rank0(known)
    if summary is not None:
        return summary
    try:
        return run_one(recipe, folder)
    except Diverged as error:
        log.warning("%s", error)
        failed = {"val_top1": None, "test_top1": None, "failed": str(error)}
        context.broadcast_from_rank0(lambda: write_text(done, to_json(failed, indent=2) + "\n"))
        return failed


def spread(accuracies: list[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation (n − 1; null for one run) of the test accuracies, null where there is no test."""
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    return {
        "test_top1_mean": statistics.mean(known) if known else None,
        "test_top1_std": statistics.stdev(known) if len(known) > 1 else None,
    }
