"""What to train and how, as frozen dataclasses with the limits of each field. An invalid recipe cannot be created.

The docstrings of the fields are the command line's help, which is made without importing torch.
"""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from allmlp.config.limits import Limits, check_limits, flag
from allmlp.errors import UserError

LossName = Literal["softmax", "sigmoid"]  # the functions are in training/losses.py
Decay = Literal["linear", "cosine", "staircase"]  # the functions are in training/schedules.py
MODEL_SIZES = (
    "patch_size", "num_blocks", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim", "num_heads", "depths", "width",
    "stem",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """The model: a Mixer or comparison system by name, custom sizes (which override the name's), or trained weights."""

    model: str | None = None
    """A name (S/32, B/16, L/16, ViT-B/16, …: see mixer models), or a family for custom sizes (vit, bit, …)."""
    weights: str | None = None
    """Trained weights to start from, a file or hf-hub:OWNER/NAME. They set the sizes; the head starts at zero."""
    image_size: Annotated[int | None, Limits(above=0)] = 224
    """Height and width of the input in pixels, a multiple of the patch size; None: that of --weights."""
    image_width: Annotated[int | None, Limits(above=0)] = None
    """Width of the input in pixels, if it differs from the height."""
    patch_size: int | None = None
    """Height and width of a patch in pixels."""
    num_blocks: int | None = None
    """Number of layers, each one token-mixing and one channel-mixing MLP."""
    hidden_dim: int | None = None
    """C, the number of channels of a token."""
    tokens_mlp_dim: int | None = None
    """D_S, the hidden width of the token-mixing MLPs."""
    channels_mlp_dim: int | None = None
    """D_C, the hidden width of the channel-mixing MLPs, or of ViT's MLPs."""
    num_heads: int | None = None
    """Attention heads of ViT, HaloNet or BoTNet."""
    depths: tuple[int, ...] | None = None
    """Blocks in each stage of a residual network or EfficientNet."""
    width: Annotated[float | None, Limits(above=0)] = None
    """Factor of all channels of a residual network or EfficientNet."""
    stem: Literal["imagenet", "small"] | None = None
    """First layers of a residual network or EfficientNet: as published, or at full resolution, for images of 32 px."""
    gelu: Literal["tanh", "erf"] | None = None
    """GELU by the authors' tanh approximation, or exact (erf); None: tanh, or that of --weights."""
    dropout: Annotated[float, Limits(at_least=0, below=1)] = 0.0
    """Dropout rate after each dense layer of an MLP block."""
    stochastic_depth: Annotated[float, Limits(at_least=0, below=1)] = 0.0
    """Probability of dropping the last block's branches; rises linearly from 0 at the first block."""
    head_bias: Annotated[float, Limits()] = 0.0
    """Initial bias of every class; with --loss sigmoid, -6.9 for ImageNet and -10 for ImageNet-21k."""
    frozen: bool = False
    """With --weights: train only the new head."""
    rescale: bool = False
    """Stochastic depth divides the branches it keeps by 1 − p (timm does, the authors' code does not)."""

    def __post_init__(self) -> None:
        check_limits(self)
        if self.frozen and self.weights is None:
            raise UserError("--frozen without --weights: a new network has nothing worth freezing")
        sizes = [name for name in ("model", *MODEL_SIZES, "gelu") if getattr(self, name) is not None]
        if self.weights is not None and sizes:
            raise UserError(f"{flag(sizes[0])} and --weights: the weights set the sizes, so leave it out")


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """The images, their splits and their augmentation."""

    data: str = "digits"
    """SOURCE: a name (digits, cifar10, pets, imagenet, …), a folder of images, or a .zip of one."""
    exclude: str | None = None
    """A file that lists images to leave out, one name a line or CSV, such as mixer data dedup writes."""
    val_fraction: Annotated[float, Limits(at_least=0, below=1)] = 0.1
    """Fraction of the training images to use for validation, if the source has no validation split."""
    test_fraction: Annotated[float, Limits(at_least=0, below=1)] = 0.2
    """Fraction of all images to use for testing, if the source has no splits."""
    split_seed: int = 0
    """Seed of the random splits."""
    crop: Literal["resmall", "resize"] | None = "resmall"
    """Evaluation: resize the shorter side, or both sides, then crop the center; None: as recorded with --weights."""
    crop_ratio: Annotated[float | None, Limits(above=0, at_most=1)] = 224 / 256
    """Evaluation: side of the crop relative to the resized image; None: as recorded with --weights."""
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = "bilinear"
    """Interpolation when images are resized; None: as recorded with --weights."""
    train_crop: Literal["none", "pad", "inception"] = "inception"
    """Training: the evaluation crop, that crop shifted within a reflected border, or 5-100 % of the area."""
    crop_padding: Annotated[int, Limits(at_least=0)] = 4
    """Width of the border for --train-crop pad, in pixels."""
    flip: bool = True
    """Training: mirror images with probability 1/2."""
    randaugment: Annotated[float | None, Limits(at_least=0, at_most=100, hint="10 is strong")] = None
    """Training: magnitude of RandAugment, where 10 is strong; the paper uses 10, 15 and 20."""
    randaugment_layers: Annotated[int, Limits(above=0)] = 2
    """RandAugment operations per image."""
    color_jitter: Annotated[float, Limits(at_least=0)] = 0.0
    """Training: multiply brightness, contrast and saturation by a factor within 1 ± this."""
    mixup: Annotated[float | None, Limits(above=0)] = None
    """Training: p of mixup's Beta(p, p); the paper uses 0.2 and 0.5."""
    cutmix: Annotated[float | None, Limits(above=0)] = None
    """Training: p of CutMix's Beta(p, p), usually 1; combined with mixup, each step uses one of the two."""
    mix_group_size: Annotated[int, Limits(above=0)] = 8
    """Consecutive images of a batch that mixup and CutMix mix with one another."""
    holdout: Annotated[float, Limits(at_least=0, below=1)] = 0.0
    """Fraction of the training images to validate on, in place of any validation and test splits: for tuning."""
    max_pixels: Annotated[int, Limits(above=0)] = 64_000_000
    """Largest image that is read, in pixels; larger ones count as unreadable."""
    max_unreadable_fraction: Annotated[float, Limits(at_least=0)] = 0.01
    """The run stops if a larger fraction of the training images cannot be read."""
    workers: Annotated[int | None, Limits(at_least=0)] = None
    """Processes that load images; None: chosen from the number of images and CPU cores."""

    def __post_init__(self) -> None:
        check_limits(self)
        if self.mixes and self.mix_group_size < 2:
            raise UserError(f"--mix-group-size {self.mix_group_size}: must be at least 2 to mix images")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with one another."""
        return self.mixup is not None or self.cutmix is not None


@dataclass(frozen=True, kw_only=True)
class OptimizationRecipe:
    """AdamW or SGD, linear warm-up, decay to zero, gradients clipped at a global norm."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW for training from scratch; SGD with momentum and no weight decay for fine-tuning."""
    epochs: Annotated[float, Limits(above=0)] = 300
    """Passes over the training images."""
    steps: Annotated[int | None, Limits(above=0)] = None
    """Number of steps, in place of --epochs."""
    global_batch_size: Annotated[int, Limits(above=0)] = 4096
    """Images per step, over all processes."""
    micro_batch_size: Annotated[int | None, Limits(above=0)] = None
    """Images per forward and backward pass; gradients accumulate over a step: less memory, same result; None: all."""
    recompute: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, more time."""
    loss: LossName = "softmax"
    """softmax: cross-entropy over exclusive classes; sigmoid: one binary cross-entropy per class, summed."""
    learning_rate: Annotated[float, Limits(above=0, at_most=1e30, hint="1e-3 is usual")] = 1e-3
    """Peak learning rate, at the end of the warm-up."""
    momentum: Annotated[float, Limits(at_least=0, below=1)] = 0.9
    """Momentum of SGD."""
    weight_decay: Annotated[float, Limits(at_least=0)] = 0.1
    """AdamW's decoupled weight decay: multiplied by the learning rate, applied to kernels only."""
    beta1: Annotated[float, Limits(at_least=0, below=1)] = 0.9
    """AdamW's decay rate of the first moment."""
    beta2: Annotated[float, Limits(at_least=0, below=1)] = 0.999
    """AdamW's decay rate of the second moment."""
    warmup_steps: Annotated[int, Limits(at_least=0)] = 10_000
    """Steps of linear warm-up."""
    decay: Decay = "linear"
    """Decay of the learning rate after the warm-up; staircase: divided by 10 at 30, 60 and 90 % of the steps (BiT)."""
    clip_norm: Annotated[float | None, Limits(above=0)] = 1.0
    """Global norm at which gradients are clipped; None: no clipping."""
    label_smoothing: Annotated[float, Limits(at_least=0, below=1)] = 0.0
    """Share of the target that is spread evenly over all classes."""
    ema_decay: Annotated[float | None, Limits(at_least=0, below=1)] = None
    """Evaluate and save an exponential moving average of the weights with this decay per step; None: no averaging."""

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True, kw_only=True)
class RunRecipe:
    """The run: seed, hardware, evaluation, checkpoints."""

    seed: Annotated[int, Limits(at_least=0, below=2**31)] = 0
    """Seed of initial weights, image order and augmentation."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of matrix products; auto: bfloat16 if the hardware supports it; float16 scales the gradients."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile for the training step; auto: if the run is long enough to repay the compilation time."""
    evaluate_every_epochs: Annotated[float, Limits(above=0)] = 1.0
    """Epochs between evaluations on the validation split, each with a checkpoint."""
    evaluate_every_steps: Annotated[int | None, Limits(above=0)] = None
    """Steps between evaluations, in place of --evaluate-every-epochs."""
    fewshot: tuple[str, ...] = ()
    """Sources (as for --data) on whose images linear probes test the features at each evaluation (Section 3.3)."""
    fewshot_shots: Annotated[int, Limits(above=0)] = 5
    """Training images per class of these probes."""
    keep: Literal["last", "best"] = "last"
    """Which weights to keep: the last, or those with the best validation accuracy (early stopping)."""
    patience: Annotated[int | None, Limits(above=0)] = None
    """Stop after this many evaluations without a better validation accuracy; None: train to the end."""
    log_every_steps: Annotated[int, Limits(above=0)] = 10
    """Steps between lines of metrics.jsonl."""
    save_every_steps: Annotated[int | None, Limits(above=0)] = None
    """Steps between checkpoints, in addition to those at evaluations, at signals and by --save-every-minutes."""
    save_every_minutes: Annotated[float, Limits(above=0)] = 10.0
    """Longest time between checkpoints, in minutes."""
    save_in_background: bool = True
    """Write checkpoints while training continues: needs memory for another copy of weights and optimizer state."""
    keep_checkpoints: Annotated[int, Limits(above=0)] = 2
    """How many of the newest checkpoints to keep, in addition to the one with the best validation accuracy."""
    shard: bool = False
    """With several processes: each stores a shard of weights and optimizer state (FSDP2), not a full copy (DDP)."""
    timeout_seconds: Annotated[float, Limits(above=0)] = 600.0
    """With several processes: the run ends after this long without progress and names the stuck rank."""
    wandb: str | None = None
    """Weights & Biases project that also receives the metrics (pip install wandb)."""

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines a run. The run's folder stores it as ``recipe.json``."""

    name: str = "custom"
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    optimization: OptimizationRecipe = field(default_factory=OptimizationRecipe)
    run: RunRecipe = field(default_factory=RunRecipe)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-][\w. -]*", self.name):
            raise UserError(
                f"recipe name {self.name!r}: use only letters, digits, '-', '_' and '.', as it names a folder"
            )
        check_micro_batch_size(self)


def check_micro_batch_size(recipe: Recipe) -> None:
    """Checks that micro-batches divide the batch and hold complete groups of images to mix.

    Raises:
        UserError: names the nearest sizes that work.
    """
    batch, micro_batch = recipe.optimization.global_batch_size, recipe.optimization.micro_batch_size
    if micro_batch is None or micro_batch == batch:
        return
    group = recipe.data.mix_group_size if recipe.data.mixes else 1
    valid = [size for size in range(1, batch + 1) if batch % size == 0 and size % group == 0]
    if micro_batch not in valid:
        nearest = sorted(sorted(valid, key=lambda size: abs(size - micro_batch))[:3]) or [batch]
        groups = f" and hold whole groups of {group} that mix (--mix-group-size)" if recipe.data.mixes else ""
        raise UserError(
            f"--micro-batch-size {micro_batch}: must divide --global-batch-size {batch}{groups}; the nearest: "
            + ", ".join(map(str, nearest))
        )


@dataclass(frozen=True, kw_only=True)
class SearchRecipe:
    """Learning rates to try, and seeds to repeat the run with."""

    learning_rates: Annotated[tuple[float, ...], Limits(above=0, at_most=1e30)] = ()
    """Rates to try on held-out training images; the best one is then used on all images; none: --learning-rate."""
    search_fraction: Annotated[float, Limits(above=0, below=1)] = 0.1
    """Fraction of the training images held out while rates are tried; test images never play a part in the choice."""
    seeds: Annotated[int, Limits(at_least=1)] = 1
    """Runs with the chosen rate, with seeds from --seed on; their mean and standard deviation are reported."""

    def __post_init__(self) -> None:
        check_limits(self)
        if len(set(self.learning_rates)) < len(self.learning_rates):
            raise UserError(f"--learning-rates {' '.join(map(str, self.learning_rates))}: one rate is given twice")


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe:
    """Fine-tuning of trained weights on a dataset: the recipe of each run, and the search around it."""

    recipe: Recipe
    search: SearchRecipe = field(default_factory=SearchRecipe)

    def __post_init__(self) -> None:
        seed, seeds = self.recipe.run.seed, self.search.seeds
        if seed + seeds > 2**31:
            raise UserError(f"--seeds {seeds}: added to --seed {seed}, must be at most {2**31}")

    @property
    def searches(self) -> bool:
        """Whether there are several runs."""
        return bool(self.search.learning_rates) or self.search.seeds > 1
