"""Our own format: a safetensors file whose metadata holds everything that is needed to predict.

Metadata keys: ``format`` ("mlp-mixer"), ``version``, ``config`` (the arguments of ``Mixer``), ``card`` (classes,
preprocessing, provenance) and ``sha256``, over both and every tensor, so that a changed byte is found on loading.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mlp_mixer.card import Card, Preprocessing
from mlp_mixer.errors import RunError, UserError
from mlp_mixer.files import replacing
from mlp_mixer.model import Mixer

VERSION = "1"


def save(model: Mixer, path: str | Path, classes: Sequence[str] | None = None, **provenance: Any) -> None:
    """Writes weights and everything needed to predict with them; the file is there whole or not at all.

    Args:
        model: its ``card`` is stored along.
        path: a name ending in ``.safetensors``; an existing file is replaced.
        classes: class names in the order of the logits; by default the card's.
        provenance: more about where the weights come from (JSON values), added to the card's.

    Raises:
        UserError: as many classes as the head does not have, another ending, or a folder that is not there.
        RunError: the disk is full.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: weights are saved as .safetensors; name the file so")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder: make it first")
    names = tuple(classes) if classes is not None else model.card.classes
    if names is not None and len(names) != model.config["num_classes"]:
        raise UserError(f"{len(names)} class names for a head of {model.config['num_classes']}: give one for each")
    card = dataclasses.replace(model.card, classes=names, provenance=model.card.provenance | provenance)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {
        "format": "mlp-mixer",
        "version": VERSION,
        "config": json.dumps(model.config),
        "card": json.dumps(dataclasses.asdict(card)),
    }
    metadata["sha256"] = digest(tensors, metadata)
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # which is what it makes of a full disk
            raise RunError(f"{path} cannot be written ({error}): free some space or save elsewhere") from None


def load(path: str | Path) -> Mixer:
    """Reads a model that ``save`` wrote: in evaluation mode, on the CPU, as it was saved, its ``card`` filled.

    Raises:
        UserError: no such file, not a safetensors file, not one of ours, tensors that do not fit, or a changed byte.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a weights file" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}: give the .safetensors file that `mixer train` or mlp_mixer.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a sound safetensors file ({reason}): copy or train it again") from None
    if metadata.get("format") != "mlp-mixer":
        raise UserError(f"{path} holds tensors but was not written by mlp_mixer.save: only its files are read so far")
    if metadata.get("version") != VERSION:
        raise UserError(f"{path} has format version {metadata.get('version')!r}, this is {VERSION}: update mlp-mixer")
    if metadata.get("sha256") != digest(tensors, metadata):
        raise UserError(f"{path} was changed or damaged since it was saved (SHA-256 differs): copy or train it again")
    try:
        with torch.device("meta"):
            model = Mixer(**json.loads(metadata["config"]))
        model.load_state_dict(tensors, assign=True)
        model.card = parse_card(json.loads(metadata["card"]))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} does not hold what its metadata says ({reason}): save it again") from None
    return model.requires_grad_(True).eval()


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over the metadata, and each tensor's name, type, shape and bytes in the order of the names."""
    total = hashlib.sha256()
    for key in ("format", "version", "config", "card"):
        total.update(f"{key}={metadata.get(key)}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def parse_card(stored: dict[str, Any]) -> Card:
    view: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored["preprocessing"].items()}
    classes = stored["classes"]
    return Card(
        classes=None if classes is None else tuple(classes),
        preprocessing=Preprocessing(**view),
        provenance=stored["provenance"],
    )
