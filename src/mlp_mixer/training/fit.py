"""The training itself: the loop's steps, watched, evaluated and saved on the recipe's cadences."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar, cast

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from mlp_mixer.cost import cost
from mlp_mixer.data.loading import Unreadable, training_batches
from mlp_mixer.data.mixing import Mixing
from mlp_mixer.data.parts import Source
from mlp_mixer.data.randaugment import RandAugment
from mlp_mixer.data.transforms import TrainingView
from mlp_mixer.errors import RunError
from mlp_mixer.model import Mixer
from mlp_mixer.training.compilation import compiled
from mlp_mixer.training.folder import metrics_files
from mlp_mixer.training.loop import Step, train_steps
from mlp_mixer.training.losses import LOSSES
from mlp_mixer.training.optimizer import adamw, sgd
from mlp_mixer.training.recipe import DataRecipe, OptimizationRecipe, Recipe
from mlp_mixer.training.recompute import recompute_blocks
from mlp_mixer.training.schedules import learning_rate
from mlp_mixer.training.update import Update
from mlp_mixer.weights.load import load
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


class Progress(Protocol):
    """Told how far the run is; the command line draws it."""

    def update(self, done: int, total: int, text: str) -> None: ...


R = TypeVar("R", bound=Result)


class Diverged(RunError):
    """A step whose loss or gradient was not finite."""


@dataclass(frozen=True, kw_only=True)
class Fitted(Generic[R]):
    """How the training went, and the model it ends with."""

    model: Mixer  # the trained one, its Polyak average, or the best on validation: what the recipe asks for
    steps: int
    kept_step: int
    warmup_steps: int
    compile_seconds: float
    step_seconds: float
    compiled: bool
    metrics: list[dict[str, float]]
    unreadable: list[str]
    val: R | None  # the kept model on the validation part


def fit(
    recipe: Recipe,
    out: Path,
    source: Source,
    model: Mixer,
    device: torch.device,
    precision: torch.dtype,
    examine: Callable[[Mixer, str], R],
    progress: Progress,
) -> Fitted[R]:
    """Trains the model; logs, evaluates and saves on the recipe's cadences.

    Raises:
        Diverged: a step is not finite; the weights of the last good one are in checkpoints/last.safetensors.
        RunError: a batch that does not fit the memory.
    """
    settings, images = recipe.optimization, len(source.parts["train"])
    steps, warmup_steps = lengths(settings, images)
    batch_size = settings.global_batch_size
    micro_batch_size = settings.micro_batch_size or batch_size
    by_epochs = max(round(recipe.run.evaluate_every_epochs * images / batch_size), 1)
    evaluate_every = recipe.run.evaluate_every_steps or by_epochs
    average = averaged(model, settings.polyak)
    shown = model if average is None else cast(Mixer, average.module)
    if settings.recompute:
        recompute_blocks(model)
    begin = time.perf_counter()
    flop = 3.0 * cost(model.config).flops * steps * batch_size
    with memory_errors(settings):
        forward = compiled(
            model,
            recipe.run.compile,
            batch_size=micro_batch_size,
            training_flop=flop,
            device=device,
            precision=precision,
        )
    compile_seconds = time.perf_counter() - begin
    update = Update(make_optimizer(settings, model), settings.clip_norm, half=precision == torch.float16)
    unreadable = Unreadable(source.parts["train"], recipe.data.max_unreadable_fraction)
    best = Best(out / "checkpoints" / "best.safetensors")
    val, step_seconds, text, since, step = None, 0.0, "starting", 0, None

    def logged(step: int) -> bool:
        return step % recipe.run.log_every_steps == 0 or step % evaluate_every == 0 or step == steps

    with metrics_files(out) as (metrics, write), memory_errors(settings):
        clock = Clock()
        for step in train_steps(
            model,
            forward,
            make_batches(recipe, source, model, steps),
            update,
            partial(
                learning_rate, peak=settings.learning_rate, warmup_steps=warmup_steps, steps=steps, decay=settings.decay
            ),
            partial(LOSSES[settings.loss], smoothing=settings.label_smoothing),
            device=device,
            precision=precision,
            preprocessing=model.card.preprocessing,
            seed=recipe.run.seed,
            mixing=make_mixing(recipe.data),
            accumulate=batch_size // micro_batch_size,
            measure=logged,
        ):
            for problem in unreadable.add(step.problems):
                log.warning("%s (its place stays empty)", problem)
            if device.type == "cpu" or logged(step.step):  # elsewhere, to look is to wait
                stop_if_failed(update, shown, out)
            if average is not None:
                average.update_parameters(model)
            epoch = step.step * batch_size / images
            if logged(step.step):
                record = read_step(step, epoch, clock.rate(step.step * batch_size))
                write(record)
                text = describe(record, steps * batch_size / images)
            progress.update(step.step, steps, text)
            if step.step % evaluate_every == 0 or step.step == steps:
                step_seconds += clock.stop()
                if "val" in source.parts:
                    val = examine(shown, "val")
                    write({"step": step.step, "epoch": epoch, "val_top1": val.top1, "val_loss": val.loss})
                    log.info("epoch %.4g: loss %.4f, val top-1 %.4f", epoch, float(step.loss), val.top1)
                    since = 0 if best.see(shown, val, step.step, epoch) else since + 1
                save(shown, out / "checkpoints" / "last.safetensors", step=step.step, epoch=epoch)
                if recipe.run.patience is not None and since >= recipe.run.patience:
                    log.info("stopped early: no better validation accuracy in %d evaluations", since)
                    break
                clock = Clock()
    assert step is not None
    kept_step = step.step
    if recipe.run.keep == "best" and best.result is not None:
        kept_step, val = best.step, best.result
        shown.load_state_dict(load(best.path).state_dict())
    return Fitted(
        model=shown,
        steps=step.step,
        kept_step=kept_step,
        warmup_steps=warmup_steps,
        compile_seconds=compile_seconds,
        step_seconds=step_seconds,
        compiled=forward is not model,
        metrics=metrics,
        unreadable=unreadable.names,
        val=val,
    )


def averaged(model: Mixer, decay: float | None) -> AveragedModel | None:
    """Polyak averaging (Supplement A.2): a copy that follows the weights step by step."""
    return None if decay is None else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


def lengths(settings: OptimizationRecipe, images: int) -> tuple[int, int]:
    """Steps of the run, and of its warm-up, which is cut to a fifth of them."""
    steps = settings.steps or max(int(settings.epochs * images / settings.global_batch_size), 1)
    warmup_steps = min(settings.warmup_steps, steps // 5)
    if warmup_steps < settings.warmup_steps:
        log.info("warm-up of %d steps cut to %d, a fifth of this run's %d", settings.warmup_steps, warmup_steps, steps)
    return steps, warmup_steps


class Best(Generic[R]):
    """The weights with the best validation accuracy so far, and the file that holds them."""

    def __init__(self, path: Path) -> None:
        self.path, self.step = path, 0
        self.result: R | None = None

    def see(self, model: Mixer, result: R, step: int, epoch: float) -> bool:
        """Whether this is better than all before; if so, it is saved."""
        if self.result is not None and result.top1 <= self.result.top1:
            return False
        self.result, self.step = result, step
        save(model, self.path, step=step, epoch=epoch, val_top1=result.top1)
        return True


def make_optimizer(settings: OptimizationRecipe, model: Mixer) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return sgd(model, momentum=settings.momentum)
    return adamw(model, weight_decay=settings.weight_decay, beta1=settings.beta1, beta2=settings.beta2)


def make_mixing(data: DataRecipe) -> Mixing | None:
    if data.mixup is None and data.cutmix is None:
        return None
    return Mixing(mixup=data.mixup, cutmix=data.cutmix, group=data.mix_group_size)


def make_view(data: DataRecipe, model: Mixer) -> TrainingView:
    strength = data.randaugment
    return TrainingView(
        image_size=model.image_size,
        preprocessing=model.card.preprocessing,
        crop=data.train_crop,
        crop_padding=data.crop_padding,
        flip=data.flip,
        randaugment=None if strength is None else RandAugment(layers=data.randaugment_layers, magnitude=strength),
        color_jitter=data.color_jitter,
    )


def make_batches(recipe: Recipe, source: Source, model: Mixer, steps: int) -> DataLoader:
    whole = recipe.optimization.global_batch_size
    part = recipe.optimization.micro_batch_size or whole
    return training_batches(
        source.parts["train"],
        make_view(recipe.data, model),
        batch_size=part,
        steps=steps * (whole // part),
        seed=recipe.run.seed,
        workers=recipe.data.workers,
    )


@contextlib.contextmanager
def memory_errors(settings: OptimizationRecipe) -> Iterator[None]:
    """Out of memory becomes a RunError that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not told:
            raise
        images = settings.micro_batch_size or settings.global_batch_size
        raise RunError(
            f"{images} images at a time do not fit the memory: give --micro-batch-size {max(images // 2, 1)} or less "
            "(gradients add up over a step, to the same result), or --recompute"
        ) from error


def stop_if_failed(update: Update, model: Mixer, out: Path) -> None:
    """Diverged, where a step was not finite; the weights, which it has not touched, are saved first."""
    step, loss, norm = update.failure.tolist()
    if step:
        path = out / "checkpoints" / "last.safetensors"
        save(model, path, step=int(step) - 1)
        raise Diverged(
            f"step {step:.0f}: loss {loss:g}, gradient norm {norm:g}: training has diverged; lower --learning-rate or "
            f"lengthen --warmup-steps; the weights of step {step - 1:.0f}, the last good one, are in {path}"
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
    """A line of metrics.jsonl."""
    record = {
        "step": step.step,
        "epoch": epoch,
        "loss": float(step.loss),
        "learning_rate": step.learning_rate,
        "gradient_norm": float(step.gradient_norm),
        "update_norm": float(step.update_norm),
    }
    return record if images_per_second is None else record | {"images_per_second": images_per_second}


def describe(record: dict[str, float], epochs: float) -> str:
    rate = f", {record['images_per_second']:,.0f} images/s" if "images_per_second" in record else ""
    return f"epoch {record['epoch']:.1f} of {epochs:.4g}, loss {record['loss']:.3f}{rate}"
