"""Training with a report: ``allmlp.train``, and what the commands train and finetune do in each process."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allmlp.api.progress import progress_bar
from allmlp.api.recipe import SECTIONS, base_recipe, by_section, override, override_model
from allmlp.config.recipe import Recipe
from allmlp.config.serialize import from_json
from allmlp.data.sources import load_source
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.errors import UserError, brief, naming_keywords
from allmlp.evaluation.classification import SplitEvaluator
from allmlp.evaluation.fewshot_task import L2, SEEDS, FewshotEvaluator, make_task
from allmlp.evaluation.pages.run_report import write_run_report
from allmlp.factory import Model
from allmlp.files import as_path
from allmlp.runs.folder import claimed_folder
from allmlp.runs.resume import finished_summary
from allmlp.training import run as training
from allmlp.training.run import RunOptions
from allmlp.weights.load import load

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A complete run: its folder, the content of its ``summary.json``, and the model that it saved, on the CPU."""

    folder: Path
    summary: dict[str, Any]
    model: Model


@naming_keywords
def train(
    recipe: str | os.PathLike[str] | Recipe | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool | None = None,
    **fields: Any,
) -> Run:
    """Trains a Mixer in this process and writes the run's folder with its report: what ``mixer train`` does.

    Args:
        recipe: a name, a ``Recipe``, or the path of a ``recipe.json``. None: the recipe of the run to resume; else
            digits, or photos for other data.
        out: the run's folder, empty or new unless the run is resumed; by default ``runs/RECIPE-DATE-TIME``.
        resume: continue the run in ``out`` from its newest checkpoint; if there is none, start it.
        progress: show a progress bar; None: in a terminal or a notebook.
        fields: any field of the recipe's sections, such as ``data="photos/"`` or ``epochs=50``.

    Raises:
        UserError: an unknown recipe or keyword (the message names the nearest), an invalid value, or a folder that
            holds something else.
        RunError: the run failed.
        Stopped: by SIGINT, SIGTERM or SIGHUP, after a checkpoint. A second SIGINT raises KeyboardInterrupt.
    """
    check_single_process()
    given = by_section(fields, SECTIONS)
    if resume and out is None:
        raise UserError("resume=True without out: name the run's folder")
    folder = None if out is None else as_path("out", out)
    resumed = folder if resume and folder is not None and (folder / "recipe.json").is_file() else None
    base = base_recipe(read_if_path(recipe), given["data"].get("data", "digits"), resumed)
    config = override(base, override_model(base.model, given["model"]), given)
    name = "recipe" if isinstance(recipe, Recipe) else None if recipe is None else repr(os.fspath(recipe))
    call = {name: value for section in given.values() for name, value in section.items()}
    with claimed_folder(folder, config.name) as folder:
        options = RunOptions(
            command=describe_call("train", name, **call),
            resume=resume,
            resume_command=describe_call("train", name, **call, out=str(folder), resume=True),
            may_exit=False,
        )
        return saved_run(folder, train_and_report(config, folder, options, progress=progress))


def read_if_path(recipe: str | os.PathLike[str] | Recipe | None) -> str | Recipe | None:
    if isinstance(recipe, os.PathLike) or (isinstance(recipe, str) and recipe.endswith(".json")):
        return from_json(Path(recipe))
    if recipe is not None and not isinstance(recipe, str | Recipe):
        raise UserError(f"recipe {brief(recipe)}: give a name, a Recipe, or the path of a recipe.json")
    return recipe


def describe_call(function: str, first: str | None, **keywords: object) -> str:
    """The call as Python code, for the summary and for messages."""
    words = [first] if first is not None else []
    return f"allmlp.{function}({', '.join([*words, *(f'{name}={value!r}' for name, value in keywords.items())])})"


def check_single_process() -> None:
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != "1":
        raise UserError(
            f"WORLD_SIZE is {world_size}, and a call from Python trains in one process: use mixer train --processes"
        )


def saved_run(folder: Path, summary: dict[str, Any]) -> Run:
    return Run(folder=folder, summary=summary, model=load(folder / "model.safetensors"))


def make_fewshot_evaluator(recipe: Recipe, source: str, **where: Any) -> FewshotEvaluator:
    """The few-shot evaluator of one of the recipe's sources, by the protocol of the paper; ``where`` as its options."""
    data = where["context"].local_rank0_first(
        lambda: load_source(source, val_fraction=0.0, max_pixels=recipe.data.max_pixels)
    )
    if "test" not in data.splits:
        raise UserError(f"--fewshot {source}: it has no test split, which probes are tested on; name another source")
    shot = recipe.run.fewshot_shots
    task = make_task(data.split("train"), data.split("test"), [shot], SEEDS)
    return FewshotEvaluator(Path(source).resolve().stem, task, shot, L2, **where)


def train_and_report(
    recipe: Recipe,
    out: Path,
    options: RunOptions,
    context: DistributedContext = SINGLE_PROCESS,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Trains, writes the run's folder with its report, and returns the summary. Collective.

    A run to resume that is already complete is left as it is.

    Args:
        recipe: what to train, and how.
        out: the run's folder.
        options: how the run is started.
        context: the processes that train together.
        progress: show a progress bar; None: in a terminal or a notebook.
    """
    from allmlp.runs.folder import remove_checkpoints

    summary = context.broadcast_from_rank0(lambda: finished_summary(recipe, out)) if options.resume else None
    if summary is not None:
        if context.is_rank0:
            log.info("%s is complete: nothing is left to do", out)
            remove_checkpoints(out, summary)  # if it was killed before
        return summary
    with progress_bar(progress if context.is_rank0 else False) as bar:
        result = training.train(
            recipe, out, SplitEvaluator, bar, options=options, context=context, make_probe=make_fewshot_evaluator
        )
    context.broadcast_from_rank0(lambda: write_run_report(result))
    context.broadcast_from_rank0(lambda: remove_checkpoints(out, result.summary))
    return result.summary
