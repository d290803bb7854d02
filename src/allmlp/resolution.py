"""Token mixing for another image size: Supplement C if the image grows by an integer factor, resampling otherwise.

Only token mixing depends on the number of patches. Each axis of the grid, from n to m patches, is described by a list
of parts. A part is a pair of matrices: ``to_old`` (n, m) maps values on the new axis to the old one, for W1 to read;
``to_new`` (m, n) maps what W2 writes back to the new axis.

- m = k · n, Supplement C: k parts, one for each run of n patches; the matrices select it.
- any other m: one part, the whole axis. The matrices resample it with a triangle filter as wide as the patches of the
  coarser grid. So W1 and W2 are resampled as functions over the image, and W1 is divided by the density of patches:
  hidden units respond as before to maps that are constant or vary slowly.

The parts of an image are the products of the two axes' parts. With R and T the Kronecker products of their ``to_old``
and ``to_new`` matrices,

    W1' = [W1 R] stacked over the parts,   b1' = [b1],   W2' = [T W2] side by side,   b2' = the sum of T b2.

So D_S is multiplied by the number of parts: by K² in the paper's case, by 1 if the grid is resampled.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from allmlp.sizes import Size, as_pair, check_config

Part = tuple[Tensor, Tensor]  # to_old (n, m), to_new (m, n), float64


def resized_state(config: dict[str, Any], state: Mapping[str, Tensor], image_size: Size) -> dict[str, Tensor]:
    """The parameters that another image size changes, by name; none if the grid of patches stays the same.

    Args:
        config: the Mixer's arguments.
        state: its parameters; not modified.
        image_size: height and width in pixels, or one number for both; multiples of the patch size.
    """
    old, new = patch_grid(config), patch_grid(resized_config(config, image_size))
    if old == new:
        return {}
    rows, columns = axis_parts(old[0], new[0]), axis_parts(old[1], new[1])
    parts = [(kron(r[0], c[0]), kron(r[1], c[1])) for r, c in itertools.product(rows, columns)]
    resized: dict[str, Tensor] = {}
    for i in range(config["num_blocks"]):
        names = [f"blocks.{i}.token_mixing.dense_{j}.{kind}" for j in (0, 1) for kind in ("weight", "bias")]
        w1, b1, w2, b2 = (state[name] for name in names)
        resized |= zip(names, resize_token_mixing(w1, b1, w2, b2, parts), strict=True)
    return resized


def resized_config(config: dict[str, Any], image_size: Size) -> dict[str, Any]:
    """The arguments of the resized Mixer: the new image size, and D_S times the number of parts."""
    resized = check_config(config | {"image_size": image_size})
    (h, w), (new_h, new_w) = patch_grid(config), patch_grid(resized)
    parts = (new_h // h if new_h % h == 0 else 1) * (new_w // w if new_w % w == 0 else 1)
    return resized | {"tokens_mlp_dim": config["tokens_mlp_dim"] * parts}


def patch_grid(config: dict[str, Any]) -> tuple[int, int]:
    """(rows, columns) of patches."""
    (height, width), (patch_height, patch_width) = as_pair(config["image_size"]), as_pair(config["patch_size"])
    return height // patch_height, width // patch_width


def axis_parts(n: int, m: int) -> list[Part]:
    """The parts of an axis that grows or shrinks from n to m patches."""
    if m % n == 0:
        eye = torch.eye(m, dtype=torch.float64, device="cpu")
        return [(eye[k : k + n], eye[:, k : k + n]) for k in range(0, m, n)]
    return [(resampling_matrix(m, n), resampling_matrix(n, m))]


def kron(a: Tensor, b: Tensor) -> Tensor:
    """The Kronecker product; torch.kron fails on some strides of axes of length one."""
    return (a[:, None, :, None] * b[None, :, None, :]).flatten(2).flatten(0, 1)


def resampling_matrix(old: int, new: int) -> Tensor:
    """(new, old): resamples ``old`` values on an axis to ``new`` with a triangle filter; its rows sum to one."""
    impulses = torch.eye(old, dtype=torch.float64, device="cpu")[:, None, None]
    return F.interpolate(impulses, (1, new), mode="bilinear", align_corners=False, antialias=True)[:, 0, 0].T


def resize_token_mixing(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, parts: list[Part]) -> tuple[Tensor, ...]:
    """One block's W1 (D_S, S), b1 (D_S,), W2 (S, D_S), b2 (S,) for the new grid; computed in float64, rounded once."""
    device, dtype = w1.device, w1.dtype
    w1, b1, w2, b2 = (tensor.double().cpu() for tensor in (w1, b1, w2, b2))
    resized = (
        torch.cat([w1 @ to_old for to_old, _ in parts]),
        b1.repeat(len(parts)),
        torch.cat([to_new @ w2 for _, to_new in parts], dim=1),
        torch.stack([to_new @ b2 for _, to_new in parts]).sum(0),
    )
    return tuple(tensor.to(device, dtype).contiguous() for tensor in resized)
