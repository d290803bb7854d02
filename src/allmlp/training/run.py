"""A whole training run: from a recipe to the folder with its weights, metrics and summary."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from allmlp.config.batch_size import check_world_size
from allmlp.config.recipe import Recipe
from allmlp.data.dataset import DatasetSplits
from allmlp.device import current_device, device_errors, select_precision
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.distributed.parallelize import shard
from allmlp.errors import UserError
from allmlp.factory import Model, describe_model
from allmlp.files import to_json, write_text
from allmlp.runs.folder import is_empty, locked, run_folder
from allmlp.runs.provenance import current_commit, describe_device, versions
from allmlp.runs.result import RunResult
from allmlp.runs.resume import (
    Checkpoint,
    check_resumable,
    check_same_data,
    find_checkpoint,
    fingerprint,
    prepare_folder,
    record_start,
)
from allmlp.training.build import Built, build, build_data, build_initializer, build_preemption
from allmlp.training.compilation import ensure_cache, restore_eager
from allmlp.training.memory import keep_freed_memory, peak_memory
from allmlp.training.preemption import Preemption, deferred_signals
from allmlp.training.trainer import Evaluator, Progress
from allmlp.weights.native import save

log = logging.getLogger(__name__)

MakeEvaluator = Callable[..., Evaluator]  # (name, dataset, *, device, precision, context, on_batch) → Evaluator
MakeProbe = Callable[..., Evaluator]  # (recipe, source, *, device, precision, context, on_batch) → Evaluator


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is started; what it trains is in its recipe."""

    command: str = ""  # for the summary
    resume: bool = False  # continue the run in the folder from its newest intact checkpoint, if there is one
    resume_command: str = "the same command and --resume auto"  # for the message when a signal stops the run
    may_exit: bool = True  # a second signal ends the process; else it raises KeyboardInterrupt


def train(
    recipe: Recipe,
    out: Path,
    make_evaluator: MakeEvaluator,
    progress: Progress,
    options: RunOptions = RunOptions(),
    context: DistributedContext = SINGLE_PROCESS,
    make_probe: MakeProbe | None = None,
) -> RunResult:
    """Trains a model, new or from weights, and writes the run's folder, all of it except the report. Collective.

    Args:
        recipe: what to train, and how.
        out: the run's folder.
        make_evaluator: makes the evaluator of a split, for instance ``SplitEvaluator``.
        progress: shows the progress of the run.
        options: how the run is started.
        context: the processes that train together.
        make_probe: makes the few-shot evaluator of a source; needed if the recipe names any.

    Raises:
        UserError: a mistake in the recipe or the data; a folder created by this call is removed again.
        RunError: a loss that is not finite, a batch that does not fit into memory, or a full disk.
        Stopped: by SIGTERM, SIGHUP or SIGINT, after a checkpoint.
    """
    check_world_size(recipe, context.world_size)
    check_folder(recipe, out, options, context)
    device = context.select_device(recipe.run.device)
    precision = select_precision(recipe.run.precision, device)
    initializer = build_initializer(recipe)  # reports mistakes in the sizes before any data is read
    if device.type == "cpu":
        keep_freed_memory()
    ensure_cache()
    context.heartbeat("reading the data", slow=True)
    data = build_data(recipe, context)
    too_large = device_errors("the model and its optimizer", "train a smaller model, or --shard it over more processes")
    with (
        deferred_signals(options.may_exit) as signals,
        run_folder(out, context.is_rank0),
        locked(out, context.is_rank0),
        current_device(device),
        too_large,
    ):
        preemption = build_preemption(recipe, out, signals, options.resume_command, context)
        checkpoint = find_start(recipe, out, data, precision, preemption)
        resumed = checkpoint is not None
        starts = context.broadcast_from_rank0(lambda: record_start(out, options.command, resumed))
        origin = describe_origin(recipe, starts)
        model = initializer.build_meta(data.classes)
        if recipe.run.shard and context.world_size > 1:
            shard(model, context, device)
        model.to_empty(device=device)
        if checkpoint is None:
            initializer.init_weights(model)

        def where(activity: str) -> dict[str, Any]:
            def on_batch(done: int, total: int) -> None:
                context.heartbeat(activity)
                preemption.check()
                progress.update(done, total, activity)

            workers = recipe.data.workers
            return {
                "device": device, "precision": precision, "workers": workers, "context": context, "on_batch": on_batch,
            }  # fmt: skip

        def evaluator(split: str) -> Evaluator:
            return make_evaluator(split, data.splits[split], **where(f"evaluating on {split}"))

        validation = [evaluator("val")] if "val" in data.splits else []
        probes = make_probes(recipe, make_probe, where)
        built = build(recipe, data, model, device, precision, [*validation, *probes], preemption, progress)
        if checkpoint is not None:
            built.trainer.load(checkpoint)
        built.trainer.fit()
        model, kept_step = built.trainer.kept_model(recipe.run.keep)
        if context.is_rank0:
            save(model, out / "model.safetensors", **origin)
        held_out = [*validation]
        if "test" in data.splits:
            held_out.append(evaluator("test"))
            held_out[-1](model)
        restore_eager(model)
        results = {evaluator.name: evaluator.result for evaluator in held_out}
        summary = summarize(recipe, data, model, built, results, kept_step) | origin
        summary["fewshot"] = {probe.name: probe.result.mean(recipe.run.fewshot_shots) for probe in probes}
        if context.is_rank0:
            kept = ("data", "split", "epochs", "val_top1", "test_top1", "val_majority", "test_majority")
            scores: dict[str, Any] = {key: summary[key] for key in kept}
            trained_on = fingerprint(data)["train"]["sha256"]
            save(model, out / "model.safetensors", **origin, **scores, training_images=trained_on)
            write_text(out / "summary.json", to_json(summary, indent=2) + "\n")
    metrics = built.trainer.records.metrics
    return RunResult(
        folder=out, recipe=recipe, summary=summary, metrics=metrics, model=model, data=data, results=results
    )


def make_probes(
    recipe: Recipe, make_probe: MakeProbe | None, where: Callable[[str], dict[str, Any]]
) -> list[Evaluator]:
    """The few-shot evaluators of the recipe's sources. ``where(activity)``: the arguments of every evaluator."""
    if not recipe.run.fewshot:
        return []
    if make_probe is None:
        raise ValueError(f"no make_probe for the few-shot sources {recipe.run.fewshot}")
    probes = [make_probe(recipe, source, **where(f"few-shot probe on {source}")) for source in recipe.run.fewshot]
    names = [probe.name for probe in probes]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"--fewshot {' '.join(recipe.run.fewshot)}: two sources give {repeated[0]}; rename one, or leave it out"
        )
    return probes


def check_folder(recipe: Recipe, out: Path, options: RunOptions, context: DistributedContext) -> None:
    """Raises a UserError if the run cannot be written to the folder, before any data is read. Collective."""
    if not options.resume and context.broadcast_from_rank0(lambda: out.is_dir() and not is_empty(out)):
        raise UserError(f"{out} exists: resume it with --resume {out}, name another folder with --out, or remove it")
    if context.broadcast_from_rank0(lambda: out.exists() and not out.is_dir()):
        raise UserError(f"{out} is a file: name a folder with --out")
    context.broadcast_from_rank0(lambda: check_resumable(recipe, out) if out.exists() else None)


def describe_origin(recipe: Recipe, starts: list[dict[str, str]]) -> dict[str, Any]:
    """Where the weights of the run come from, for their metadata and the summary."""
    return {
        "seed": recipe.run.seed,
        "command": starts[0]["command"],
        "resumed_with": [start["command"] for start in starts[1:]],
        "commit": current_commit(),
        "versions": versions(),
        "started": starts[0]["started"],
    }


def find_start(
    recipe: Recipe,
    out: Path,
    data: DatasetSplits,
    precision: torch.dtype,
    preemption: Preemption,
) -> Checkpoint | None:
    """The checkpoint that the run resumes from, None for a new run; then the folder is this run's. Collective."""
    context = preemption.context
    checkpoint = context.broadcast_from_rank0(lambda: find_checkpoint(recipe, out))
    if checkpoint is not None:
        preemption.checkpoints.last_step = checkpoint.state["step"]
        check_same_data(checkpoint, data, str(precision).removeprefix("torch."))
        log.info("resuming after step %d, from %s", checkpoint.state["step"], checkpoint.folder)
    context.broadcast_from_rank0(lambda: prepare_folder(recipe, out, checkpoint))
    return checkpoint


def summarize(
    recipe: Recipe, data: DatasetSplits, model: Model, built: Built, results: dict[str, Any], kept_step: int
) -> dict[str, Any]:
    """The content of summary.json, without the run's origin."""
    trainer, device, context = built.trainer, built.trainer.step.inputs.device, built.trainer.context
    steps, step_seconds = trainer.steps_done, trainer.clock.completed_seconds
    images = steps * recipe.optimization.global_batch_size
    unreadable = trainer.batches.unreadable.names + [name for result in results.values() for name in result.unreadable]
    return {
        "model": describe_model(model.config),
        "started_from": recipe.model.weights,
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": recipe.data.data,
        "split": data.description,
        "images": {name: len(dataset) for name, dataset in data.splits.items()},
        "left_out": data.left_out,
        "steps": steps,
        "kept_step": kept_step,
        "best_step": None if trainer.best is None else trainer.best[0],
        "warmup_steps": built.warmup_steps,
        "epochs": images / len(data.splits["train"]),
        "images_per_second": images / step_seconds,
        "train_seconds": built.compile_seconds + step_seconds,
        "compile_seconds": built.compile_seconds,
        "peak_memory_bytes": peak_memory(device),
        "val_top1": results["val"].top1 if "val" in results else None,
        "test_top1": results["test"].top1 if "test" in results else None,
        "val_majority": results["val"].majority.top1 if "val" in results else None,
        "test_majority": results["test"].majority.top1 if "test" in results else None,
        "verdicts": {name: verdict for name, result in results.items() if (verdict := result.majority.verdict)},
        "device": describe_device(device),
        "processes": context.world_size,
        "sharded": recipe.run.shard and context.world_size > 1,
        "precision": str(trainer.step.precision).removeprefix("torch."),
        "compiled": built.compiled,
        "unreadable_images": len(unreadable),
        "unreadable": unreadable,
    }
