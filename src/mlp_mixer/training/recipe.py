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

from mlp_mixer.errors import UserError


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
    rescale: bool = False
    """Divide surviving branches by 1 − p (timm does, the authors' code does not)."""


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """The images, and how they are seen."""

    data: str = "digits"
    """SOURCE: digits, cifar10, a folder of images, or a .zip of one."""
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
    global_batch_size: int = 4096
    """Images per step."""
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


@dataclass(frozen=True, kw_only=True)
class RunRecipe:
    """The run: randomness, hardware, cadences."""

    seed: int = 0
    """Of weights, order and augmentation."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto: bfloat16 where the hardware has it."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile for the training step; auto: where the run is long enough to win back the compiler's time."""
    evaluate_every_epochs: float = 1.0
    """Epochs between evaluations on the validation part (and saved checkpoints)."""
    log_every_steps: int = 10
    """Steps between lines of metrics.jsonl."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides a run. ``recipe.json`` in the run's folder holds it; ``from_json`` reads it again."""

    name: str = "custom"
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    optimization: OptimizationRecipe = field(default_factory=OptimizationRecipe)
    run: RunRecipe = field(default_factory=RunRecipe)


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
    }
    for name, value in fractions.items():
        if not 0 <= value < 1:
            raise UserError(f"{flag(name)} {value}: must be at least 0 and below 1")
    above = {
        "image_size": recipe.model.image_size,
        "image_width": recipe.model.image_width,
        "epochs": recipe.optimization.epochs,
        "global_batch_size": recipe.optimization.global_batch_size,
        "learning_rate": recipe.optimization.learning_rate,
        "clip_norm": recipe.optimization.clip_norm,
        "max_pixels": recipe.data.max_pixels,
        "evaluate_every_epochs": recipe.run.evaluate_every_epochs,
        "log_every_steps": recipe.run.log_every_steps,
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
    }
    for name, value in least.items():
        if value is not None and not 0 <= value < float("inf"):
            raise UserError(f"{flag(name)} {value}: must be at least 0")
    if not re.fullmatch(r"[\w-][\w. -]*", recipe.name):
        raise UserError(f"recipe name {recipe.name!r}: letters, digits, '-', '_' and '.' alone, for it names a folder")
    if recipe.run.seed >= 2**31:
        raise UserError(f"--seed {recipe.run.seed}: must be below {2**31}")
    own_sizes = ("model", "patch_size", "num_blocks", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim", "gelu")
    given = [name for name in own_sizes if getattr(recipe.model, name) is not None]
    if recipe.model.weights is not None and given:
        raise UserError(f"{flag(given[0])} and --weights: the sizes are those of the weights, so leave it out")
    if recipe.data.crop_ratio is not None and not 0 < recipe.data.crop_ratio <= 1:
        raise UserError(f"{flag('crop_ratio')} {recipe.data.crop_ratio}: must be above 0 and at most 1")
    return recipe


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
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in kinds:
        raise UserError(f"{where} = {value!r}: should be {' or '.join(kind.__name__ for kind in kinds)}")
    return value
