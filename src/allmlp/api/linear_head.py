"""Fine-tuning of the head alone, in closed form rather than by steps: what ``mixer finetune --head linear`` does."""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from allmlp.api.fewshot import features_folder
from allmlp.api.progress import progress_bar
from allmlp.config.recipe import Recipe
from allmlp.data.dataset import DatasetSplits, ImageDataset
from allmlp.data.loader import UnreadableImages
from allmlp.device import select_precision
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.errors import UserError
from allmlp.evaluation.classification import Classification, classify
from allmlp.evaluation.features import FeatureTable, extract_features
from allmlp.evaluation.linear_head import LinearHead, fit_linear_head
from allmlp.evaluation.pages.run_report import write_run_report
from allmlp.factory import Model
from allmlp.files import to_json, write_text
from allmlp.runs.folder import locked, remove_checkpoints, run_folder
from allmlp.runs.provenance import describe_device
from allmlp.runs.result import RunResult
from allmlp.runs.resume import fingerprint, finished_summary, prepare_folder, record_start
from allmlp.training.build import build_data, build_initializer
from allmlp.training.memory import peak_memory
from allmlp.training.run import RunOptions, check_folder, describe_model, describe_origin
from allmlp.weights.native import save

log = logging.getLogger(__name__)


def fit_and_report(
    recipe: Recipe,
    out: Path,
    options: RunOptions,
    context: DistributedContext = SINGLE_PROCESS,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Fits the head to the features of the training images and writes the run's folder. Collective.

    The arguments are those of ``train_and_report``. The features are kept, so that a run that is repeated is quick.

    Raises:
        UserError: the data has no validation images to choose the strength on.
    """
    summary = context.broadcast_from_rank0(lambda: finished_summary(recipe, out)) if options.resume else None
    if summary is not None:
        log.info("%s is complete: nothing is left to do", out)
        return summary
    check_folder(recipe, out, options, context)
    device = context.select_device(recipe.run.device)
    precision = select_precision(recipe.run.precision, device)
    initializer, data = build_initializer(recipe), build_data(recipe, context)
    if "val" not in data.splits:
        raise UserError("--head linear needs validation images, and there are none: give a --val-fraction above 0")
    with run_folder(out, context.is_rank0), locked(out, context.is_rank0):
        context.broadcast_from_rank0(lambda: prepare_folder(recipe, out, None))
        starts = context.broadcast_from_rank0(lambda: record_start(out, options.command, False))
        model, start = initializer(data.classes), time.perf_counter()
        with progress_bar(progress if context.is_rank0 else False) as bar:

            def where(activity: str) -> dict[str, Any]:
                def on_progress(done: int, total: int) -> None:
                    context.heartbeat(activity)
                    bar.update(done, total, activity)

                return {
                    "device": device, "precision": precision, "workers": recipe.data.workers, "context": context,
                    "on_progress": on_progress,
                }  # fmt: skip

            head, tables = fit_on_features(model, data, recipe.data.max_unreadable_fraction, where, context)
            seconds = time.perf_counter() - start
            with torch.no_grad():
                model.get_parameter("head.weight").copy_(torch.from_numpy(head.weight))
                model.get_parameter("head.bias").copy_(torch.from_numpy(head.bias))
            held_out = [name for name in ("val", "test") if name in data.splits]
            results = {name: classify(model, data.splits[name], **where(f"evaluating on {name}")) for name in held_out}
        if results["val"].top1 < head.tried[head.strength] - 0.01:
            log.warning(
                "this head is rounded by %s: validation top-1 %.4f instead of %.4f; use --precision float32 with it",
                str(precision).removeprefix("torch."), results["val"].top1, head.tried[head.strength],
            )  # fmt: skip
        model.to("cpu")
        summary = summarize(recipe, data, model, head, tables, results, seconds)
        summary |= {"device": describe_device(device), "processes": context.world_size}
        summary |= {"precision": str(precision).removeprefix("torch."), "peak_memory_bytes": peak_memory(device)}
        origin = describe_origin(recipe, starts)
        result = RunResult(
            folder=out, recipe=recipe, summary=summary | origin, metrics=[], model=model, data=data, results=results
        )
        context.broadcast_from_rank0(partial(write_run, result, origin))
    context.broadcast_from_rank0(lambda: remove_checkpoints(out, result.summary))
    return result.summary


def fit_on_features(
    model: Model,
    data: DatasetSplits,
    max_unreadable_fraction: float,
    where: Callable[[str], dict[str, Any]],
    context: DistributedContext,
) -> tuple[LinearHead, dict[str, FeatureTable]]:
    """The head, and the features of the training and validation images. Collective.

    Raises:
        UserError: more of the training images than allowed cannot be read.
    """

    def extract(name: str, images: ImageDataset) -> FeatureTable:
        preprocessing, cache = model.metadata.preprocessing, features_folder()
        return extract_features(model, images, preprocessing=preprocessing, cache=cache, **where(f"features of {name}"))

    tables = {name: extract(name, data.splits[name]) for name in ("train", "val")}
    unreadable = UnreadableImages(data.splits["train"], max_unreadable_fraction)
    position = {name: index for index, name in enumerate(data.splits["train"].names)}
    unreadable.add([(position[name], reason) for name, reason in tables["train"].unreadable.items()])
    train, val = tables["train"], tables["val"]
    context.heartbeat("fitting the linear head", slow=True)
    head = context.broadcast_from_rank0(
        lambda: fit_linear_head(train.features, train.labels, val.features, val.labels, len(data.classes))
    )
    for strength, top1 in head.tried.items():
        log.info("strength %g: val top-1 %.4f%s", strength, top1, " (chosen)" if strength == head.strength else "")
    return head, tables


def summarize(
    recipe: Recipe,
    data: DatasetSplits,
    model: Model,
    head: LinearHead,
    tables: dict[str, FeatureTable],
    results: dict[str, Classification],
    seconds: float,
) -> dict[str, Any]:
    """The content of summary.json, without device and origin."""
    unreadable = dict.fromkeys(
        [*tables["train"].unreadable, *(name for result in results.values() for name in result.unreadable)]
    )
    top1 = {name: result.top1 for name, result in results.items()}
    return {
        "model": describe_model(model.config),
        "started_from": recipe.model.weights,
        "head": "linear",
        "strength": head.strength,
        "strengths": {str(strength): value for strength, value in head.tried.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": recipe.data.data,
        "split": data.description,
        "images": {name: len(dataset) for name, dataset in data.splits.items()},
        "left_out": data.left_out,
        "steps": 0,
        "kept_step": 0,
        "best_step": None,
        "epochs": 1.0,
        "images_per_second": sum(len(table.labels) for table in tables.values()) / seconds,
        "train_seconds": seconds,
        "val_top1": top1.get("val"),
        "test_top1": top1.get("test"),
        "val_majority": results["val"].majority.top1,
        "test_majority": results["test"].majority.top1 if "test" in results else None,
        "verdicts": {name: verdict for name, result in results.items() if (verdict := result.majority.verdict)},
        "unreadable_images": len(unreadable),
        "unreadable": list(unreadable),
    }


def write_run(run: RunResult[Classification], origin: dict[str, Any]) -> None:
    """Writes weights, summary and report."""
    kept = ("data", "split", "epochs", "val_top1", "test_top1", "val_majority", "test_majority", "head", "strength")
    scores = {key: run.summary[key] for key in kept}
    trained_on = fingerprint(run.data)["train"]["sha256"]
    save(run.model, run.folder / "model.safetensors", **origin, **scores, training_images=trained_on)
    write_text(run.folder / "summary.json", to_json(run.summary, indent=2) + "\n")
    write_run_report(run)
