"""VTAB-1k: fine-tunes on each task and puts the accuracies together; what ``mixer vtab`` does in each process."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from allmlp.api.finetune import finetune_and_report
from allmlp.api.recipe import Overrides, override_finetune
from allmlp.config.recipe import FinetuneRecipe
from allmlp.config.vtab import TASKS
from allmlp.data.sources import hold_out, walk_once
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.errors import UserError
from allmlp.evaluation.vtab import ALL, vtab_means
from allmlp.factory import resized_config
from allmlp.files import to_json, write_text
from allmlp.recipes.vtab import Schedule, vtab
from allmlp.runs.folder import is_empty
from allmlp.runs.resume import check_resumable
from allmlp.training.build import image_size, load_data
from allmlp.training.run import RunOptions
from allmlp.training.sweep import PLAN_FILE, check_plan
from allmlp.weights.load import load

log = logging.getLogger(__name__)

RESULT = "vtab.json"


def plan_tasks(
    weights: str, sources: Mapping[str, str], schedule: Schedule, given: Overrides
) -> dict[str, FinetuneRecipe]:
    """The fine-tuning of each task, with the fields given for all of them.

    Args:
        weights: what each run starts from.
        sources: task → SOURCE.
        schedule: "bit" or "vit", see ``recipes/vtab.py``.
        given: fields of the recipe's sections and of the search.
    """
    return {
        task: override_finetune(vtab(task, schedule), weights, given | {"data": given["data"] | {"data": source}})
        for task, source in sources.items()
    }


def run_vtab(
    plans: Mapping[str, FinetuneRecipe],
    missing: Mapping[str, str],
    out: Path,
    options: RunOptions,
    context: DistributedContext = SINGLE_PROCESS,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Fine-tunes on each task, in ``out/TASK``, and writes ``out/vtab.json`` after each. Collective.

    Tasks that are complete there are not repeated, and an interrupted one is resumed. The data, the weights and the
    folder are checked for all tasks before the first is trained on.

    Args:
        plans: task → its fine-tuning.
        missing: tasks that are left out → where their data could be.
        out: the folder of the tasks' folders.
        options: how the command was started.
        context: the processes that train together.
        progress: show progress bars; None: in a terminal.

    Returns:
        The content of vtab.json: "tasks", "groups" and "all", and as "vtab_top1" the mean of all 19, or None.

    Raises:
        UserError: a mistake in the data of any task, a size that the weights cannot have, or a folder that holds
            something else.
        RunError: a run failed.
        Stopped: by a signal, after a checkpoint.
    """
    options = dataclasses.replace(options, resume=True)
    rows: dict[str, dict[str, Any]] = {}
    result: dict[str, Any] = {}
    with walk_once():
        notes = context.broadcast_from_rank0(lambda: check_all(plans, out))
        for number, (task, plan) in enumerate(plans.items(), 1):
            log.info("task %d of %d: %s", number, len(plans), task)
            summary = finetune_and_report(plan, out / task, options, context, progress)
            rows[task] = describe_task(task, plan, summary) | {"notes": notes[task]}
            result = put_together(rows, missing, plans)
            text = to_json(result | {"command": options.command}, indent=2) + "\n"
            context.broadcast_from_rank0(lambda text=text: write_text(out / RESULT, text))
    return result


def check_all(plans: Mapping[str, FinetuneRecipe], out: Path) -> dict[str, list[str]]:
    """What there is to say of each task's data; raises a UserError for what would stop the command at a later task."""
    if out.is_file() or (out / "recipe.json").exists() or (out / PLAN_FILE).exists():
        what = "is a file" if out.is_file() else "holds another run"
        raise UserError(f"{out} {what}: name another folder with --out")
    for task, plan in plans.items():
        folder = out / task
        if folder.is_dir() and not is_empty(folder):
            if plan.searches or (folder / PLAN_FILE).exists():
                check_plan(plan, folder)
            else:
                check_resumable(plan.recipe, folder)
    weights = {plan.recipe.model.weights for plan in plans.values()}
    config = load(str(weights.pop())).config
    for task, plan in plans.items():
        if (size := image_size(plan.recipe)) is None:
            continue
        try:
            resized_config(config, size)
        except UserError as error:
            raise UserError(f"{task}: {error}; --image-size sets one size for all tasks") from None
    notes = {}
    for task, plan in plans.items():
        data = load_data(plan.recipe)
        if "test" not in data.splits:
            raise UserError(f"{plan.recipe.data.data} has no test images: a VTAB task needs them")
        if plan.search.learning_rates:
            hold_out(data, plan.search.search_fraction, plan.recipe.data.split_seed)
        notes[task] = list(data.notes)
    return notes


def describe_task(task: str, plan: FinetuneRecipe, summary: dict[str, Any]) -> dict[str, Any]:
    """A task's row in vtab.json, from the summary of its fine-tuning."""
    top1s = summary.get("test_top1s", [summary["test_top1"]])
    return {
        "group": TASKS[task].group,
        "top1": summary.get("test_top1_mean", summary["test_top1"]),
        "std": summary.get("test_top1_std"),
        "top1s": top1s,
        "seeds": summary.get("seeds", [summary["seed"]]),
        "commonest_class_top1": summary["test_majority"],
        "verdict": summary["verdicts"].get("test"),
        "learning_rate": summary.get("learning_rate", plan.recipe.optimization.learning_rate),
        "image_size": list(image_size(plan.recipe) or ()) or None,
        "data": plan.recipe.data.data,
        "split": summary["split"],
        "images": summary["images"],
        "unreadable": summary["unreadable"],
    }


def put_together(
    rows: Mapping[str, dict[str, Any]], missing: Mapping[str, str], plans: Mapping[str, FinetuneRecipe]
) -> dict[str, Any]:
    """The tasks with their means, and beside these the means of always answering the commonest class of each test."""
    means = vtab_means({task: row["top1s"] for task, row in rows.items()}, allow_missing=True)
    commonest = vtab_means({task: [row["commonest_class_top1"]] for task, row in rows.items()}, allow_missing=True)
    scores = {
        name: mean.to_json_object() | {"commonest_class_top1": commonest[name].top1} for name, mean in means.items()
    }
    everything = scores.pop(ALL)
    return {
        "vtab_top1": everything["top1"] if everything["complete"] else None,
        "all": everything,
        "groups": scores,
        "tasks": dict(rows),
        "missing": dict(missing),
        "not_selected": [task for task in TASKS if task not in plans and task not in missing],
        "weights": next(iter(plans.values())).recipe.model.weights,
    }
