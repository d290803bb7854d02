"""A trained Mixer at another image size: Supplement C where it grows by an integer factor, and beyond the paper.

Only token mixing depends on the number of patches. An axis of the grid of patches, m patches long where it was n, is
treated by itself, as a list of parts; a part is a pair of matrices, ``reads`` (n, m), which makes an axis of the old
length of the new one, and ``writes`` (m, n), which takes the answer back:

- m = k · n, Supplement C: k parts, each reads and writes its own run of n patches.
- any other m: one part, the whole axis. It reads it resampled to n patches and writes its answer resampled to m, both
  by a triangle filter as wide as the coarser of the two grids' patches. So W1 and W2 are resampled as functions over
  the image, W1 divided by the density of patches: hidden units respond to what is constant across the image, or
  changes slowly, as they did.

The parts of an image are the products of the two axes' parts, and with R and T the Kronecker products of their matrices

    W1' = [W1 R] stacked over the parts,   b1' = [b1],   W2' = [T W2] side by side,   b2' = the sum of T b2.

So D_S grows by the number of parts: by K² in the paper's case, not at all where the grid is resampled, whose hidden
units see the whole image as before.
"""

import copy
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from allmlp.factory import build_meta
from allmlp.model import Mixer
from allmlp.sizes import Size, as_pair, check_config

ImageDataset = tuple[Tensor, Tensor]  # reads (n, m), writes (m, n), float64


def resize(model: Mixer, image_size: Size) -> Mixer:
    """A new Mixer for images of another size, made of this one's weights; patches keep their size in pixels.

    Twice the size (or any integer factor, also on one axis alone) is Supplement C: the tokens are, exactly, those that
    the model gives for each part of the image by itself. For other sizes, larger, smaller or of another shape, token
    mixing is resampled over the grid of patches (see the module). Either way it wants a short fine-tuning.

    Args:
        model: is left as it is; the new one has its type, device, mode and card.
        image_size: in pixels, one number or (height, width); multiples of the patch size.

    Raises:
        UserError: a size that is not a multiple of the patch size.
    """
    config = resized_config(model.config, image_size)
    old, new = grid(model.config), grid(config)
    rows, columns = axis_parts(old[0], new[0]), axis_parts(old[1], new[1])
    parts = [
        tuple(kron(a, b) for a, b in zip(row, column, strict=True)) for row, column in itertools.product(rows, columns)
    ]
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if old != new:
        for i in range(config["num_blocks"]):
            names = [f"blocks.{i}.token_mixing.dense_{j}.{kind}" for j in (0, 1) for kind in ("weight", "bias")]
            state |= dict(zip(names, resize_mlp(*(state[name] for name in names), parts), strict=True))
    resized = build_meta(config)
    resized.load_state_dict(state, assign=True)
    for parameter, before in zip(resized.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(before.requires_grad)
    resized.metadata = copy.deepcopy(model.metadata)
    if old != new:
        told = resized.metadata.provenance
        scores = {key: told.pop(key) for key in ("val_top1", "test_top1") if key in told}
        if any(score is not None for score in scores.values()):
            told["before_resize"] = {"image_size": list(model.image_size), **scores}
        sizes = told.get("resized_from", [])
        told["resized_from"] = [*sizes, list(model.image_size)]
    return resized.train(model.training)


def resized_config(config: dict[str, Any], image_size: Size) -> dict[str, Any]:
    """The arguments of the Mixer that ``resize`` makes of one with these: image size, and D_S times the parts."""
    resized = check_config(dict(config) | {"image_size": image_size})
    (h, w), (new_h, new_w) = grid(config), grid(resized)
    parts = (new_h // h if new_h % h == 0 else 1) * (new_w // w if new_w % w == 0 else 1)
    return resized | {"tokens_mlp_dim": config["tokens_mlp_dim"] * parts}


def grid(config: dict[str, Any]) -> tuple[int, int]:
    (height, width), (patch_height, patch_width) = as_pair(config["image_size"]), as_pair(config["patch_size"])
    return height // patch_height, width // patch_width


def axis_parts(n: int, m: int) -> list[ImageDataset]:
    """The parts of an axis that has m patches where it had n."""
    if m % n == 0:
        eye = torch.eye(m, dtype=torch.float64, device="cpu")
        return [(eye[k : k + n], eye[:, k : k + n]) for k in range(0, m, n)]
    return [(resampling(m, n), resampling(n, m))]


def kron(a: Tensor, b: Tensor) -> Tensor:
    """torch.kron, which fails on some strides of axes of length one."""
    return (a[:, None, :, None] * b[None, :, None, :]).flatten(2).flatten(0, 1)


def resampling(before: int, after: int) -> Tensor:
    """(after, before): values on one grid from those on another over the same length, rows that sum to one."""
    eye = torch.eye(before, dtype=torch.float64, device="cpu")[:, None, None]  # a batch of unit pulses
    size = (1, after)
    return F.interpolate(eye, size, mode="bilinear", align_corners=False, antialias=True)[:, 0, 0].T


def resize_mlp(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Token mixing's (D_S, S), (D_S,), (S, D_S), (S,) over the new grid; computed in float64, rounded once."""
    where, wide = w1.device, [tensor.double().cpu() for tensor in (w1, b1, w2, b2)]
    resized = (
        torch.cat([wide[0] @ reads for reads, _ in parts]),
        wide[1].repeat(len(parts)),
        torch.cat([writes @ wide[2] for _, writes in parts], dim=1),
        torch.stack([writes @ wide[3] for _, writes in parts]).sum(0),
    )
    return tuple(tensor.to(where, w1.dtype).contiguous() for tensor in resized)
