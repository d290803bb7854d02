"""A whole run: from a recipe to the folder that holds all there is to know about it."""

import datetime
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader

from mlp_mixer.cost import cost
from mlp_mixer.data.loading import Unreadable, training_batches
from mlp_mixer.data.sources import Source, load_source
from mlp_mixer.data.transforms import TrainingView
from mlp_mixer.device import select_device, select_precision
from mlp_mixer.errors import RunError, UserError
from mlp_mixer.files import to_json, write_text
from mlp_mixer.model import Mixer
from mlp_mixer.training.compilation import compiled
from mlp_mixer.training.folder import metrics_files, run_folder
from mlp_mixer.training.loop import Step, train_steps
from mlp_mixer.training.memory import keep_freed_memory
from mlp_mixer.training.optimizer import adamw, sgd
from mlp_mixer.training.provenance import current_commit, describe_device, peak_memory, versions
from mlp_mixer.training.recipe import OptimizationRecipe, Recipe, check, to_json_object
from mlp_mixer.training.schedules import learning_rate
from mlp_mixer.training.start import prepare
from mlp_mixer.weights.known import variant_of
from mlp_mixer.weights.own import save

log = logging.getLogger(__name__)


class Result(Protocol):
    """What a run needs to know of an evaluation."""

    @property
    def top1(self) -> float: ...
    @property
    def loss(self) -> float: ...
    @property
    def unreadable(self) -> dict[str, str]: ...


R = TypeVar("R", bound=Result)
Evaluate = Callable[..., R]  # (model, part, *, device, precision, on_progress) -> R


class Progress(Protocol):
    """Told how far the run is; the command line draws it."""

    def update(self, done: int, total: int, text: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Run(Generic[R]):
    """What a finished run leaves: its folder, its summary, the model, and the evaluation of each held-out part."""

    out: Path
    recipe: Recipe
    summary: dict[str, Any]
    metrics: list[dict[str, float]]
    model: Mixer
    source: Source
    results: dict[str, R]  # "val", "test", where there are such parts


@dataclass(frozen=True, kw_only=True)
class Fitted(Generic[R]):
    """How the training itself went; ``val`` is the last evaluation on the validation part."""

    steps: int
    warmup_steps: int
    compile_seconds: float
    step_seconds: float
    compiled: bool
    metrics: list[dict[str, float]]
    unreadable: list[str]
    val: R | None


def train(recipe: Recipe, out: Path, evaluate: Evaluate[R], progress: Progress, command: str = "") -> Run[R]:
    """Trains a model, new or from weights, and writes the run's folder, all of it but the report.

    Raises:
        UserError: a mistake in the recipe or the data; a folder this call made is removed again.
        RunError: a loss that is not finite, or a full disk.
    """
    check(recipe)
    if out.exists():
        raise UserError(f"{out} exists: name another folder with --out, or remove it")
    device = select_device(recipe.run.device)
    precision = select_precision(recipe.run.precision, device)
    start = prepare(recipe)  # a mistake in the sizes is told before any data is read
    if device.type == "cpu":
        keep_freed_memory()
    source = read_source(recipe)
    model = start(source.classes).to(device)
    origin = {
        "seed": recipe.run.seed,
        "command": command,
        "commit": current_commit(),
        "versions": versions(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }

    def examine(part: str) -> R:
        def show(done: int, total: int) -> None:
            progress.update(done, total, f"evaluating on {part}")

        return evaluate(model, source.parts[part], device=device, precision=precision, on_progress=show)

    with run_folder(out):
        write_text(out / "recipe.json", to_json(to_json_object(recipe), indent=2) + "\n")
        fitted = fit(recipe, out, source, model, device, precision, examine, progress)
        save(model, out / "model.safetensors", **origin)
        results = {"val": fitted.val} if fitted.val else {}
        results |= {"test": examine("test")} if "test" in source.parts else {}
        images = fitted.steps * recipe.optimization.global_batch_size
        bad = fitted.unreadable + [name for result in results.values() for name in result.unreadable]
        summary = {
            "model": describe_model(model),
            "started_from": recipe.model.weights,
            "parameters": sum(p.numel() for p in model.parameters()),
            "data": recipe.data.data,
            "split": source.how,
            "images": {name: len(part) for name, part in source.parts.items()},
            "left_out": source.left_out,
            "steps": fitted.steps,
            "warmup_steps": fitted.warmup_steps,
            "epochs": images / len(source.parts["train"]),
            "images_per_second": images / fitted.step_seconds,
            "train_seconds": fitted.compile_seconds + fitted.step_seconds,
            "compile_seconds": fitted.compile_seconds,
            "peak_memory_bytes": peak_memory(device),
            "val_top1": results["val"].top1 if "val" in results else None,
            "test_top1": results["test"].top1 if "test" in results else None,
            "device": describe_device(device),
            "precision": str(precision).removeprefix("torch."),
            "compiled": fitted.compiled,
            **origin,
            "unreadable_images": len(bad),
            "unreadable": bad,
        }
        measured = {key: summary[key] for key in ("data", "split", "epochs", "val_top1", "test_top1")}
        save(model, out / "model.safetensors", **origin, **measured)
        write_text(out / "summary.json", to_json(summary, indent=2) + "\n")
    metrics = fitted.metrics
    return Run(out=out, recipe=recipe, summary=summary, metrics=metrics, model=model, source=source, results=results)


def fit(
    recipe: Recipe,
    out: Path,
    source: Source,
    model: Mixer,
    device: torch.device,
    precision: torch.dtype,
    examine: Callable[[str], R],
    progress: Progress,
) -> Fitted[R]:
    """Trains the model; logs, evaluates and saves on the recipe's cadences."""
    settings, images = recipe.optimization, len(source.parts["train"])
    batch_size = settings.global_batch_size
    steps = max(int(settings.epochs * images / batch_size), 1)
    warmup_steps = min(settings.warmup_steps, steps // 5)
    if warmup_steps < settings.warmup_steps:
        log.info("warm-up of %d steps cut to %d, a fifth of this run's %d", settings.warmup_steps, warmup_steps, steps)
    schedule = partial(
        learning_rate, peak=settings.learning_rate, warmup_steps=warmup_steps, steps=steps, decay=settings.decay
    )
    begin = time.perf_counter()
    flop = 3.0 * cost(model.config).flops * steps * batch_size
    forward = compiled(
        model, recipe.run.compile, batch_size=batch_size, training_flop=flop, device=device, precision=precision
    )
    compile_seconds = time.perf_counter() - begin
    evaluate_every = max(round(recipe.run.evaluate_every_epochs * images / batch_size), 1)
    unreadable = Unreadable(source.parts["train"], recipe.data.max_unreadable_fraction)
    best, val, step_seconds, text = -1.0, None, 0.0, "starting"

    with metrics_files(out) as (metrics, write):
        clock = Clock()
        for step in train_steps(
            model,
            forward,
            make_batches(recipe, source, model, steps),
            make_optimizer(settings, model),
            schedule,
            device=device,
            precision=precision,
            preprocessing=model.card.preprocessing,
            clip_norm=settings.clip_norm,
            label_smoothing=settings.label_smoothing,
            seed=recipe.run.seed,
        ):
            for problem in unreadable.add(step.batch):
                log.warning("%s (its place stays empty)", problem)
            epoch = step.step * batch_size / images
            pause = step.step % evaluate_every == 0 or step.step == steps
            if pause or step.step % recipe.run.log_every_steps == 0:
                record = read_step(step, epoch, clock.rate(step.step * batch_size))
                write(record)
                text = describe(record, settings.epochs)
            progress.update(step.step, steps, text)
            if pause:
                step_seconds += clock.stop()
                if "val" in source.parts:
                    val = examine("val")
                    write({"step": step.step, "epoch": epoch, "val_top1": val.top1, "val_loss": val.loss})
                    log.info("epoch %.4g: loss %.4f, val top-1 %.4f", epoch, float(step.loss), val.top1)
                    if val.top1 > best:
                        best = val.top1
                        save(model, out / "checkpoints" / "best.safetensors", epoch=epoch, val_top1=best)
                save(model, out / "checkpoints" / "last.safetensors", epoch=epoch)
                clock = Clock()
    return Fitted(
        steps=steps,
        warmup_steps=warmup_steps,
        compile_seconds=compile_seconds,
        step_seconds=step_seconds,
        compiled=forward is not model,
        metrics=metrics,
        unreadable=unreadable.names,
        val=val,
    )


def read_source(recipe: Recipe) -> Source:
    """The recipe's data, said to the user; a UserError where a classifier cannot be trained on it."""
    data = recipe.data
    source = load_source(
        data.data,
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        split_seed=data.split_seed,
        max_pixels=data.max_pixels,
    )
    parts = ", ".join(f"{len(part):,} {name}" for name, part in source.parts.items())
    log.info("%s: %d classes; images: %s", source.how, len(source.classes), parts)
    for ending, count in source.left_out.items():
        log.warning("%d files left out: %s", count, ending)
    source.part("train")
    if len(source.classes) < 2:
        raise UserError(f"{data.data} has one class, {', '.join(source.classes)}: a classifier needs at least two")
    return source


def make_optimizer(settings: OptimizationRecipe, model: Mixer) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return sgd(model, momentum=settings.momentum)
    return adamw(model, weight_decay=settings.weight_decay, beta1=settings.beta1, beta2=settings.beta2)


def make_batches(recipe: Recipe, source: Source, model: Mixer, steps: int) -> DataLoader:
    data = recipe.data
    view = TrainingView(
        image_size=model.image_size,
        preprocessing=model.card.preprocessing,
        crop=data.train_crop,
        crop_padding=data.crop_padding,
        flip=data.flip,
    )
    return training_batches(
        source.parts["train"],
        view,
        batch_size=recipe.optimization.global_batch_size,
        steps=steps,
        seed=recipe.run.seed,
        workers=data.workers,
    )


class Clock:
    """Seconds since it was made, and images per second between two readings."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.images: int | None = None

    def rate(self, images: int) -> float | None:
        """Images per second since the last call; None at the first, which has the start-up in it."""
        now, before = time.perf_counter(), self.images
        rate = None if before is None else (images - before) / (now - self.last)
        self.last, self.images = now, images
        return rate

    def stop(self) -> float:
        return time.perf_counter() - self.start


def read_step(step: Step, epoch: float, images_per_second: float | None) -> dict[str, float]:
    """A line of metrics.jsonl; a RunError where training has diverged."""
    loss, norm = float(step.loss), float(step.gradient_norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise RunError(
            f"step {step.step}: loss {loss}, gradient norm {norm}: training has diverged; "
            "lower --learning-rate or lengthen --warmup-steps (the last checkpoint is kept)"
        )
    record = {"step": step.step, "epoch": epoch, "loss": loss, "learning_rate": step.learning_rate}
    record["gradient_norm"] = norm
    return record if images_per_second is None else record | {"images_per_second": images_per_second}


def describe(record: dict[str, float], epochs: float) -> str:
    rate = f", {record['images_per_second']:,.0f} images/s" if "images_per_second" in record else ""
    return f"epoch {record['epoch']:.1f} of {epochs:g}, loss {record['loss']:.3f}{rate}"


def describe_model(model: Mixer) -> str:
    sizes, variant = model.config, variant_of(model.config)
    named = f"Mixer-{variant}" if variant else "Mixer"
    patch = "×".join(map(str, sizes["patch_size"]))
    return f"{named}: {sizes['num_blocks']} blocks, C {sizes['hidden_dim']}, patch {patch}"
