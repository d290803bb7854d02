"""MLP-Mixer (Tolstikhin et al. 2021, arXiv:2105.01601), Section 2: the equations, with the authors' names.

B images, S patches ("tokens"), C channels. One MLP mixes across patches, one across channels; nothing else does.
"""

import hashlib
import math
import operator
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from allmlp.errors import UserError
from allmlp.metadata import Metadata
from allmlp.rng import uniform

Gelu = Literal["tanh", "erf"]
Size = int | tuple[int, int]


def gelu(x: Tensor, form: Gelu) -> Tensor:
    """σ of Eq. 1: the tanh approximation (flax's default, the authors' choice) or the exact erf form (timm's)."""
    if form == "erf":
        return F.gelu(x)
    if torch.compiler.is_compiling():  # ½(1 + tanh u) = sigmoid(2u): the same function, twice as fast once compiled
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
    return F.gelu(x, approximate="tanh")


class MlpBlock(nn.Module):
    """Two dense layers with a GELU between them, over the last axis: (…, dim) → (…, dim)."""

    def __init__(self, dim: int, hidden_dim: int, form: Gelu, dropout: float = 0.0, place: int = 0) -> None:
        super().__init__()
        self.dense_0 = nn.Linear(dim, hidden_dim)
        self.dense_1 = nn.Linear(hidden_dim, dim)
        self.form: Gelu = form
        self.dropout, self.place = dropout, place

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        hidden = self.dense_0(x)
        if self.training and torch.compiler.is_compiling():  # there, the GELU is cheaper computed twice than kept
            return checkpoint(self.second, hidden, keys, use_reentrant=False, preserve_rng_state=keys is None)
        return self.second(hidden, keys)

    def second(self, hidden: Tensor, keys: Tensor | None) -> Tensor:
        return self.drop(self.dense_1(self.drop(gelu(hidden, self.form), keys, 0)), keys, 1)

    def drop(self, x: Tensor, keys: Tensor | None, which: int) -> Tensor:
        if not self.training or self.dropout == 0:
            return x
        keep = uniform(keys, self.place + which, x) >= self.dropout
        return torch.where(keep, x / (1 - self.dropout), 0.0)


class MixerBlock(nn.Module):
    """Eq. 1: a token-mixing and a channel-mixing MLP, each behind a LayerNorm and a skip connection."""

    def __init__(
        self,
        tokens: int,
        channels: int,
        tokens_mlp_dim: int,
        channels_mlp_dim: int,
        form: Gelu = "tanh",
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        rescale: bool = False,
        index: int = 0,
    ) -> None:
        super().__init__()
        self.place = 6 * index  # of its six random masks
        self.norm1 = nn.LayerNorm(channels, eps=norm_eps)
        self.token_mixing = MlpBlock(tokens, tokens_mlp_dim, form, dropout, self.place + 2)
        self.norm2 = nn.LayerNorm(channels, eps=norm_eps)
        self.channel_mixing = MlpBlock(channels, channels_mlp_dim, form, dropout, self.place + 4)
        self.drop_path, self.rescale = drop_path, rescale

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:  # (B, S, C); S patches, C channels
        x = x + self.survive(self.token_mixing(self.norm1(x).mT, keys).mT, keys, 0)  # across patches, for all channels
        return x + self.survive(self.channel_mixing(self.norm2(x), keys), keys, 1)  # across channels, for all patches

    def survive(self, branch: Tensor, keys: Tensor | None, which: int) -> Tensor:
        """Stochastic depth (Huang et al. 2016): training, an image loses this branch with probability drop_path."""
        if not self.training or self.drop_path == 0:
            return branch
        keep = (uniform(keys, self.place + which, branch[:, :1, :1]) >= self.drop_path).to(branch.dtype)
        return branch * (keep / (1 - self.drop_path) if self.rescale else keep)


class Mixer(nn.Module):
    """(B, in_channels, H, W) → (B, num_classes); with ``num_classes=0``, the pre-logits features (B, C).

    Args:
        num_classes: size of the head; 0 leaves it out.
        image_size: height and width in pixels, or one number for both; each a multiple of the patch's.
        patch_size: likewise; S = (H / patch height) · (W / patch width).
        num_blocks, hidden_dim, tokens_mlp_dim, channels_mlp_dim: Table 1's layers, C, D_S and D_C.
        in_channels: of the images.
        gelu: "tanh" as the authors, "erf" for weights trained with timm.
        norm_eps: added to the variance in every LayerNorm (1e-5 in lucidrains' port).
        dropout: after each dense layer of an MLP block (0 in every published setting).
        stochastic_depth: probability to drop a branch; rises linearly over the blocks from 0 to this.
        rescale: divide surviving branches by 1 − p (timm does, the authors' code does not).
        seed: of the initial weights; None draws one from torch's generator.

    Raises:
        UserError: a size that is not a multiple of the patch's, not positive, or a rate outside [0, 1).

    The attribute ``card`` holds class names and preprocessing, ``config`` these arguments, as ``save`` stores them.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        image_size: Size,
        patch_size: Size,
        num_blocks: int,
        hidden_dim: int,
        tokens_mlp_dim: int,
        channels_mlp_dim: int,
        in_channels: int = 3,
        gelu: Gelu = "tanh",
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        rescale: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.config = {key: value for key, value in locals().items() if key not in ("self", "seed", "__class__")}
        self.config |= {"image_size": as_pair(image_size), "patch_size": as_pair(patch_size)}
        check(self.config)
        self.image_size, self.patch_size = self.config["image_size"], self.config["patch_size"]
        self.num_classes, self.in_channels = self.config["num_classes"], self.config["in_channels"]
        self.grid = (self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1])
        self.metadata = Metadata()

        where = torch.get_default_device()
        with torch.device("meta"):  # no time is spent on initial weights that are not the authors'
            self.stem = nn.Conv2d(in_channels, hidden_dim, self.patch_size, self.patch_size)
            self.blocks = nn.ModuleList(
                MixerBlock(
                    self.grid[0] * self.grid[1],
                    hidden_dim,
                    tokens_mlp_dim,
                    channels_mlp_dim,
                    gelu,
                    norm_eps,
                    dropout,
                    stochastic_depth * i / max(num_blocks - 1, 1),
                    rescale,
                    index=i,
                )
                for i in range(num_blocks)
            )
            self.pre_head_layer_norm = nn.LayerNorm(hidden_dim, eps=norm_eps)
            self.head = nn.Linear(hidden_dim, num_classes) if num_classes else nn.Identity()
        if where.type != "meta":
            self.to_empty(device=where)
            init_weights(self, int(torch.randint(2**62, (), device="cpu")) if seed is None else seed)

    def tokens(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """(B, in_channels, H, W) → (B, S, C): the tokens that the last block leaves, row by row.

        ``keys``, (B,) int64, say which masks of dropout and stochastic depth each image gets in training (see
        ``masks.sample_keys``); without them torch's generator draws the masks.
        """
        if images.ndim != 4 or images.shape[2:] != self.image_size or images.shape[1] != self.stem.in_channels:
            raise UserError(
                f"images of shape {tuple(images.shape)}: this model takes (batch, {self.stem.in_channels}, "
                f"{self.image_size[0]}, {self.image_size[1]}); resize the images, or create the model for their size"
            )
        x = self.stem(images.to(self.stem.weight.dtype)).flatten(2).mT
        for block in self.blocks:
            x = block(x, keys)
        return x

    def features(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """(B, in_channels, H, W) → (B, C): the pre-logits, the mean over patches of the normalised tokens."""
        return self.pre_head_layer_norm(self.tokens(images, keys)).mean(1)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        return self.head(self.features(images, keys))


def copy(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def init_weights(model: nn.Module, seed: int, put: Callable[[Tensor, Tensor], None] = copy) -> None:
    """The authors' initial weights, each a function of (seed, its name) alone, on any device.

    ``put`` writes a drawn value into its parameter, which may hold only a share of it.

    Kernels and stem: LeCun normal as flax draws it, a normal cut at 2σ, corrected to variance 1/fan_in; the head's
    kernel and every bias 0; LayerNorm scales 1.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or name == "head.weight":
            nn.init.zeros_(parameter)
        elif parameter.ndim == 1:
            nn.init.ones_(parameter)
        else:
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            std = parameter.shape[1:].numel() ** -0.5 / 0.87962566  # the standard deviation of a normal cut at ±2
            drawn = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            nn.init.trunc_normal_(drawn, std=std, a=-2 * std, b=2 * std, generator=generator)
            put(parameter, drawn)


def as_pair(size: Size) -> tuple[int, int]:
    """(height, width) from one number for both, or from two."""
    try:
        if isinstance(size, Sequence):
            height, width = size
        else:
            height = width = size
        return operator.index(height), operator.index(width)
    except (TypeError, ValueError):
        raise UserError(f"size {size!r}: give a whole number of pixels, or two, (height, width)") from None


def check(config: dict) -> None:
    """Holds the arguments of ``Mixer`` to what they may be; counts become plain integers."""
    counts = ("num_blocks", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim", "in_channels")
    for key in (*counts, "num_classes"):
        least = 1 if key in counts else 0
        try:
            config[key] = operator.index(config[key])
        except TypeError:
            raise UserError(f"{key} = {config[key]!r}: a whole number, at least {least}") from None
        if config[key] < least:
            raise UserError(f"{key} = {config[key]}: a whole number, at least {least}")
    for key in ("image_size", "patch_size"):
        if min(config[key]) < 1:
            raise UserError(f"{key} = {config[key]}: at least 1 pixel")
    (height, width), (patch_height, patch_width) = config["image_size"], config["patch_size"]
    if height % patch_height or width % patch_width:
        fit = [max(round(s / p), 1) * p for s, p in zip(config["image_size"], config["patch_size"], strict=True)]
        raise UserError(
            f"image size {height}×{width} is not a multiple of the patch size {patch_height}×{patch_width}: "
            f"use {fit[0]}×{fit[1]}, or another patch size"
        )
    for key in ("dropout", "stochastic_depth"):
        if not 0 <= config[key] < 1:
            raise UserError(f"{key} = {config[key]}: a probability, at least 0 and below 1")
    if not 0 < config["norm_eps"] < 1:
        raise UserError(f"norm_eps = {config['norm_eps']}: a small positive number, 1e-6 in the authors' code")
    if config["gelu"] not in ("tanh", "erf"):
        raise UserError(f"gelu = {config['gelu']!r}: 'tanh' (the authors') or 'erf' (timm's)")
