"""Fine-tuning with a search for the learning rate: ``allmlp.finetune``, and what the command does in each process."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any, Literal

import torch

from allmlp.api.linear_head import fit_and_report
from allmlp.api.recipe import (
    FINETUNE_MODEL_FIELDS,
    FINETUNE_SECTIONS,
    Overrides,
    by_section,
    check_data,
    linear_plan,
    override_finetune,
    unknown_keyword,
)
from allmlp.api.train import Run, check_single_process, describe_call, saved_run, train_and_report
from allmlp.config.recipe import FinetuneRecipe, Recipe
from allmlp.data.sources import walk_once
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.errors import UserError, brief, naming_keywords
from allmlp.factory import Model, as_model
from allmlp.files import as_path
from allmlp.recipes import get_finetune_recipe
from allmlp.runs.folder import claimed_folder
from allmlp.sizes import Size, as_pair
from allmlp.training.build import check_validation
from allmlp.training.run import RunOptions
from allmlp.training.sweep import sweep
from allmlp.weights.load import load
from allmlp.weights.native import save


@naming_keywords
def finetune(
    model: Model | str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    recipe: str = "photos",
    *,
    head: Literal["trained", "linear"] = "trained",
    out: str | os.PathLike[str] | None = None,
    image_size: Size | None = None,
    progress: bool | None = None,
    **fields: Any,
) -> Run:
    """Trains a model further on other classes and writes the run's folder: what ``mixer finetune`` does.

    Args:
        model: a file, a name as for ``load``, or a Mixer; it is not changed. A Mixer is saved beside the run's folder,
            as ``NAME-start.safetensors``, so that the run can be resumed and repeated.
        data: SOURCE; None: that of the recipe.
        recipe: how to fine-tune, by name.
        head: "linear" keeps the weights frozen and fits a regularized linear classifier to their features, its strength
            chosen on validation images.
        out: the run's folder; by default ``runs/RECIPE-DATE-TIME``. If it holds an unfinished run, that is resumed.
        image_size: in pixels; None: that of the recipe, else of the model. Token mixing is resized first.
        progress: show a progress bar; None: in a terminal or a notebook.
        fields: any field of the recipe's sections, such as ``epochs=5``, and of the search: ``learning_rates``,
            ``search_fraction``, ``seeds``. One ``learning_rate`` replaces the search.

    Raises:
        UserError: an unknown recipe or keyword (the message names the nearest), an invalid value, or a folder that
            holds something else.
        RunError: the run failed.
        Stopped: by SIGINT, SIGTERM or SIGHUP, after a checkpoint. A second SIGINT raises KeyboardInterrupt.
    """
    check_single_process()
    given = finetune_fields(fields if data is None else fields | {"data": data}, image_size)
    if not isinstance(recipe, str):
        raise UserError(f"recipe {brief(recipe)}: give a name, such as 'photos'")
    if isinstance(rates := fields.get("learning_rates"), Sized) and not len(rates):
        raise UserError(f"learning_rates = {rates!r}: give several to choose from, or one learning_rate")
    if head not in ("trained", "linear"):
        raise UserError(f"head = {brief(head)}: give 'trained' or 'linear'")
    base = get_finetune_recipe(recipe)
    if not isinstance(model, str | os.PathLike):
        model = as_model(model)
    given_folder = None if out is None else as_path("out", out)
    with claimed_folder(given_folder, base.recipe.name) as folder:
        weights = f"{folder}-start.safetensors" if isinstance(model, Model) else os.fspath(model)
        plan = override_finetune(base, weights, given)
        if head == "linear":
            plan = linear_plan(plan, given)
        check_data(plan.recipe)
        call = {name: value for section in given.values() for name, value in section.items()} | {"out": str(folder)}
        call |= {"head": head} if head != "trained" else {}
        command = describe_call("finetune", repr(weights), recipe=recipe, **call)
        options = RunOptions(command=command, resume=out is not None, resume_command=command, may_exit=False)
        with saved_start(model, Path(weights), folder) if isinstance(model, Model) else contextlib.nullcontext():
            if head == "linear":
                summary = fit_and_report(plan.recipe, folder, options, progress=progress)
            else:
                summary = finetune_and_report(plan, folder, options, progress=progress)
        return saved_run(folder, summary)


def finetune_fields(fields: dict[str, Any], image_size: Size | None) -> Overrides:
    """The keywords by section; of the model's section, those that do not change the shape of the weights."""
    left_out = set(FINETUNE_SECTIONS["model"].__annotations__) - set(FINETUNE_MODEL_FIELDS)
    given = by_section(fields, FINETUNE_SECTIONS)
    for name in given["model"].keys() & left_out:
        known = [name for kind in FINETUNE_SECTIONS.values() for name in kind.__annotations__ if name not in left_out]
        raise unknown_keyword(name, [*known, "image_size"])
    if image_size is not None:
        given["model"]["image_size"] = as_pair(image_size)
    return given


@contextlib.contextmanager
def saved_start(model: Model, path: Path, folder: Path) -> Iterator[None]:
    """Saves the model that a run starts from; removes the file again if the block fails and leaves no run.

    Raises:
        UserError: the file holds another model, that of an earlier run.
    """
    if path.exists():
        before, now = load(path).state_dict(), model.state_dict()
        if before.keys() != now.keys() or not all(torch.equal(before[name], now[name].cpu()) for name in now):
            raise UserError(f"{path} is another model, from which an earlier run started: name another folder with out")
    created = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    save(model, path)
    try:
        yield
    except BaseException:
        if not folder.exists() or not any(folder.iterdir()):
            path.unlink()
            for parent in created:
                with contextlib.suppress(OSError):  # another run uses it by now
                    parent.rmdir()
        raise


def finetune_and_report(
    plan: FinetuneRecipe,
    out: Path,
    options: RunOptions,
    context: DistributedContext = SINGLE_PROCESS,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Tries the learning rates and trains once per seed, or trains once if there is one of each. Collective.

    Of a search, runs that are complete are not repeated. The arguments are those of ``train_and_report``.
    """
    if not plan.searches:
        return train_and_report(plan.recipe, out, options, context, progress)
    each = dataclasses.replace(options, resume=True)

    def run_one(recipe: Recipe, folder: Path) -> dict[str, Any]:
        return train_and_report(recipe, folder, each, context, progress)

    with walk_once():
        context.broadcast_from_rank0(lambda: check_validation(plan.recipe))  # before hours of searching
        return sweep(plan, out, run_one, context)
