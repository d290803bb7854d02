"""What to train and how, typed, frozen, reloadable. No torch here: the command line's help is made from this."""

import dataclasses
import difflib
import json
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from allmlp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """The Mixer: a variant of Table 1, or sizes of one's own (which override the variant's), or trained weights."""

    model: str | None = None
    """A variant of Table 1: S/32, S/16, B/32, B/16, L/32, L/16, H/14."""
    weights: str | None = None
    """Weights to start from, a file or hf-hub:OWNER/NAME: the sizes are theirs, the head starts at zero."""
    image_size: int | None = 224
    """Height and width of the input in pixels, a multiple of the patch size; None: that of --weights."""
    image_width: int | None = None
    """Width in pixels, where it is not the height."""
    patch_size: int | None = None
    """Height and width of a patch in pixels."""
    num_blocks: int | None = None
    """Layers, each one token-mixing and one channel-mixing MLP."""
    hidden_dim: int | None = None
    """C, the width of a token."""
    tokens_mlp_dim: int | None = None
    """D_S, hidden width of the token-mixing MLPs."""
    channels_mlp_dim: int | None = None
    """D_C, hidden width of the channel-mixing MLPs."""
    gelu: Literal["tanh", "erf"] | None = None
    """The GELU: the authors' tanh approximation, or the exact form; None: tanh, or that of --weights."""
    dropout: float = 0.0
    """After each dense layer of an MLP block."""
    stochastic_depth: float = 0.0
    """Probability to drop the last block's branches; rises linearly from 0 at the first."""
    head_bias: float = 0.0
    """Of every class at the start; with --loss sigmoid, -6.9 for ImageNet, -10 for ImageNet-21k."""
    frozen: bool = False
    """With --weights: only the new head is trained."""
    rescale: bool = False
    """Divide surviving branches by 1 − p (timm does, the authors' code does not)."""


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """The images, and how they are seen."""

    data: str = "digits"
    """SOURCE: digits, cifar10, cifar100, pets, flowers102, a folder of images, or a .zip of one."""
    val_fraction: float = 0.1
    """Of the training images, cut off for validation where there is no val/ part."""
    test_fraction: float = 0.2
    """Of all images, cut off for test where there are no parts."""
    split_seed: int = 0
    """Another one gives another split."""
    crop: Literal["resmall", "resize"] | None = "resmall"
    """Evaluation: resize the shorter side, or both sides, then cut out the centre; None: as --weights had it."""
    crop_ratio: float | None = 224 / 256
    """Evaluation: side that is kept of the resized image; None: as --weights had it."""
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = "bilinear"
    """How images are resized; None: as --weights had it."""
    train_crop: Literal["none", "pad", "inception"] = "inception"
    """Training: the evaluation's view, that view shifted within a reflected border, or 5-100 % of the area."""
    crop_padding: int = 4
    """Pixels of the border for --train-crop pad."""
    flip: bool = True
    """Training: mirror every second image."""
    randaugment: float | None = None
    """Training: magnitude of RandAugment, where 10 is strong; the paper's are 10, 15 and 20."""
    randaugment_layers: int = 2
    """Operations of RandAugment for each image."""
    color_jitter: float = 0.0
    """Training: brightness, contrast and saturation times a factor of 1 ± this."""
    mixup: float | None = None
    """Training: p of mixup's Beta(p, p); the paper's are 0.2 and 0.5."""
    cutmix: float | None = None
    """Training: p of CutMix's Beta(p, p), usually 1; with mixup too, each step does one of them."""
    mix_group_size: int = 8
    """Images, one after the other in a batch, that are mixed with each other."""
    holdout: float = 0.0
    """Of the training images, cut off in place of any val/ part, and no test: for choosing settings."""
    max_pixels: int = 64_000_000
    """Larger images are refused."""
    max_unreadable_fraction: float = 0.01
    """The run stops when more of the training images than this cannot be read."""
    workers: int | None = None
    """Processes that load images; None: chosen by the number of images and cores."""


@dataclass(frozen=True, kw_only=True)
class OptimizationRecipe:
    """AdamW or SGD, linear warm-up, decay to zero, gradients clipped at a global norm."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW for training from scratch; SGD with momentum, without weight decay, for fine-tuning."""
    epochs: float = 300
    """Passes over the training images."""
    steps: int | None = None
    """Steps, instead of --epochs."""
    global_batch_size: int = 4096
    """Images per step."""
    micro_batch_size: int | None = None
    """Images at a time, whose gradients add up to a step's: less memory, the same result; None: all of a step."""
    recompute: bool = False
    """Compute each block again in the backward pass instead of keeping its activations: less memory, more time."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """Cross-entropy over exclusive classes, or the authors' for pre-training: one for each class, summed."""
    learning_rate: float = 1e-3
    """At the end of the warm-up."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 0.1
    """Of Adam: decoupled, times the learning rate, on kernels only."""
    beta1: float = 0.9
    """Of Adam."""
    beta2: float = 0.999
    """Of Adam."""
    warmup_steps: int = 10_000
    """Steps of linear warm-up."""
    decay: Literal["linear", "cosine"] = "linear"
    """After the warm-up."""
    clip_norm: float | None = 1.0
    """Global norm of the gradient, None: not clipped."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""
    ema_decay: float | None = None
    """Polyak averaging: what is evaluated and saved is avg = polyak · avg + (1 − polyak) · weights, as of each step."""


@dataclass(frozen=True, kw_only=True)
class RunRecipe:
    """The run: randomness, hardware, cadences."""

    seed: int = 0
    """Of weights, order and augmentation."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of matrix products; auto: bfloat16 where the hardware has it; float16: with gradients scaled."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile for the training step; auto: where the run is long enough to win back the compiler's time."""
    evaluate_every_epochs: float = 1.0
    """Epochs between evaluations on the validation part (and saved checkpoints)."""
    evaluate_every_steps: int | None = None
    """Steps between them, instead of epochs."""
    keep: Literal["last", "best"] = "last"
    """Which weights are the result: those at the end, or those with the best validation accuracy (early stopping)."""
    patience: int | None = None
    """Evaluations without a better validation accuracy after which the run ends; None: it goes on to the end."""
    log_every_steps: int = 10
    """Steps between lines of metrics.jsonl."""
    save_every_steps: int | None = None
    """Steps between checkpoints, beside those at each evaluation, at a signal and by the clock."""
    save_every_minutes: float = 10.0
    """Time after which a checkpoint is due in any case."""
    save_in_background: bool = True
    """Write checkpoints while the training goes on: it takes memory for one more copy of weights and moments."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay, beside the one with the best validation accuracy."""
    shard: bool = False
    """On several processes: each holds a share of the weights and moments (FSDP2), not a copy of all (DDP)."""
    timeout_seconds: float = 600.0
    """On several processes: without any progress for so long, the run ends and names the stuck rank."""
    wandb: str | None = None
    """A project of Weights & Biases that the metrics are also sent to (pip install wandb)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides a run. ``recipe.json`` in the run's folder holds it; ``from_json`` reads it again."""

    name: str = "custom"
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    optimization: OptimizationRecipe = field(default_factory=OptimizationRecipe)
    run: RunRecipe = field(default_factory=RunRecipe)


@dataclass(frozen=True, kw_only=True)
class SearchRecipe:
    """How a transfer finds its learning rate, and how often it is repeated."""

    learning_rates: tuple[float, ...] = ()
    """Each is tried on held-out training images, and the best then used on all; none: --learning-rate is used."""
    search_fraction: float = 0.1
    """Of the training images, held out while the rates are tried; the test images are never looked at for it."""
    seeds: int = 1
    """Runs with the chosen rate, from --seed on, of which mean and standard deviation are told."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Weights moved to a data set: the recipe of each run, and the search around it."""

    recipe: Recipe
    search: SearchRecipe = field(default_factory=SearchRecipe)


def check_transfer(transfer: Transfer) -> Transfer:
    """The transfer itself; a UserError that names a field out of range, its value and its limits."""
    check(transfer.recipe)
    rates, fraction, seeds = (
        transfer.search.learning_rates,
        transfer.search.search_fraction,
        transfer.search.seeds,
    )
    for rate in rates:
        if not 0 < rate <= 1e30:
            raise UserError(f"--learning-rates {' '.join(map(str, rates))}: each must be above 0, and at most 1e30")
    if len(set(rates)) < len(rates):
        raise UserError(f"--learning-rates {' '.join(map(str, rates))}: one of them is there twice")
    if not 0 < fraction < 1:
        raise UserError(f"--search-fraction {fraction}: must be above 0 and below 1")
    if seeds < 1 or transfer.recipe.run.seed + seeds > 2**31:
        raise UserError(f"--seeds {seeds}: at least 1, and --seed {transfer.recipe.run.seed} plus it at most {2**31}")
    return transfer


def check(recipe: Recipe) -> Recipe:
    """The recipe itself; a UserError that names a field out of range, its value and its limits."""
    fractions = {
        "val_fraction": recipe.data.val_fraction,
        "test_fraction": recipe.data.test_fraction,
        "dropout": recipe.model.dropout,
        "stochastic_depth": recipe.model.stochastic_depth,
        "label_smoothing": recipe.optimization.label_smoothing,
        "beta1": recipe.optimization.beta1,
        "beta2": recipe.optimization.beta2,
        "momentum": recipe.optimization.momentum,
        "ema_decay": recipe.optimization.ema_decay,
        "holdout": recipe.data.holdout,
    }
    for name, value in fractions.items():
        if value is not None and not 0 <= value < 1:
            raise UserError(f"{flag(name)} {value}: must be at least 0 and below 1")
    above = {
        "image_size": recipe.model.image_size,
        "image_width": recipe.model.image_width,
        "epochs": recipe.optimization.epochs,
        "steps": recipe.optimization.steps,
        "micro_batch_size": recipe.optimization.micro_batch_size,
        "mixup": recipe.data.mixup,
        "cutmix": recipe.data.cutmix,
        "mix_group_size": recipe.data.mix_group_size,
        "randaugment_layers": recipe.data.randaugment_layers,
        "patience": recipe.run.patience,
        "global_batch_size": recipe.optimization.global_batch_size,
        "learning_rate": recipe.optimization.learning_rate,
        "clip_norm": recipe.optimization.clip_norm,
        "max_pixels": recipe.data.max_pixels,
        "evaluate_every_epochs": recipe.run.evaluate_every_epochs,
        "evaluate_every_steps": recipe.run.evaluate_every_steps,
        "log_every_steps": recipe.run.log_every_steps,
        "save_every_steps": recipe.run.save_every_steps,
        "save_every_minutes": recipe.run.save_every_minutes,
        "keep_checkpoints": recipe.run.keep_checkpoints,
        "timeout_seconds": recipe.run.timeout_seconds,
    }
    for name, value in above.items():
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{flag(name)} {value}: must be above 0")
    least = {
        "weight_decay": recipe.optimization.weight_decay,
        "warmup_steps": recipe.optimization.warmup_steps,
        "crop_padding": recipe.data.crop_padding,
        "workers": recipe.data.workers,
        "seed": recipe.run.seed,
        "max_unreadable_fraction": recipe.data.max_unreadable_fraction,
        "color_jitter": recipe.data.color_jitter,
    }
    for name, value in least.items():
        if value is not None and not 0 <= value < float("inf"):
            raise UserError(f"{flag(name)} {value}: must be at least 0")
    if not re.fullmatch(r"[\w-][\w. -]*", recipe.name):
        raise UserError(f"recipe name {recipe.name!r}: letters, digits, '-', '_' and '.' alone, for it names a folder")
    if recipe.run.seed >= 2**31:
        raise UserError(f"--seed {recipe.run.seed}: must be below {2**31}")
    if not abs(recipe.model.head_bias) < float("inf"):
        raise UserError(f"--head-bias {recipe.model.head_bias}: must be a finite number")
    if recipe.model.frozen and recipe.model.weights is None:
        raise UserError("--frozen without --weights: a new network has nothing worth freezing")
    if recipe.optimization.learning_rate > 1e30:
        raise UserError(f"--learning-rate {recipe.optimization.learning_rate}: at most 1e30 (1e-3 is usual)")
    if recipe.data.randaugment is not None and not 0 <= recipe.data.randaugment <= 100:
        raise UserError(f"--randaugment {recipe.data.randaugment}: must be at least 0 and at most 100; 10 is strong")
    check_micro_batches(recipe)
    own_sizes = ("model", "patch_size", "num_blocks", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim", "gelu")
    given = [name for name in own_sizes if getattr(recipe.model, name) is not None]
    if recipe.model.weights is not None and given:
        raise UserError(f"{flag(given[0])} and --weights: the sizes are those of the weights, so leave it out")
    if recipe.data.crop_ratio is not None and not 0 < recipe.data.crop_ratio <= 1:
        raise UserError(f"{flag('crop_ratio')} {recipe.data.crop_ratio}: must be above 0 and at most 1")
    return recipe


def check_micro_batches(recipe: Recipe) -> None:
    whole, part, group = (
        recipe.optimization.global_batch_size,
        recipe.optimization.micro_batch_size,
        recipe.data.mix_group_size,
    )
    mixes = recipe.data.mixup is not None or recipe.data.cutmix is not None
    if mixes and group < 2:
        raise UserError(f"--mix-group-size {group}: an image that is to be mixed needs another; at least 2")
    if part is None or part == whole:
        return
    fit = [size for size in range(1, whole + 1) if whole % size == 0 and (size % group == 0 or not mixes)]
    if part not in fit:
        near = ", ".join(map(str, sorted(sorted(fit, key=lambda size: abs(size - part))[:3]))) or str(whole)
        groups = f" and hold whole groups of {group} that mix (--mix-group-size)" if mixes else ""
        limits = f"must divide --global-batch-size {whole}{groups}"
        raise UserError(f"--micro-batch-size {part}: {limits}; the nearest: {near}")


def check_ranks(recipe: Recipe, world_size: int) -> None:
    """A UserError where a step's images cannot be shared out among so many processes."""
    whole, group = recipe.optimization.global_batch_size, recipe.data.mix_group_size
    if whole % world_size:
        near = max(whole // world_size, 1) * world_size
        raise UserError(
            f"--global-batch-size {whole} on {world_size} processes: a multiple of {world_size} is needed, as {near}"
        )
    part, share = recipe.optimization.micro_batch_size, whole // world_size
    if part is not None and share % min(part, share):
        raise UserError(f"--micro-batch-size {part}: must divide the {share} images of each of {world_size} processes")
    if (recipe.data.mixup is not None or recipe.data.cutmix is not None) and share % group and world_size > 1:
        raise UserError(
            f"--mix-group-size {group}: images that mix must be on one process, and each of {world_size} has {share}: "
            f"a divisor of {share} is needed"
        )


def micro_batch(settings: OptimizationRecipe, world_size: int) -> int:
    """Images that one process computes at a time."""
    share = settings.global_batch_size // world_size
    return min(settings.micro_batch_size or share, share)


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def to_json_object(recipe: Recipe) -> dict[str, Any]:
    return dataclasses.asdict(recipe)


def from_json(path: Path) -> Recipe:
    """Reads a saved recipe; a UserError for an unknown field (with the nearest), a wrong type, a broken file."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a recipe ({error}): give the recipe.json of a run's folder") from None
    return check(build(Recipe, stored, str(path)))


def build(kind: type, stored: Any, where: str) -> Any:
    """A dataclass from parsed JSON, each field's type checked."""
    if not isinstance(stored, dict):
        names = ", ".join(field.name for field in dataclasses.fields(kind))
        raise UserError(f"{where}: {stored!r} should be an object with the fields {names}")
    hints = typing.get_type_hints(kind)
    for key in stored:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 3) or list(hints)
            raise UserError(f"{where}: unknown field {key!r}; the nearest: {', '.join(near)}")
    return kind(**{key: convert(hints[key], value, f"{where}: {key}") for key, value in stored.items()})


def convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    choices = [choice for kind in kinds if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]
    if choices:
        choices += [None] * (type(None) in kinds)
        if value not in choices:
            raise UserError(f"{where} = {value!r}: use one of {', '.join(map(repr, choices))}")
        return value
    if float in kinds and type(value) is int and abs(value) < 10**300:
        return float(value)
    if type(value) not in kinds:
        raise UserError(f"{where} = {value!r}: should be {' or '.join(kind.__name__ for kind in kinds)}")
    return value
