"""A whole run: from a recipe to the folder that holds all there is to know about it."""

import contextlib
import datetime
import importlib.metadata
import json
import logging
import math
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from mlp_mixer.card import Card, Preprocessing
from mlp_mixer.cost import cost
from mlp_mixer.data.loading import Unreadable, training_batches
from mlp_mixer.data.sources import Source, load_source
from mlp_mixer.data.transforms import TrainingView
from mlp_mixer.device import select_device, select_precision
from mlp_mixer.errors import RunError, UserError
from mlp_mixer.files import write_text
from mlp_mixer.model import Mixer
from mlp_mixer.training.compilation import compiled
from mlp_mixer.training.loop import Step, train_steps
from mlp_mixer.training.optimizer import adamw
from mlp_mixer.training.recipe import Recipe, check, to_json_object
from mlp_mixer.training.schedules import learning_rate
from mlp_mixer.variants import create
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


def train(
    recipe: Recipe,
    out: Path,
    evaluate: Callable[..., R],  # (model, part, *, device, precision) -> R
    progress: Progress,
    command: str = "",
) -> Run[R]:
    """Trains a model from scratch and writes the run's folder, all of it but the report.

    Raises:
        UserError: a mistake in the recipe or the data; a folder this call made is removed again.
        RunError: a loss that is not finite.
    """
    check(recipe)
    if out.exists():
        raise UserError(f"{out} exists: name another folder with --out, or remove it")
    device = select_device(recipe.run.device)
    with torch.device("meta"):
        make_model(recipe, ("a", "b"))  # a mistake in the sizes is told before any data is read
    source = load_source(
        recipe.data.data,
        val_fraction=recipe.data.val_fraction,
        test_fraction=recipe.data.test_fraction,
        split_seed=recipe.data.split_seed,
        max_pixels=recipe.data.max_pixels,
    )
    say_source(source)
    if len(source.classes) < 2:
        raise UserError(
            f"{recipe.data.data} has one class, {', '.join(source.classes)}: a classifier needs at least two"
        )
    source.part("train")
    model = make_model(recipe, source.classes).to(device)
    with folder(out):
        return run_in(out, recipe, source, model, device, evaluate, progress, command)


def run_in(
    out: Path,
    recipe: Recipe,
    source: Source,
    model: Mixer,
    device: torch.device,
    evaluate: Callable[..., R],
    progress: Progress,
    command: str,
) -> Run[R]:
    write_text(out / "recipe.json", json.dumps(to_json_object(recipe), indent=2) + "\n")
    (out / "checkpoints").mkdir()
    started = datetime.datetime.now(datetime.UTC)
    precision = select_precision(recipe.run.precision, device)
    part, settings = source.part("train"), recipe.optimization
    steps = max(math.ceil(settings.epochs * len(part) / settings.global_batch_size), 1)
    forward = compiled(
        model,
        recipe.run.compile,
        batch_size=settings.global_batch_size,
        training_flop=3.0 * cost(model.config).flops * steps * settings.global_batch_size,
        device=device,
        precision=precision,
    )
    unreadable = Unreadable(part, recipe.data.max_unreadable_fraction)
    evaluate_every = max(round(recipe.run.evaluate_every_epochs * len(part) / settings.global_batch_size), 1)
    held_out = {name: source.parts[name] for name in ("val", "test") if name in source.parts}
    best = -1.0
    train_seconds = 0.0

    with metrics_files(out) as (metrics, write):
        clock = Clock()
        for step in train_steps(
            model,
            forward,
            make_batches(recipe, source, model, steps),
            adamw(model, weight_decay=settings.weight_decay, beta1=settings.beta1, beta2=settings.beta2),
            make_schedule(recipe, steps),
            device=device,
            precision=precision,
            preprocessing=model.card.preprocessing,
            clip_norm=settings.clip_norm,
            label_smoothing=settings.label_smoothing,
            seed=recipe.run.seed,
        ):
            for problem in unreadable.add(step.batch):
                log.warning("%s (its place stays empty)", problem)
            epoch = step.step * settings.global_batch_size / len(part)
            pause = step.step % evaluate_every == 0 or step.step == steps
            if pause or step.step % recipe.run.log_every_steps == 0:
                record = read_step(step, epoch, clock.rate(step.step * settings.global_batch_size))
                write(record)
                progress.update(step.step, steps, describe(record, settings.epochs))
            if pause:
                train_seconds += clock.stop()
                if "val" in held_out:
                    result = evaluate(model, held_out["val"], device=device, precision=precision)
                    write({"step": step.step, "epoch": epoch, "val_top1": result.top1, "val_loss": result.loss})
                    log.info("epoch %.4g: loss %.4f, val top-1 %.4f", epoch, float(step.loss), result.top1)
                    if result.top1 > best:
                        best = result.top1
                        save(model, out / "checkpoints" / "best.safetensors", epoch=epoch, val_top1=best)
                save(model, out / "checkpoints" / "last.safetensors", epoch=epoch)
                clock = Clock()

    results = {name: evaluate(model, part, device=device, precision=precision) for name, part in held_out.items()}
    scores = {f"{name}_top1": results[name].top1 if name in results else None for name in ("val", "test")}
    bad = unreadable.names + [name for result in results.values() for name in result.unreadable]
    images = steps * settings.global_batch_size
    summary = {
        "model": recipe.model.model or "Mixer",
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": recipe.data.data,
        "split": source.how,
        "images": {name: len(part) for name, part in source.parts.items()},
        "left_out": source.left_out,
        "steps": steps,
        "epochs": images / len(part),
        "images_per_second": images / train_seconds,
        "train_seconds": train_seconds,
        "peak_memory_bytes": peak_memory(device),
        **scores,
        "seed": recipe.run.seed,
        "device": describe_device(device),
        "precision": str(precision).removeprefix("torch."),
        "compiled": forward is not model,
        "started": started.isoformat(timespec="seconds"),
        "command": command,
        "commit": current_commit(),
        "versions": versions(),
        "unreadable_images": len(bad),
        "unreadable": bad,
    }
    kept = ("data", "split", "epochs", "val_top1", "test_top1", "seed", "command", "commit", "versions")
    save(model, out / "model.safetensors", recipe=to_json_object(recipe), **{key: summary[key] for key in kept})
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return Run(out=out, recipe=recipe, summary=summary, metrics=metrics, model=model, source=source, results=results)


def make_model(recipe: Recipe, classes: tuple[str, ...]) -> Mixer:
    """The recipe's Mixer with a head for these classes, and the card that travels with it."""
    sizes = asdict(recipe.model)
    model = create(sizes.pop("model"), num_classes=len(classes), seed=recipe.run.seed, **sizes)
    data = recipe.data
    view = Preprocessing(crop=data.crop, crop_ratio=data.crop_ratio, interpolation=data.interpolation)
    model.card = Card(classes=classes, preprocessing=view, provenance={"trained_with": "mlp-mixer"})
    return model


def make_batches(recipe: Recipe, source: Source, model: Mixer, steps: int) -> Any:
    data = recipe.data
    view = TrainingView(
        image_size=model.image_size,
        preprocessing=model.card.preprocessing,
        crop=data.train_crop,
        crop_padding=data.crop_padding,
        flip=data.flip,
    )
    return training_batches(
        source.part("train"),
        view,
        batch_size=recipe.optimization.global_batch_size,
        steps=steps,
        seed=recipe.run.seed,
        workers=data.workers,
    )


def make_schedule(recipe: Recipe, steps: int) -> Callable[[int], float]:
    settings = recipe.optimization
    warmup = min(settings.warmup_steps, steps // 5)
    if warmup < settings.warmup_steps:
        log.warning("warm-up of %d steps cut to %d, a fifth of this run's %d", settings.warmup_steps, warmup, steps)
    return partial(learning_rate, peak=settings.learning_rate, warmup_steps=warmup, steps=steps, decay=settings.decay)


@contextlib.contextmanager
def folder(out: Path) -> Iterator[None]:
    """Makes the run's folder; takes it away again where the run ends before anything in it is of use."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True)
        yield
    except BaseException as error:
        if not any((out / "checkpoints").glob("*.safetensors")):
            shutil.rmtree(out, ignore_errors=True)
            for folder in made[1:]:
                with contextlib.suppress(OSError):  # another run has come to live there
                    folder.rmdir()
        if isinstance(error, OSError):
            raise disk_error(out, error) from error
        raise


def disk_error(out: Path, error: OSError) -> RunError:
    return RunError(f"{out} cannot be written ({error.strerror}): free some space, or name another folder with --out")


@contextlib.contextmanager
def metrics_files(out: Path) -> Iterator[tuple[list[dict[str, float]], Callable[[dict[str, float]], None]]]:
    """The records so far, and a function that adds one: to metrics.jsonl and, where it is installed, to TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(out / "tensorboard")
    except ImportError:
        log.warning("no TensorBoard events are written: pip install 'mlp-mixer[tensorboard]' for them")
        board = None
    records: list[dict[str, float]] = []
    with (out / "metrics.jsonl").open("w", buffering=1, encoding="utf-8") as file:

        def write(record: dict[str, float]) -> None:
            records.append(record)
            file.write(json.dumps(record) + "\n")
            for key, value in record.items():
                if board is not None and key not in ("step", "epoch"):
                    board.add_scalar(key, value, int(record["step"]))

        try:
            yield records, write
        finally:
            if board is not None:
                board.close()


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


def say_source(source: Source) -> None:
    parts = ", ".join(f"{len(part):,} {name}" for name, part in source.parts.items())
    log.info("%s: %d classes; images: %s", source.how, len(source.classes), parts)
    for ending, count in source.left_out.items():
        log.warning("%d files left out: %s", count, ending)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device's allocator on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def current_commit() -> str | None:
    """Of the checkout this package runs from; None where it was installed without one."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("mlp-mixer", "torch", "numpy", "pillow")}
    return {"python": platform.python_version()} | found
