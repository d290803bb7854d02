"""Writes a model in a chosen format: native, the authors' current ``.npz`` layout, or timm's names in safetensors."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from allmlp.errors import UserError
from allmlp.factory import Model
from allmlp.model import Mixer
from allmlp.weights import timm_systems
from allmlp.weights.layouts import AUTHORS, TIMM, Layout
from allmlp.weights.native import PREFIX, make_header, save, saved_file, write
from allmlp.zoo.model import ZooModel

log = logging.getLogger(__name__)

Format = Literal["native", "npz", "timm"]
ENDINGS = {"native": ".safetensors", "npz": ".npz", "timm": ".safetensors"}


def save_as(model: Model, path: str | Path, to: Format) -> None:
    """Writes every tensor of a model, bit for bit, to a file in another format, atomically.

    Logs a warning that names what the format cannot store.

    Args:
        model: safetensors files hold its ``metadata``, which an ``.npz`` cannot.
        path: ends in ``.safetensors``, or ``.npz`` for the authors' layout; an existing file is replaced.
        to: "native" (like ``save``), "npz" (the authors' current layout) or "timm".

    Raises:
        UserError: another file ending, or a folder that does not exist.
        RunError: the disk is full.
    """
    path = Path(path)
    if path.suffix != ENDINGS[to]:
        raise UserError(f"{path}: the format {to!r} needs a file name that ends in {ENDINGS[to]}: give one")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is not a folder: create it first")
    if to == "native":
        save(model, path)
    elif to == "npz":
        if isinstance(model, ZooModel):
            raise UserError(f"{path}: the authors' .npz layout is a Mixer's, and this is none: give --to timm")
        write_npz(model, path)
    else:
        write_timm(model, path)


def write_npz(model: Mixer, path: Path) -> None:
    warn_of_loss(model, AUTHORS, path)
    arrays = {name: as_array(tensor) for name, tensor in tensors_in_layout(model, AUTHORS).items()}
    with saved_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def write_timm(model: Model, path: Path) -> None:
    """Writes timm's layout; timm ignores the header's config and metadata, by which ``load`` restores the model."""
    if isinstance(model, ZooModel):
        tensors = system_in_timm(model)
    else:
        warn_of_loss(model, TIMM, path)
        tensors = tensors_in_layout(model, TIMM)
    header = make_header(model.config, model.metadata, tensors)
    write(path, tensors, {"format": "pt"} | {PREFIX + key: text for key, text in header.items()})


def tensors_in_layout(model: Mixer, layout: Layout) -> dict[str, Tensor]:
    names = layout.names(model.config["num_blocks"])
    return {
        names[name]: layout.from_native(name, tensor.detach().cpu()).contiguous()
        for name, tensor in model.state_dict().items()
    }


def system_in_timm(model: ZooModel) -> dict[str, Tensor]:
    family = model.config["system"]
    pairs = (timm_systems.from_native(family, name, tensor) for name, tensor in model.state_dict().items())
    return {name: tensor.detach().cpu().contiguous() for name, tensor in pairs}


def as_array(tensor: Tensor) -> np.ndarray:
    """A NumPy array; bfloat16, which NumPy does not have, becomes two-byte voids, as when NumPy saves JAX's arrays."""
    return tensor.view(torch.int16).numpy().view("V2") if tensor.dtype == torch.bfloat16 else tensor.numpy()


def warn_of_loss(model: Mixer, layout: Layout, path: Path) -> None:
    """Logs a warning that lists what this layout does not store, and the remedy."""
    config, lost = model.config, []
    if config["gelu"] != layout.gelu:
        remedy = "act_layer=timm.layers.GELUTanh" if layout is TIMM else "jax.nn.gelu(approximate=False)"
        lost.append(f"the {config['gelu']} GELU ({layout.title} implies {layout.gelu}: {remedy})")
    if config["norm_eps"] != layout.norm_eps:
        lost.append(f"LayerNorm's ε of {config['norm_eps']:g} ({layout.title} implies {layout.norm_eps:g})")
    if layout is AUTHORS:
        if model.grid[0] != model.grid[1]:
            lost.append(f"the shape of the grid (load it again with image_size={model.image_size})")
        if model.metadata.classes:
            lost.append("the class names")
        used, default = model.metadata.preprocessing, layout.preprocessing
        if (used.mean, used.std) != (default.mean, default.std):
            lost.append(f"the normalization with mean {used.mean} and std {used.std}")
        if replace(used, mean=default.mean, std=default.std) != default:
            lost.append(f"the evaluation crop ({used.crop}, ratio {used.crop_ratio:g}, {used.interpolation})")
    if lost:
        problem = "timm does not read" if layout is TIMM else "the file does not contain"
        log.warning("%s: %s %s", path, problem, "; ".join(lost))
