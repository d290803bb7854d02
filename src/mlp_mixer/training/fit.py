"""The training itself: the loop set up as the recipe says, run, and guarded."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, cast

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from mlp_mixer.cost import cost
from mlp_mixer.data.loading import training_batches
from mlp_mixer.data.mixing import Mixing
from mlp_mixer.data.parts import Source
from mlp_mixer.data.randaugment import RandAugment
from mlp_mixer.data.transforms import TrainingView
from mlp_mixer.errors import RunError
from mlp_mixer.model import Mixer
from mlp_mixer.training.compilation import compiled
from mlp_mixer.training.folder import metrics_files
from mlp_mixer.training.loop import train_steps
from mlp_mixer.training.losses import LOSSES
from mlp_mixer.training.optimizer import adamw, sgd
from mlp_mixer.training.recipe import DataRecipe, OptimizationRecipe, Recipe
from mlp_mixer.training.recompute import recompute_blocks
from mlp_mixer.training.schedules import learning_rate
from mlp_mixer.training.update import Update
from mlp_mixer.training.watch import Progress, R, Watch
from mlp_mixer.weights.own import save

log = logging.getLogger(__name__)


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
    schedule = partial(
        learning_rate, peak=settings.learning_rate, warmup_steps=warmup_steps, steps=steps, decay=settings.decay
    )
    with metrics_files(out) as (metrics, write), memory_errors(settings):
        watch = Watch(recipe, out, source, shown, examine, progress, write, steps)
        for step in train_steps(
            model,
            forward,
            make_batches(recipe, source, model, steps),
            update,
            schedule,
            partial(LOSSES[settings.loss], smoothing=settings.label_smoothing),
            device=device,
            precision=precision,
            preprocessing=model.card.preprocessing,
            seed=recipe.run.seed,
            mixing=make_mixing(recipe.data),
            accumulate=batch_size // micro_batch_size,
            measure=watch.logs,
        ):
            if device.type == "cpu" or watch.logs(step.step):  # elsewhere, to look is to wait
                stop_if_failed(update, shown, out)
            if average is not None:
                average.update_parameters(model)
            watch.see(step)
            if watch.impatient:
                break
    kept_step, val = watch.keep(recipe.run.keep)
    return Fitted(
        model=shown,
        steps=watch.step,
        kept_step=kept_step,
        warmup_steps=warmup_steps,
        compile_seconds=compile_seconds,
        step_seconds=watch.step_seconds,
        compiled=forward is not model,
        metrics=metrics,
        unreadable=watch.unreadable.names,
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
