"""A model as a file that others read: the authors' current ``.npz`` layout, or timm's names in safetensors."""

import logging
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from allmlp.errors import RunError, UserError
from allmlp.files import replacing
from allmlp.model import Mixer
from allmlp.weights.layouts import AUTHORS, TIMM, Layout
from allmlp.weights.native import PREFIX, save, seal, write

log = logging.getLogger(__name__)

Format = Literal["own", "npz", "timm"]
ENDINGS = {"own": ".safetensors", "npz": ".npz", "timm": ".safetensors"}


def export(model: Mixer, path: str | Path, to: Format) -> None:
    """Writes every tensor of the model, bit for bit, in another's layout; the file is there whole or not at all.

    Args:
        model: with its card, which a safetensors file takes along and an ``.npz`` has no place for.
        path: ends in ``.safetensors``, or ``.npz`` for the authors' layout; an existing file is replaced.
        to: "own" (as ``save``), "npz" (the authors' current layout) or "timm".

    Raises:
        UserError: another ending, or a folder that is not there.
        RunError: the disk is full.
    """
    path = Path(path)
    if path.suffix != ENDINGS[to]:
        raise UserError(f"{path}: the format {to!r} is written to a file that ends in {ENDINGS[to]}: name it so")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder: make it first")
    if to == "own":
        save(model, path)
    elif to == "npz":
        write_npz(model, path)
    else:
        write_timm(model, path)


def write_npz(model: Mixer, path: Path) -> None:
    warn_of_losses(model, AUTHORS, path)
    arrays = {name: as_array(tensor) for name, tensor in in_layout(model, AUTHORS).items()}
    with replacing(path) as temporary:
        try:
            with temporary.open("wb") as file:
                np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
        except OSError as error:
            raise RunError(f"{path} cannot be written ({error.strerror}): free some space or save elsewhere") from None


def write_timm(model: Mixer, path: Path) -> None:
    """timm reads the tensors alone; the metadata beside them lets ``load`` give back the very model."""
    warn_of_losses(model, TIMM, path)
    tensors = in_layout(model, TIMM)
    sealed = seal(model.config, model.metadata, tensors)
    write(path, tensors, {"format": "pt"} | {PREFIX + key: text for key, text in sealed.items()})


def in_layout(model: Mixer, layout: Layout) -> dict[str, Tensor]:
    names = layout.names(model.config["num_blocks"])
    return {
        names[ours]: layout.to_theirs(ours, tensor.detach().cpu()).contiguous()
        for ours, tensor in model.state_dict().items()
    }


def as_array(tensor: Tensor) -> np.ndarray:
    """NumPy has no bfloat16: those are stored as two-byte voids, as JAX's are when NumPy saves them."""
    return tensor.view(torch.int16).numpy().view("V2") if tensor.dtype == torch.bfloat16 else tensor.numpy()


def warn_of_losses(model: Mixer, layout: Layout, path: Path) -> None:
    """What a reader of this layout has to be told, because the tensors do not say it."""
    config, lost = model.config, []
    if config["gelu"] != layout.gelu:
        remedy = "act_layer=timm.layers.GELUTanh" if layout is TIMM else "jax.nn.gelu(approximate=False)"
        lost.append(f"the {config['gelu']} GELU ({layout.title} means {layout.gelu}: {remedy})")
    if config["norm_eps"] != layout.norm_eps:
        lost.append(f"LayerNorm's ε of {config['norm_eps']:g} ({layout.title} means {layout.norm_eps:g})")
    if layout is AUTHORS:
        if model.grid[0] != model.grid[1]:
            lost.append(f"the shape of the grid: load it again with image_size={model.image_size}")
        if model.metadata.classes:
            lost.append("the names of the classes")
        view, usual = model.metadata.preprocessing, layout.preprocessing
        if (view.mean, view.std) != (usual.mean, usual.std):
            lost.append(f"the normalisation with mean {view.mean} and std {view.std}")
        if (view.crop, view.crop_ratio, view.interpolation) != (usual.crop, usual.crop_ratio, usual.interpolation):
            lost.append(f"the evaluation view ({view.crop} crop, ratio {view.crop_ratio:g}, {view.interpolation})")
    if lost:
        reader = "timm does not know" if layout is TIMM else "the file does not hold"
        log.warning("%s: %s %s", path, reader, "; ".join(lost))
