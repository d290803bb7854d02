"""The native format: a safetensors file whose header holds everything that is needed to predict.

Header keys: ``format`` ("allmlp"), ``version``, ``config`` (the arguments of ``Mixer``), ``metadata`` (classes,
preprocessing, provenance) and ``sha256`` over all of these and every tensor, so that loading detects a changed byte.
Files of the earlier version, whose format was called "mlp-mixer" and which kept the metadata under ``card``, load too.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from allmlp.errors import RunError, UserError, printable
from allmlp.factory import build_meta
from allmlp.files import replacing
from allmlp.metadata import Metadata, Preprocessing
from allmlp.model import Mixer
from allmlp.sizes import as_pair
from allmlp.weights.containers import Container, require_floats
from allmlp.weights.layouts import compare, expected_shapes, no_mixer

FORMAT, VERSION = "allmlp", "1"
EARLIER_FORMAT = "mlp-mixer"
PREFIX = "allmlp."  # of our header keys in a file of another layout
EARLIER_PREFIX = "mlp_mixer."


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
    names = tuple(classes) if classes is not None else model.metadata.classes
    if names is not None and (isinstance(classes, str) or not all(isinstance(name, str) for name in names)):
        raise UserError(f"classes {names[:5]}: give a list of texts, one name for each logit")
    if names is not None and len(names) != model.config["num_classes"]:
        raise UserError(f"{len(names)} class names for a head of {model.config['num_classes']}: give one for each")
    metadata = dataclasses.replace(model.metadata, classes=names, provenance=model.metadata.provenance | provenance)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write(path, tensors, seal(model.config, metadata, tensors))


def seal(config: dict[str, Any], metadata: Metadata, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The header that says what the tensors are, with the digest of both."""
    header = {
        "format": FORMAT,
        "version": VERSION,
        "config": json.dumps(config),
        "metadata": json.dumps(dataclasses.asdict(metadata)),
    }
    return header | {"sha256": digest(tensors, header)}


def write(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, header)
        except SafetensorError as error:  # which is what it makes of a full disk
            raise RunError(f"{path} cannot be written ({error}): free some space or save elsewhere") from None


def read(container: Container) -> Mixer:
    """The model of a file that ``save`` wrote, as it was saved.

    Raises:
        UserError: another version, a changed byte, or tensors that do not fit the sizes in the header.
    """
    path, header = container.name, container.metadata
    require_floats(container.infos, path)
    if (version := header.get("version", "")).isdigit() and int(version[:9]) > int(VERSION):
        raise UserError(f"{path} has format version {version}, this is {VERSION}: update allmlp (or it is damaged)")
    tensors = verified(container, header)
    config, metadata = parse(header, path)
    expected = expected_shapes(config, len(tensors), path)
    compare(expected, {name: info.shape for name, info in container.infos.items()}, (), {}, path)
    for name, tensor in tensors.items():
        check_finite(tensor, name, path)
    model = build_meta(config)
    model.load_state_dict(tensors, assign=True)
    model.metadata = metadata
    return model


def is_native(header: Mapping[str, str]) -> bool:
    """Whether ``save`` wrote a file with this header, even if a byte of it has changed since."""
    keys = {"config", "metadata", "card", "sha256"}
    return header.get("format") in (FORMAT, EARLIER_FORMAT) or len(keys & header.keys()) > 1


def exported_header(container: Container) -> tuple[dict[str, Any], Metadata] | None:
    """The config and metadata that ``export`` wrote beside tensors in another layout; None in anybody else's file.

    Raises:
        UserError: a changed byte.
    """
    for prefix in (PREFIX, EARLIER_PREFIX):
        header = {k.removeprefix(prefix): text for k, text in container.metadata.items() if k.startswith(prefix)}
        if header:
            if len(container.metadata) != len(header) + 1 or container.metadata.get("format") != "pt":
                raise changed(container)
            verified(container, header)
            return parse(header, container.name)
    return None


def verified(container: Container, header: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors, which safetensors maps and does not copy; a UserError where they or the header were changed."""
    tensors = {name: container.read(name) for name in container.infos}
    if header.get("sha256") != digest(tensors, header):
        raise changed(container)
    return tensors


def changed(container: Container) -> UserError:
    return UserError(
        f"{container.name} was changed or damaged since it was saved (SHA-256 differs): copy or train it again"
    )


def metadata_key(header: Mapping[str, str]) -> str:
    return "card" if header.get("format") == EARLIER_FORMAT else "metadata"


def parse(header: Mapping[str, str], path: str) -> tuple[dict[str, Any], Metadata]:
    """The arguments of ``Mixer`` and the metadata from their JSON; what cannot be such is a UserError."""
    try:
        config, metadata = json.loads(header["config"]), parse_metadata(json.loads(header[metadata_key(header)]))
        config |= {key: as_pair(config[key]) for key in ("image_size", "patch_size")}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise no_mixer(path, error) from None
    return config, metadata


def check_finite(tensor: Tensor, name: str, what: str) -> None:
    if tensor.numel() and not all(math.isfinite(end) for end in torch.aminmax(tensor)):
        raise UserError(
            f"{what}: {printable(name)} holds numbers that are not finite, as a diverged training or a damaged file "
            "leaves them: take an earlier checkpoint, or download it again"
        )


def digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 over the header, and each tensor's name, type, shape and bytes in the order of the names."""
    total = hashlib.sha256()
    for key in ("format", "version", "config", metadata_key(header)):
        total.update(f"{key}={header.get(key)}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def parse_metadata(stored: dict[str, Any]) -> Metadata:
    view: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored["preprocessing"].items()}
    classes = stored["classes"]
    if classes is not None and not all(isinstance(name, str) for name in classes):
        raise TypeError("names of classes that are no text")
    if not isinstance(stored["provenance"], dict):
        raise TypeError("a provenance that is no object")
    return Metadata(
        classes=None if classes is None else tuple(classes),
        preprocessing=Preprocessing(**view),
        provenance=stored["provenance"],
    )
