"""A whole run: from a recipe to the folder that holds all there is to know about it."""

import datetime
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import torch

from allmlp.checkpointing.manager import CheckpointManager
from allmlp.config.checks import check_world_size
from allmlp.config.recipe import Recipe
from allmlp.data.dataset import DatasetSplits
from allmlp.data.sources import hold_out, load_source
from allmlp.device import select_device, select_precision
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.distributed.parallelize import shard
from allmlp.errors import UserError
from allmlp.files import to_json, write_text
from allmlp.model import Mixer
from allmlp.runs.folder import locked, run_folder
from allmlp.runs.provenance import current_commit, describe_device, peak_memory, versions
from allmlp.runs.resume import check_same, claim, take
from allmlp.training.fit import FitResult, fit
from allmlp.training.initialization import prepare
from allmlp.training.memory import keep_freed_memory
from allmlp.training.preemption import Control
from allmlp.training.signals import deferred_signals
from allmlp.training.watch import Progress, R
from allmlp.weights.native import save
from allmlp.weights.published import variant_of

log = logging.getLogger(__name__)


Evaluate = Callable[..., R]  # (model, part, *, device, precision, on_progress, world) -> R


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is started or resumed: no part of the recipe."""

    command: str = ""
    resume: bool = False
    trust_checkpoint: bool = False
    resume_command: str = "the same command and --resume auto"


@dataclass(frozen=True, kw_only=True)
class Run(Generic[R]):
    """What a finished run leaves: its folder, its summary, the model, and the evaluation of each held-out part."""

    out: Path
    recipe: Recipe
    summary: dict[str, Any]
    metrics: list[dict[str, float]]
    model: Mixer
    source: DatasetSplits
    results: dict[str, R]  # "val", "test", where there are such parts


def train(
    recipe: Recipe,
    out: Path,
    evaluate: Evaluate[R],
    progress: Progress,
    command: str = "",
    *,
    context: DistributedContext = SINGLE_PROCESS,
    resume: bool = False,
    trusted: bool = False,
    again: str = "the same command and --resume auto",
    options: RunOptions | None = None,
) -> Run[R]:
    """Trains a model, new or from weights, and writes the run's folder, all of it but the report.

    Args:
        recipe: what to train, and how.
        out: the run's folder.
        evaluate: measures a model on a part.
        progress: is told how far the run is.
        command: for the summary.
        world: the processes that train together; each calls this with the same arguments.
        resume: go on with the run in ``out`` from its newest sound checkpoint, if there is such a run.
        trusted: take checkpoints that are not this user's own.
        again: the words that go on with the run, for the message when a signal ends it.

    Raises:
        UserError: a mistake in the recipe or the data; a folder this call made is removed again.
        RunError: a loss that is not finite, a batch that does not fit the memory, or a full disk.
        Stopped: by SIGTERM or SIGINT, after a checkpoint.
    """
    if options is not None:
        command, again = options.command, options.resume_command
        resume, trusted = options.resume, options.trust_checkpoint
    check_world_size(recipe, context.world_size)
    if not resume and context.broadcast_from_rank0(out.exists):
        raise UserError(f"{out} exists: go on with it by --resume {out}, name another folder with --out, or remove it")
    if context.broadcast_from_rank0(lambda: out.exists() and not out.is_dir()):
        raise UserError(f"{out} is a file: name a folder with --out")
    device = context.local_device(select_device(recipe.run.device))
    precision = select_precision(recipe.run.precision, device)
    start = prepare(recipe)  # a mistake in the sizes is told before any data is read
    if device.type == "cpu":
        keep_freed_memory()
    context.heartbeat("reading the data", slow=True)
    source = context.local_rank0_first(lambda: read_source(recipe))
    origin = {
        "seed": recipe.run.seed,
        "command": command,
        "commit": current_commit(),
        "versions": versions(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    with deferred_signals() as signals, run_folder(out, context.is_rank0), locked(out, context.is_rank0):
        checkpoints = CheckpointManager(
            out / "checkpoints", context, recipe.run.keep_checkpoints, recipe.run.save_in_background
        )
        control = Control(context, signals, checkpoints, 60 * recipe.run.save_every_minutes, again)
        found = context.broadcast_from_rank0(lambda: claim(recipe, out, trusted))
        if found is not None:
            checkpoints.last = found.state["step"]
            check_same(found.state, source, str(precision).removeprefix("torch."), found.folder)
            whose = "trusted as you asked" if trusted else "trusted: one of your own"
            log.info("going on after step %d, from %s (%s)", found.state["step"], found.folder, whose)
        context.broadcast_from_rank0(lambda: take(recipe, out, found))
        model = start.build_meta(source.classes)
        if recipe.run.shard and context.world_size > 1:
            shard(model, context, device)
        model.to_empty(device=device)
        if found is None:
            start.fill(model)

        def examine(model: Mixer, part: str) -> R:
            def show(done: int, total: int) -> None:
                context.heartbeat(f"evaluating on {part}")
                control.poll()
                progress.update(done, total, f"evaluating on {part}")

            return evaluate(
                model, source.splits[part], device=device, precision=precision, on_progress=show, context=context
            )

        fitted = fit(recipe, out, source, model, device, precision, examine, progress, control, found)
        model = fitted.model
        results = {"val": fitted.val} if fitted.val else {}
        if context.is_rank0:
            save(model, out / "model.safetensors", **origin)
        results |= {"test": examine(model, "test")} if "test" in source.splits else {}
        summary = summarise(recipe, source, model, fitted, results, device, precision, context) | origin
        measured = {key: summary[key] for key in ("data", "split", "epochs", "val_top1", "test_top1")}
        if context.is_rank0:
            save(model, out / "model.safetensors", **origin, **measured)
            write_text(out / "summary.json", to_json(summary, indent=2) + "\n")
    metrics = fitted.metrics
    return Run(out=out, recipe=recipe, summary=summary, metrics=metrics, model=model, source=source, results=results)


def summarise(
    recipe: Recipe,
    source: DatasetSplits,
    model: Mixer,
    fitted: FitResult[R],
    results: dict[str, R],
    device: torch.device,
    precision: torch.dtype,
    context: DistributedContext,
) -> dict[str, Any]:
    """What summary.json holds, but for where it comes from."""
    images = fitted.steps * recipe.optimization.global_batch_size
    bad = fitted.unreadable + [name for result in results.values() for name in result.unreadable]
    return {
        "model": describe_model(model),
        "started_from": recipe.model.weights,
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": recipe.data.data,
        "split": source.description,
        "images": {name: len(part) for name, part in source.splits.items()},
        "left_out": source.left_out,
        "steps": fitted.steps,
        "kept_step": fitted.kept_step,
        "warmup_steps": fitted.warmup_steps,
        "epochs": images / len(source.splits["train"]),
        "images_per_second": images / fitted.step_seconds,
        "train_seconds": fitted.compile_seconds + fitted.step_seconds,
        "compile_seconds": fitted.compile_seconds,
        "peak_memory_bytes": peak_memory(device),
        "val_top1": results["val"].top1 if "val" in results else None,
        "test_top1": results["test"].top1 if "test" in results else None,
        "device": describe_device(device),
        "processes": context.world_size,
        "sharded": recipe.run.shard and context.world_size > 1,
        "precision": str(precision).removeprefix("torch."),
        "compiled": fitted.compiled,
        "unreadable_images": len(bad),
        "unreadable": bad,
    }


def read_source(recipe: Recipe) -> DatasetSplits:
    """The recipe's data, said to the user; a UserError where a classifier cannot be trained on it."""
    data = recipe.data
    source = find_source(recipe)
    if data.holdout:
        source = hold_out(source, data.holdout, data.split_seed)
    parts = ", ".join(f"{len(part):,} {name}" for name, part in source.splits.items())
    log.info("%s: %d classes; images: %s", source.description, len(source.classes), parts)
    for ending, count in source.left_out.items():
        log.warning("%d files left out: %s", count, ending)
    source.split("train")
    if len(source.classes) < 2:
        raise UserError(f"{data.data} has one class, {', '.join(source.classes)}: a classifier needs at least two")
    require_validation(recipe, source)
    return source


def find_source(recipe: Recipe) -> DatasetSplits:
    data = recipe.data
    return load_source(
        data.data,
        val_fraction=0.0 if data.holdout else data.val_fraction,
        test_fraction=data.test_fraction,
        split_seed=data.split_seed,
        max_pixels=data.max_pixels,
    )


def check_validation(recipe: Recipe) -> None:
    """A UserError where the recipe goes by validation images that its data does not have."""
    if recipe.run.keep == "best" or recipe.run.patience is not None:
        require_validation(recipe, find_source(recipe))


def require_validation(recipe: Recipe, source: DatasetSplits) -> None:
    chooses = {"--keep best": recipe.run.keep == "best", "--patience": recipe.run.patience is not None}
    for choice, asked in chooses.items():
        if asked and "val" not in source.splits:
            raise UserError(f"{choice} goes by validation images, and there are none: give a --val-fraction above 0")


def describe_model(model: Mixer) -> str:
    sizes, variant = model.config, variant_of(model.config)
    named = f"Mixer-{variant}" if variant else "Mixer"
    patch = "×".join(map(str, sizes["patch_size"]))
    return f"{named}: {sizes['num_blocks']} blocks, C {sizes['hidden_dim']}, patch {patch}"
