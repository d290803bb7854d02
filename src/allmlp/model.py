"""MLP-Mixer (Tolstikhin et al. 2021, arXiv:2105.01601), Section 2: the equations, with the authors' names.

B images, S patches ("tokens"), C channels. One MLP mixes across patches, one across channels; nothing else does.
"""

import torch
from torch import Tensor, nn

from allmlp.dropout import Dropout, DropPath
from allmlp.initial_weights import init_weights
from allmlp.metadata import Metadata
from allmlp.sizes import (
    Gelu,
    Size,
    check_any_present,
    check_block,
    check_config,
    check_images,
    check_mask,
    check_tokens,
)
from allmlp.timm_methods import TimmMethods


class MlpBlock(nn.Module):
    """W₂ σ(W₁ x), two dense layers with a GELU between them, over the last axis: (B, …, dim) → (B, …, dim)."""

    def __init__(self, dim: int, hidden_dim: int, gelu: Gelu = "tanh", dropout: float = 0.0, stream: int = 0) -> None:
        super().__init__()
        self.dense_0 = nn.Linear(dim, hidden_dim)
        self.dense_1 = nn.Linear(hidden_dim, dim)
        self.gelu = nn.GELU(approximate="tanh" if gelu == "tanh" else "none")
        self.dropout_0, self.dropout_1 = Dropout(dropout, stream), Dropout(dropout, stream + 1)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        hidden = self.dropout_0(self.gelu(self.dense_0(x)), keys)
        return self.dropout_1(self.dense_1(hidden), keys)


class MixerBlock(nn.Module):
    """Eq. 1: a token-mixing and a channel-mixing MLP, each behind a LayerNorm and a skip connection.

    Args:
        tokens, channels, tokens_mlp_dim, channels_mlp_dim: S, C, D_S and D_C.
        gelu, norm_eps, dropout, rescale: see ``Mixer``.
        drop_path: probability to drop a branch of this block in training.
        index: the block's number in its model; blocks with different numbers draw different random masks.
    """

    def __init__(
        self,
        tokens: int,
        channels: int,
        tokens_mlp_dim: int,
        channels_mlp_dim: int,
        *,
        gelu: Gelu = "tanh",
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        rescale: bool = False,
        index: int = 0,
    ) -> None:
        super().__init__()
        counts = {"tokens_mlp_dim": tokens_mlp_dim, "channels_mlp_dim": channels_mlp_dim}
        check_block(gelu, norm_eps, dropout, drop_path, tokens=tokens, channels=channels, **counts)
        stream = 6 * index  # a block has six random masks
        self.norm1 = nn.LayerNorm(channels, eps=norm_eps)
        self.token_mixing = MlpBlock(tokens, tokens_mlp_dim, gelu, dropout, stream + 2)
        self.token_drop_path = DropPath(drop_path, stream, rescale)
        self.norm2 = nn.LayerNorm(channels, eps=norm_eps)
        self.channel_mixing = MlpBlock(channels, channels_mlp_dim, gelu, dropout, stream + 4)
        self.channel_drop_path = DropPath(drop_path, stream + 1, rescale)

    def forward(self, x: Tensor, keys: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, S, C) → (B, S, C).

        ``mask``, (B, S) bool, is true where a token is present. Absent tokens, even NaN, have no effect on present
        ones or on gradients, and their outputs are meaningless. ``keys``: see ``Mixer.tokens``.
        """
        check_tokens(x, self.token_mixing.dense_0.in_features, self.channel_mixing.dense_0.in_features)
        x = zero_absent(x, mask)
        normed = zero_absent(self.norm1(x), mask)
        x = x + self.token_drop_path(self.token_mixing(normed.mT, keys).mT, keys)  # across patches, for each channel
        x = zero_absent(x, mask)
        normed = zero_absent(self.norm2(x), mask)
        return x + self.channel_drop_path(self.channel_mixing(normed, keys), keys)  # across channels, for each patch


def zero_absent(x: Tensor, mask: Tensor | None) -> Tensor:
    """Sets x (B, S, C) to zero where the mask (B, S) is false. Multiplying by the mask would keep NaNs."""
    if mask is None:
        return x
    check_mask(mask, x)
    return torch.where(mask.unsqueeze(-1), x, 0.0)


def mean_pool(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, S, C) → (B, C): the mean over the tokens that are present, by default all.

    Raises:
        UserError: a mask that is not (B, S) bool, or has a row with no token present.
    """
    if mask is None:
        return x.mean(1)
    x = zero_absent(x, mask)
    check_any_present(mask)
    present = mask.sum(1, keepdim=True).to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.full_like(present, x.shape[1]) / present  # exactly 1 if all are; number / tensor is inexact
    return (x.mean(1) * scale).to(x.dtype)


class Mixer(TimmMethods):
    """(B, in_channels, H, W) → (B, num_classes); with ``num_classes=0``, the pre-logits features (B, C).

    Args:
        num_classes: size of the head; 0 leaves it out.
        image_size: height and width in pixels, or one number for both; multiples of the patch size.
        patch_size: height and width in pixels, or one number for both; S = (H / patch height) · (W / patch width).
        num_blocks, hidden_dim, tokens_mlp_dim, channels_mlp_dim: Table 1's number of layers, C, D_S and D_C.
        in_channels: number of channels of the images.
        gelu: "tanh" as in the authors' code, "erf" for weights trained with timm.
        norm_eps: added to the variance in every LayerNorm (1e-5 in lucidrains' port).
        dropout: after each dense layer of an MLP block (0 in every published setting).
        stochastic_depth: probability to drop a branch in training; rises linearly over the blocks from 0 to this.
        rescale: divide the branches that are kept by 1 − p (timm does, the authors' code does not).
        seed: seed of the initial weights; None draws one from torch's generator.

    Raises:
        UserError: a size that is not positive or not a multiple of the patch size, or a rate outside [0, 1).

    The attribute ``metadata`` holds class names and preprocessing, ``config`` these arguments (without the seed).
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
        arguments = {key: value for key, value in locals().items() if key not in ("self", "seed", "__class__")}
        self.config = check_config(arguments)
        self.num_classes, self.in_channels = self.config["num_classes"], self.config["in_channels"]
        self.image_size, self.patch_size = self.config["image_size"], self.config["patch_size"]
        self.grid = (self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1])
        self.metadata = Metadata()

        device = torch.get_default_device()
        with torch.device("meta"):  # PyTorch's default initial weights would only be overwritten
            self.stem = nn.Conv2d(in_channels, hidden_dim, self.patch_size, self.patch_size)
            self.blocks = nn.ModuleList(
                MixerBlock(
                    self.grid[0] * self.grid[1],
                    hidden_dim,
                    tokens_mlp_dim,
                    channels_mlp_dim,
                    gelu=gelu,
                    norm_eps=norm_eps,
                    dropout=dropout,
                    drop_path=stochastic_depth * i / max(num_blocks - 1, 1),
                    rescale=rescale,
                    index=i,
                )
                for i in range(num_blocks)
            )
            self.pre_head_layer_norm = nn.LayerNorm(hidden_dim, eps=norm_eps)
            self.head = nn.Linear(hidden_dim, num_classes) if num_classes else nn.Identity()
        if device.type != "meta":
            self.to_empty(device=device)
            init_weights(self, int(torch.randint(2**62, (), device="cpu")) if seed is None else seed)

    def embed(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) → (B, S, C): the patches' linear embeddings, in row-major order."""
        check_images(images, self.in_channels, self.image_size, self.stem.weight.device)
        return self.stem(images.to(self.stem.weight.dtype)).flatten(2).mT

    def tokens(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """(B, in_channels, H, W) → (B, S, C): the tokens after the last block.

        ``keys``, (B,) int64, select each image's masks of dropout and stochastic depth in training (see
        ``rng.sample_keys``); without them torch's generator draws the masks.
        """
        x = self.embed(images)
        for block in self.blocks:
            x = block(x, keys)
        return x

    def features(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """(B, in_channels, H, W) → (B, C): the pre-logits, the mean over patches of the normalized tokens."""
        return mean_pool(self.pre_head_layer_norm(self.tokens(images, keys)))

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        return self.head(self.features(images, keys))
