"""The training itself: the loop set up as the recipe says, run, and guarded."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic

import torch
from torch.utils.data import DataLoader

from allmlp.config.recipe import DataRecipe, OptimizationRecipe, Recipe, micro_batch, to_json_object
from allmlp.data.dataset import DatasetSplits
from allmlp.data.loader import default_workers, training_batches
from allmlp.data.mixup import Mixing
from allmlp.data.randaugment import RandAugment
from allmlp.data.transforms import TrainingView
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.distributed.parallelize import full_model, is_sharded
from allmlp.errors import RunError
from allmlp.factory import build_meta
from allmlp.flops import cost
from allmlp.model import Mixer
from allmlp.runs.provenance import versions
from allmlp.runs.records import Records
from allmlp.runs.resume import fingerprint
from allmlp.training.compilation import compile_model
from allmlp.training.ema import EMA
from allmlp.training.loop import train_steps
from allmlp.training.losses import LOSSES
from allmlp.training.optimizer import adamw, sgd
from allmlp.training.optimizer_step import OptimizerStep
from allmlp.training.preemption import Control
from allmlp.training.recompute import recompute_blocks
from allmlp.training.schedules import learning_rate
from allmlp.training.state import Checkpoint, TrainingState
from allmlp.training.watch import Progress, R, Waiting, Watch
from allmlp.weights.native import save

log = logging.getLogger(__name__)


class Diverged(RunError):
    """A step whose loss or gradient was not finite."""


@dataclass(frozen=True, kw_only=True)
class FitResult(Generic[R]):
    """How the training went, and the model it ends with."""

    model: Mixer  # the trained one, with its Polyak average, or the best on validation: what the recipe asks for
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
    source: DatasetSplits,
    model: Mixer,
    device: torch.device,
    precision: torch.dtype,
    examine: Callable[[Mixer, str], R],
    progress: Progress,
    control: Control | None = None,
    start: Checkpoint | None = None,
) -> FitResult[R]:
    """Trains the model; logs, evaluates and saves on the recipe's cadences.

    Args:
        recipe: the run's.
        out: its folder, with ``checkpoints/`` in it.
        source: the images.
        model: what is trained; perhaps sharded.
        device, precision: where and how it is computed.
        examine: evaluates a model on a part.
        progress: is told how far the run is.
        control: the processes, what they ask of each other, and their checkpoints; by default this one, unasked.
        start: a verified checkpoint to go on from.

    Raises:
        Diverged: a step is not finite; the weights of the last good one are in checkpoints/last.safetensors.
        RunError: a batch that does not fit the memory, or a checkpoint that cannot be written.
        Stopped: by a signal; the checkpoint is written.
    """
    control = control or Control.unattended(recipe, out)
    context, settings = control.context, recipe.optimization
    steps, warmup_steps = lengths(settings, len(source.splits["train"]))
    part = micro_batch(settings, context.world_size)
    average = None if settings.ema_decay is None else EMA(model, settings.ema_decay)
    if settings.recompute:
        recompute_blocks(model)
    begin = time.perf_counter()
    with memory_errors(part):
        context.heartbeat("compiling", slow=True)
        forward, is_compiled = compile_model(
            model,
            recipe.run.compile,
            batch_size=part,
            training_flop=3.0 * cost(build_meta(model.config)).flops * steps * settings.global_batch_size,
            device=device,
            precision=precision,
            context=context,
        )
    compile_seconds = time.perf_counter() - begin
    control.poll()
    optimizer = make_optimizer(settings, model)
    update = OptimizerStep(optimizer, settings.clip_norm, half=precision == torch.float16, shared=is_sharded(model))
    state = TrainingState(model, update, average)
    first_step = 0 if start is None else state.load(start, context)
    batches = Waiting(make_batches(recipe, source, model, steps, first_step, context), context)
    about = describe(recipe, source, precision, context)
    schedule = partial(
        learning_rate, peak=settings.learning_rate, warmup_steps=warmup_steps, steps=steps, decay=settings.decay
    )
    with Records(out, recipe, context.is_rank0, first_step) as records, control.checkpoints, memory_errors(part):
        watch = Watch(recipe, out, source, model, state.shown, examine, progress, records, steps, context, batches)
        if start is not None:
            watch.restore(start.state)
        if watch.evaluates(first_step):  # that evaluation was interrupted, or came to no checkpoint of its own
            watch.evaluate()
        for step in train_steps(
            model,
            forward,
            [] if watch.impatient else batches,
            update,
            schedule,
            partial(LOSSES[settings.loss], smoothing=settings.label_smoothing),
            device=device,
            precision=precision,
            preprocessing=model.metadata.preprocessing,
            seed=recipe.run.seed,
            mixing=make_mixing(recipe.data),
            accumulate=settings.global_batch_size // (part * context.world_size),
            first_step=first_step,
            measure=watch.logs,
            context=context,
            requests=control.requests,
        ):
            saves = watch.saves(step.step) or control.saves(step.asked)
            if device.type == "cpu" or watch.logs(step.step) or saves:  # elsewhere, to look is to wait
                stop_if_failed(state, out, context)
            state.follow()
            watch.see(step)
            if saves:
                records.sync()
                control.save(watch.step, state.tensors(), about | watch.state() | state.numbers(), watch.best)
            control.heed(step.asked)
            if watch.evaluates(step.step):
                watch.evaluate()
            if watch.impatient:
                break
        state.settle()
        result, kept_step, val = watch.keep(recipe.run.keep)
    return FitResult(
        model=result,
        steps=watch.step,
        kept_step=kept_step,
        warmup_steps=warmup_steps,
        compile_seconds=compile_seconds,
        step_seconds=watch.seconds,
        compiled=is_compiled,
        metrics=records.metrics,
        unreadable=watch.unreadable.names,
        val=val,
    )


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
        preprocessing=model.metadata.preprocessing,
        crop=data.train_crop,
        crop_padding=data.crop_padding,
        flip=data.flip,
        randaugment=None if strength is None else RandAugment(layers=data.randaugment_layers, magnitude=strength),
        color_jitter=data.color_jitter,
    )


def make_batches(
    recipe: Recipe,
    source: DatasetSplits,
    model: Mixer,
    steps: int,
    first_step: int = 0,
    context: DistributedContext = SINGLE_PROCESS,
) -> DataLoader:
    """This process's micro-batches of the steps that are still to be made."""
    images, part = source.splits["train"], micro_batch(recipe.optimization, context.world_size)
    accumulate = recipe.optimization.global_batch_size // (part * context.world_size)
    workers = recipe.data.workers
    return training_batches(
        images,
        make_view(recipe.data, model),
        batch_size=part,
        steps=steps * accumulate,
        seed=recipe.run.seed,
        workers=default_workers(images, context.local_world_size) if workers is None else workers,
        first_step=first_step * accumulate,
        rank=context.rank,
        world_size=context.world_size,
    )


def describe(
    recipe: Recipe, source: DatasetSplits, precision: torch.dtype, context: DistributedContext
) -> dict[str, Any]:
    """What a checkpoint says of its run, against which a run that goes on from it is held."""
    return {
        "recipe": to_json_object(recipe),
        "classes": source.classes,
        "images": fingerprint(source),
        "precision": str(precision).removeprefix("torch."),
        "ranks": context.world_size,
        "versions": versions(),
    }


@contextlib.contextmanager
def memory_errors(images: int) -> Iterator[None]:
    """Out of memory, with so many images at a time, becomes a RunError that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not told:
            raise
        raise RunError(
            f"{images} images at a time do not fit the memory: give --micro-batch-size {max(images // 2, 1)} or less "
            "(gradients add up over a step, to the same result), or --recompute"
        ) from error


def stop_if_failed(state: TrainingState, out: Path, context: DistributedContext) -> None:
    """Diverged, where a step was not finite; the weights, which it has not touched, are saved first."""
    step, loss, norm = state.update.failure.tolist()
    if step:
        path = out / "checkpoints" / "last.safetensors"
        with state.shown():
            model = full_model(state.model)
            context.broadcast_from_rank0(lambda: save(model, path, step=int(step) - 1))
        raise Diverged(
            f"step {step:.0f}: loss {loss:g}, gradient norm {norm:g}: training has diverged; lower --learning-rate or "
            f"lengthen --warmup-steps; the weights of step {step - 1:.0f}, the last good one, are in {path}"
        )
