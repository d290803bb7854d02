"""From a recipe to a trainer. Only this module unpacks the recipe: the components take plain arguments."""

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from allmlp.checkpointing.manager import CheckpointManager
from allmlp.config.batch_size import resolve_micro_batch_size
from allmlp.config.recipe import DataRecipe, OptimizationRecipe, Recipe
from allmlp.config.serialize import to_json_object
from allmlp.data.builtin.catalog import BUILT_IN
from allmlp.data.dataset import Dataset, DatasetSplits, peek
from allmlp.data.duplicates.repeats import describe_repeats
from allmlp.data.loader import Batches, UnreadableImages, default_workers, training_batches
from allmlp.data.mixup import Mixing
from allmlp.data.randaugment import RandAugment
from allmlp.data.shared import Published, publish
from allmlp.data.sources import hold_out, load_source
from allmlp.data.transforms import TrainingTransform
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.distributed.parallelize import is_sharded
from allmlp.errors import UserError
from allmlp.factory import Model, build_meta
from allmlp.flops import cost
from allmlp.metadata import Preprocessing
from allmlp.runs.provenance import versions
from allmlp.runs.records import Records
from allmlp.runs.resume import fingerprint
from allmlp.training.compilation import compile_model
from allmlp.training.ema import EMA
from allmlp.training.initialization import ModelInitializer, from_scratch, from_weights
from allmlp.training.losses import LOSSES
from allmlp.training.memory import memory_errors, recompute_blocks
from allmlp.training.optimizer import adamw, sgd
from allmlp.training.optimizer_step import OptimizerStep
from allmlp.training.preemption import Preemption, SignalState
from allmlp.training.schedules import learning_rate
from allmlp.training.state import TrainingState
from allmlp.training.step import InputPreparation, TrainingStep
from allmlp.training.trainer import Cadence, Evaluator, Progress, Trainer, TrainingBatches
from allmlp.weights.load import load
from allmlp.weights.named import advise_to_finetune
from allmlp.weights.resize import resize
from allmlp.zoo.model import require_batches

log = logging.getLogger(__name__)


class Built(NamedTuple):
    """A trainer, and facts about it for the summary."""

    trainer: Trainer
    warmup_steps: int
    compiled: bool
    compile_seconds: float


def build(
    recipe: Recipe,
    data: DatasetSplits,
    model: Model,
    device: torch.device,
    precision: torch.dtype,
    evaluators: Sequence[Evaluator],
    preemption: Preemption,
    progress: Progress,
) -> Built:
    """The trainer of a recipe, compiled and ready to start or to load a checkpoint. Collective.

    Args:
        recipe: what to train, and how.
        data: the images.
        model: the model with its initial weights, perhaps sharded.
        device, precision: those of the training step.
        evaluators: called at each evaluation.
        preemption: the run's signals, ranks and checkpoints; the parent of the checkpoints' folder is the run's.
        progress: shows the progress of the run.

    Raises:
        UserError: micro-batches of one image, and the model has batch normalization.
        RunError: a batch that does not fit into memory, or a compiler that fails.
    """
    context, settings, images = preemption.context, recipe.optimization, len(data.splits["train"])
    steps, warmup_steps = run_lengths(settings, images)
    micro_batch_size = resolve_micro_batch_size(settings, context.world_size)
    require_batches(model, micro_batch_size)
    ema = None if settings.ema_decay is None else EMA(model, settings.ema_decay)
    if settings.recompute:
        recompute_blocks(model)
    start = time.perf_counter()
    with memory_errors(micro_batch_size):
        context.heartbeat("compiling", slow=True)
        forward, compiled = compile_model(
            model,
            recipe.run.compile,
            batch_size=micro_batch_size,
            training_flop=3.0 * cost(build_meta(model.config)).flops * steps * settings.global_batch_size,
            device=device,
            precision=precision,
            context=context,
        )
    compile_seconds = time.perf_counter() - start
    preemption.check()
    optimizer_step = OptimizerStep(
        build_optimizer(settings, model),
        settings.clip_norm,
        float16=precision == torch.float16,
        sharded=is_sharded(model),
    )
    schedule = partial(
        learning_rate, peak=settings.learning_rate, warmup_steps=warmup_steps, steps=steps, decay=settings.decay
    )
    step = TrainingStep(
        forward,
        InputPreparation(device, model.metadata.preprocessing, recipe.run.seed, build_mixing(recipe.data)),
        partial(LOSSES[settings.loss], smoothing=settings.label_smoothing),
        optimizer_step,
        schedule,
        precision,
        accumulate=settings.global_batch_size // (micro_batch_size * context.world_size),
        context=context,
    )
    batches = TrainingBatches(
        lambda steps_done: build_batches(recipe, data, model, steps, steps_done, context),
        images,
        settings.global_batch_size,
        micro_batch_size,
        UnreadableImages(data.splits["train"], recipe.data.max_unreadable_fraction),
        context,
    )
    trainer = Trainer(
        TrainingState(model, optimizer_step, ema, run_identity(recipe, data, precision, context)),
        step,
        batches,
        build_cadence(recipe, steps, batches.epochs_per_step),
        evaluators,
        Records(preemption.checkpoints.folder.parent, recipe.run.wandb, to_json_object(recipe), context.is_rank0),
        preemption,
        progress,
    )
    return Built(trainer, warmup_steps, compiled, compile_seconds)


def run_lengths(settings: OptimizationRecipe, images: int) -> tuple[int, int]:
    """Steps of the run, and of its warm-up, which is limited to a fifth of them."""
    steps = settings.steps or max(round(settings.epochs * images / settings.global_batch_size), 1)
    warmup_steps = min(settings.warmup_steps, steps // 5)
    if warmup_steps < settings.warmup_steps:
        log.info(
            "warm-up of %d steps shortened to %d, a fifth of this run's %d steps",
            settings.warmup_steps, warmup_steps, steps,
        )  # fmt: skip
    return steps, warmup_steps


def build_cadence(recipe: Recipe, steps: int, epochs_per_step: float) -> Cadence:
    run = recipe.run
    return Cadence(
        steps=steps,
        evaluate_every=run.evaluate_every_steps or max(round(run.evaluate_every_epochs / epochs_per_step), 1),
        log_every=run.log_every_steps,
        save_every=run.save_every_steps,
        patience=run.patience,
    )


def build_optimizer(settings: OptimizationRecipe, model: Model) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return sgd(model, momentum=settings.momentum)
    return adamw(model, weight_decay=settings.weight_decay, beta1=settings.beta1, beta2=settings.beta2)


def build_mixing(data: DataRecipe) -> Mixing | None:
    if not data.mixes:
        return None
    return Mixing(mixup=data.mixup, cutmix=data.cutmix, group=data.mix_group_size)


def build_training_transform(data: DataRecipe, model: Model) -> TrainingTransform:
    magnitude = data.randaugment
    return TrainingTransform(
        image_size=model.image_size,
        preprocessing=model.metadata.preprocessing,
        crop=data.train_crop,
        crop_padding=data.crop_padding,
        flip=data.flip,
        randaugment=None if magnitude is None else RandAugment(layers=data.randaugment_layers, magnitude=magnitude),
        color_jitter=data.color_jitter,
    )


def build_batches(
    recipe: Recipe,
    data: DatasetSplits,
    model: Model,
    steps: int,
    steps_done: int = 0,
    context: DistributedContext = SINGLE_PROCESS,
) -> Batches:
    """This process's micro-batches of the steps that remain."""
    dataset: Dataset = data.splits["train"]
    micro_batch_size = resolve_micro_batch_size(recipe.optimization, context.world_size)
    accumulate = recipe.optimization.global_batch_size // (micro_batch_size * context.world_size)
    workers = recipe.data.workers
    return training_batches(
        dataset,
        build_training_transform(recipe.data, model),
        batch_size=micro_batch_size,
        steps=steps * accumulate,
        seed=recipe.run.seed,
        workers=default_workers(dataset, context.local_world_size) if workers is None else workers,
        first_step=steps_done * accumulate,
        rank=context.rank,
        world_size=context.world_size,
        processes=context.local_world_size,
    )


def build_preemption(
    recipe: Recipe, out: Path, signals: SignalState, resume_command: str, context: DistributedContext
) -> Preemption:
    """What saves, and stops, the run in the folder ``out``."""
    run = recipe.run
    checkpoints = CheckpointManager(out / "checkpoints", context, run.keep_checkpoints, run.save_in_background)
    return Preemption(context, signals, checkpoints, 60 * run.save_every_minutes, resume_command)


def run_identity(
    recipe: Recipe, data: DatasetSplits, precision: torch.dtype, context: DistributedContext
) -> dict[str, Any]:
    """What a checkpoint says about its run; a run that resumes from it must match."""
    return {
        "recipe": to_json_object(recipe),
        "classes": data.classes,
        "images": fingerprint(data),
        "precision": str(precision).removeprefix("torch."),
        "world_size": context.world_size,
        "versions": versions(),
    }


def build_initializer(recipe: Recipe) -> ModelInitializer:
    """The initializer of the recipe's model, which makes the model when the classes are known.

    Raises:
        UserError: sizes that do not fit together, or weights that cannot be loaded or resized.
    """
    settings, size, provenance = recipe.model, image_size(recipe), {"recipe": to_json_object(recipe)}
    if settings.weights is None:
        if size is None:
            raise UserError("no --image-size: give one, or --weights to use the size of the weights")
        not_sizes = ("model", "weights", "image_size", "image_width", "head_bias", "frozen")
        sizes = {key: value for key, value in asdict(settings).items() if key not in not_sizes}
        sizes |= {"variant": settings.model, "image_size": size}
        return from_scratch(sizes, build_preprocessing(recipe.data), recipe.run.seed, settings.head_bias, provenance)
    pretrained = load(settings.weights)
    if pretrained.config["in_channels"] != 3:
        channels = pretrained.config["in_channels"]
        raise UserError(
            f"{settings.weights} takes images of {channels} channels, and training reads RGB images, of 3: start from "
            "weights of 3 channels, or train from scratch"
        )
    pretrained = resize(pretrained, size or pretrained.image_size)
    origin = copy.deepcopy(pretrained.metadata.provenance)
    origin.pop("recipe", None)
    return from_weights(
        pretrained,
        {"dropout": settings.dropout, "stochastic_depth": settings.stochastic_depth, "rescale": settings.rescale},
        build_preprocessing(recipe.data, pretrained.metadata.preprocessing),
        settings.frozen,
        settings.head_bias,
        provenance | {"started_from": {**origin, "weights": settings.weights}},
    )


def image_size(recipe: Recipe) -> tuple[int, int] | None:
    """(height, width) of the recipe's images; None: that of the weights."""
    height, width = recipe.model.image_size, recipe.model.image_width
    return None if height is None else (height, width or height)


def build_preprocessing(data: DataRecipe, default: Preprocessing = Preprocessing()) -> Preprocessing:  # noqa: B008 (it is frozen)
    """The recipe's preprocessing for evaluation; the normalization, and fields that are None, as in ``default``."""
    fields = {"crop": data.crop, "crop_ratio": data.crop_ratio, "interpolation": data.interpolation}
    return replace(default, **{key: value for key, value in fields.items() if value is not None})


def build_data(recipe: Recipe, context: DistributedContext = SINGLE_PROCESS) -> DatasetSplits:
    """The recipe's images. One process of each machine reads the data; the others map what it found. Collective.

    Raises:
        UserError: data that cannot be read or that no classifier can be trained on.
    """
    published = context.local_rank0_first(lambda: None if context.local_rank else publish(check_data(recipe)))
    ours, memory = published or (None, None)
    found = context.all_gather(ours)[context.rank - context.local_rank]
    try:
        return cast(Published, found).open()
    except FileNotFoundError as error:
        raise UserError(f"rank {context.rank} does not find {error.filename}: set one TMPDIR for all ranks") from None
    finally:
        context.all_gather(None)  # all have opened it
        if memory is not None:
            memory.unlink()


def check_data(recipe: Recipe) -> DatasetSplits:
    """Loads the recipe's images, logs a description, and checks that they can be trained on."""
    data = load_data(recipe)
    if recipe.data.holdout:
        data = hold_out(data, recipe.data.holdout, recipe.data.split_seed)
    counts = ", ".join(f"{len(dataset):,} {name}" for name, dataset in data.splits.items())
    log.info("%s: %d classes; images: %s", data.description, len(data.classes), counts)
    for remark in data.remarks():
        log.warning("%s", remark)
    for warning in describe_repeats(data.splits, recipe.data.data):
        log.warning("%s", warning)
    if recipe.model.weights is None and recipe.data.data not in BUILT_IN:
        advice = advise_to_finetune(len(data.split("train")), recipe.data.data, max(image_size(recipe) or (0,)))
        if advice:
            log.warning("%s", advice)
    peek(data.split("train"))
    if len(data.classes) < 2:
        raise UserError(f"{recipe.data.data} has one class, {', '.join(data.classes)}: a classifier needs at least two")
    require_validation(recipe, data)
    return data


def load_data(recipe: Recipe) -> DatasetSplits:
    return load_source(
        recipe.data.data,
        val_fraction=0.0 if recipe.data.holdout else recipe.data.val_fraction,
        test_fraction=recipe.data.test_fraction,
        split_seed=recipe.data.split_seed,
        max_pixels=recipe.data.max_pixels,
        exclude=recipe.data.exclude,
    )


def check_validation(recipe: Recipe) -> None:
    """Raises a UserError when the recipe needs validation images and its data has none."""
    if recipe.run.keep == "best" or recipe.run.patience is not None:
        require_validation(recipe, load_data(recipe))


def require_validation(recipe: Recipe, data: DatasetSplits) -> None:
    options = {"--keep best": recipe.run.keep == "best", "--patience": recipe.run.patience is not None}
    for option, given in options.items():
        if given and "val" not in data.splits:
            raise UserError(f"{option} needs validation images, and there are none: give a --val-fraction above 0")
