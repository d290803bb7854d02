"""The native format: a safetensors file whose header holds everything that is needed to predict.

Header keys: ``format`` ("allmlp"), ``version``, ``config`` (the arguments of ``Mixer`` or ``ZooModel``), ``metadata``
(classes, preprocessing, provenance) and ``sha256`` over all of these and every tensor, so that loading detects a
changed byte.
Files of the earlier version can be loaded too: their format is "mlp-mixer", and their metadata's key is ``card``.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from allmlp.errors import RunError, UserError, brief, printable, reason, remedy
from allmlp.factory import Model, as_model, build_meta
from allmlp.files import as_path, atomic_write, to_json
from allmlp.metadata import Metadata, Preprocessing
from allmlp.sizes import as_pair
from allmlp.weights.containers import Container, require_floats
from allmlp.weights.layouts import check_shapes, expected_shapes, not_a_mixer

FORMAT, VERSION = "allmlp", "1"
EARLIER_FORMAT = "mlp-mixer"
PAIRS = ("image_size", "patch_size")  # (height, width) in the configuration of a Mixer
PREFIX = "allmlp."  # marks these keys in the header of a file in timm's layout
EARLIER_PREFIX = "mlp_mixer."


def save(model: Model, path: str | Path, classes: Sequence[str] | None = None, **provenance: Any) -> None:
    """Writes a model's weights and metadata to a file in the native format, atomically.

    Args:
        model: a Mixer or comparison system with its ``metadata``.
        path: a file name ending in ``.safetensors``; an existing file is replaced.
        classes: class names in the order of the logits; by default the metadata's.
        provenance: JSON values on where the weights come from, added to the metadata's.

    Raises:
        UserError: a wrong number of classes, weights that are not finite, provenance that is not JSON, another file
            ending, or a folder that does not exist.
        RunError: the disk is full.
    """
    model, path = as_model(model), as_path("path", path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: weights are saved as .safetensors: give a file name with that ending")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is not a folder: create it first")
    listed = classes is None or (isinstance(classes, Iterable) and not isinstance(classes, str))
    names = model.metadata.classes if classes is None else tuple(classes) if listed else ()
    if not listed or not all(isinstance(name, str) for name in names or ()):
        raise UserError(f"classes = {brief(classes)}: give a list of strings, one name for each logit")
    if names is not None and len(names) != model.num_classes:
        raise UserError(f"{len(names)} class names for a head of {model.num_classes}: give one for each")
    for name, tensor in model.state_dict().items():
        if getattr(tensor, "device_mesh", None) is not None:
            raise UserError("the weights are sharded (FSDP2): copy their full_tensor() into a whole model first")
        check_finite(tensor, name, "the model")
    metadata = dataclasses.replace(model.metadata, classes=names, provenance=model.metadata.provenance | provenance)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write(path, tensors, make_header(model.config, metadata, tensors))


def make_header(config: dict[str, Any], metadata: Metadata, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The header of a native file, with the SHA-256 of header and tensors."""
    header = {
        "format": FORMAT,
        "version": VERSION,
        "config": json.dumps(config),
        "metadata": to_json(dataclasses.asdict(metadata)),
    }
    return header | {"sha256": digest(tensors, header)}


def write(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Writes a safetensors file atomically; a RunError if it cannot be written."""
    by_storage = {tensor.untyped_storage().data_ptr(): name for name, tensor in tensors.items()}
    last = set(by_storage.values())  # others share their memory with one of these, which the format does not allow
    tensors = {name: tensor if name in last else tensor.clone() for name, tensor in tensors.items()}
    with saved_file(path) as temporary:
        save_file(tensors, temporary, header)


@contextlib.contextmanager
def saved_file(path: Path) -> Iterator[Path]:
    """``atomic_write`` whose failure (a full disk, a folder that cannot be written) is a RunError with a remedy."""
    try:
        with atomic_write(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        number = re.search(r"os error (\d+)", str(error))  # safetensors raises no OSError
        cause = OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))
        cause = error if isinstance(error, OSError) else cause
        raise RunError(f"{path} cannot be written ({reason(cause)}): {remedy(cause, 'save elsewhere')}") from None


def read(container: Container) -> Model:
    """The model in a file that ``save`` wrote.

    Raises:
        UserError: a newer format version, a changed byte, or tensors that do not match the config in the header.
    """
    path, header = container.name, container.metadata
    require_floats(container.infos, path)
    if (version := header.get("version", "")).isdigit() and int(version[:9]) > int(VERSION):
        raise UserError(
            f"{path} has format version {version}, this version reads {VERSION}: update allmlp (or the file is damaged)"
        )
    tensors = verified(container, header)
    config, metadata = parse(header, path)
    expected = expected_shapes(config, len(tensors), path)
    check_shapes(expected, {name: info.shape for name, info in container.infos.items()}, (), {}, path)
    for name, tensor in tensors.items():
        check_finite(tensor, name, path)
    model = build_meta(config)
    model.load_state_dict(tensors, assign=True)
    model.metadata = metadata
    return model


def is_native(header: Mapping[str, str]) -> bool:
    """Whether this is the header of a file that ``save`` wrote, even if one of its bytes has changed since."""
    keys = {"config", "metadata", "card", "sha256"}
    return header.get("format") in (FORMAT, EARLIER_FORMAT) or len(keys & header.keys()) > 1


def embedded_header(container: Container) -> tuple[dict[str, Any], Metadata] | None:
    """The config and metadata that ``convert.write_timm`` stores in the header; None in files that others wrote.

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
    """The tensors, mapped from the file without copying; raises a UserError if the SHA-256 does not match."""
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
    """The model's configuration and the metadata; a UserError if the header's JSON is not valid."""
    try:
        config, metadata = json.loads(header["config"]), parse_metadata(json.loads(header[metadata_key(header)]))
        config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
        config |= {key: as_pair(config[key]) for key in (PAIRS if "system" not in config else PAIRS[:1])}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise not_a_mixer(path, error) from None
    return config, metadata


def check_finite(tensor: Tensor, name: str, path: str) -> None:
    if tensor.numel() and not all(math.isfinite(bound) for bound in torch.aminmax(tensor)):
        raise UserError(
            f"{path}: {printable(name)} contains numbers that are not finite, from a diverged training or a damaged "
            "file: take an earlier checkpoint, or download it again"
        )


def digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 over the header, then each tensor's name, type, shape and bytes, in the order of their names."""
    sha256 = hashlib.sha256()
    for key in ("format", "version", "config", metadata_key(header)):
        sha256.update(f"{key}={header.get(key)}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def parse_metadata(stored: dict[str, Any]) -> Metadata:
    preprocessing: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in stored["preprocessing"].items()
    }
    classes = stored["classes"]
    if classes is not None and not all(isinstance(name, str) for name in classes):
        raise TypeError("class names that are not strings")
    if not isinstance(stored["provenance"], dict):
        raise TypeError("a provenance that is not an object")
    return Metadata(
        classes=None if classes is None else tuple(classes),
        preprocessing=Preprocessing(**preprocessing),
        provenance=stored["provenance"],
    )
