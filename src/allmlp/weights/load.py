"""``load`` for any weights: the format is recognized by content, and every tensor must be accounted for."""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allmlp.errors import UserError, printable
from allmlp.factory import Model, build_meta
from allmlp.files import as_path
from allmlp.sizes import Size, as_pair
from allmlp.weights import layouts, native, timm_systems
from allmlp.weights.containers import Container, TensorInfo, open_container, require_floats
from allmlp.weights.foreign_metadata import foreign_metadata, input_size, system_metadata
from allmlp.weights.hub import HUB_PREFIX, WeightsFile, download
from allmlp.weights.local import find_weights, read_config
from allmlp.weights.named import resolve_weights
from allmlp.weights.prefixes import without_prefix
from allmlp.zoo.families import FAMILIES
from allmlp.zoo.model import ZooModel

log = logging.getLogger(__name__)


def load(path: str | Path, *, image_size: Size | None = None, in_channels: int | None = None) -> Model:
    """Reads a model from a weights file: in evaluation mode, on the CPU, with its ``metadata``.

    It reads native safetensors; the authors' ``.npz`` in both layouts, bare or below ``params/`` or ``opt/target/``;
    state dicts with timm's, lucidrains', mmpretrain's or native names, below any one prefix, alone or in a training
    checkpoint, as safetensors, ``.pt`` or ``.pth``. Of the comparison systems, native files and timm's ViT, BiT (ResNet
    v2), NFNet and EfficientNet. A folder stands for the weights in it: of a run, or copied from the
    hub. Sizes come from the shapes. GELU, LayerNorm's ε and preprocessing come from native metadata, or timm's
    config.json on the hub or beside the file, else they are the layout's defaults. Tensors of 16 bits become float32,
    except in files that this package saved.

    Args:
        path: a file, a folder with weights, the name of published weights ("mixer-b16-in21k": ``mixer models`` lists
            them), or "hf-hub:OWNER/NAME", "hf-hub:OWNER/NAME@REVISION" on the Hugging Face hub.
        image_size: size that the weights were trained at, in pixels; needed if the grid of patches is not square, and
            where a convolutional network's file does not say it.
        in_channels: number of channels of the images; needed if a flat stem (lucidrains') leaves it ambiguous.

    Raises:
        UserError: the file is missing, damaged, dangerous or another architecture's; tensors are missing, unexpected,
            of another shape or not finite (the message names them and the likely cause); a size must be given.
        RunError: the hub cannot be reached and the file is not in its cache.
    """
    path = resolve_weights(os.fspath(path)) if isinstance(path, str | os.PathLike) else path
    given = as_path("path", path)
    file = download(path) if path.startswith(HUB_PREFIX) else WeightsFile(path=find_weights(given))
    with open_container(file.path) as container:
        if native.is_native(container.metadata):
            model = native.read(container)
            check_arguments(model.config, image_size, in_channels, str(path))
        else:
            if not file.source:
                file = replace(file, config=read_config(file.path.parent / "config.json"))
            model = read_foreign(container, file, image_size, in_channels)
    if file.source:
        saved = model.metadata.provenance.get("source", {})
        model.metadata.provenance["source"] = (
            saved if isinstance(saved, dict) else {"description": saved}
        ) | file.source
    if model.num_classes and not torch.count_nonzero(model.get_parameter("head.weight")):
        log.warning("%s: its head is all zero: it gives features, but no classes until it is trained", path)
    return model.requires_grad_(True).eval()


def read_foreign(container: Container, file: WeightsFile, image_size: Size | None, in_channels: int | None) -> Model:
    """A model from tensors in one of the layouts; all shapes are checked before a tensor is read."""
    file_name = container.name
    unwrapped = unwrap(container.infos, file_name)
    stored_names = {name: unwrapped[inner] for name, inner in without_prefix(unwrapped, file_name).items()}
    infos = {name: container.infos[stored] for name, stored in stored_names.items()}
    if ignored := [*container.ignored, *sorted(set(container.infos) - set(stored_names.values()))]:
        log.info("%s: ignored, not weights of the model: %s", file_name, printable(layouts.shortened(ignored)))
    detected = layouts.detect_layout(infos)
    if detected is None and (family := timm_systems.detect_family(shapes_of(infos))):
        return read_system(container, file, family, stored_names, image_size)
    if detected is None:
        raise UserError(
            f"{file_name} holds {len(infos)} tensors, but no token mixing of a Mixer, below no prefix either (its "
            f"first names: {printable(layouts.shortened(sorted(infos), 3)) or 'none'}): probably another "
            "architecture's weights; give a Mixer's, or timm's of ViT, BiT, NFNet or (TensorFlow's) EfficientNet"
        )
    require_floats(infos, file_name)
    layout, num_blocks = detected
    if num_blocks > len(infos):
        raise layouts.not_a_mixer(file_name, ValueError(f"{num_blocks} blocks in {len(infos)} tensors"))
    names = layout.names(num_blocks)
    present = {name: layout_name for name, layout_name in names.items() if layout_name in infos}
    patch = None
    if layout is layouts.LUCIDRAINS and "stem.weight" in present:
        patch = layouts.infer_flat_patch(infos[present["stem.weight"]].shape[-1], in_channels, file_name)
    shapes: dict[str, tuple[int, ...]] = {
        name: tuple(layout.to_native(name, torch.empty(infos[layout_name].shape, device="meta"), patch).shape)
        for name, layout_name in present.items()
    }
    config, metadata = native.embedded_header(container) or (None, None)
    if config is None:
        sizes = layouts.infer_config(shapes, num_blocks, image_size, file_name)
        config = sizes | {"gelu": layout.gelu, "norm_eps": layout.norm_eps}
    check_arguments(config, image_size, in_channels, file_name)
    unexpected = sorted(set(infos) - set(present.values()))
    expected = layouts.expected_shapes(config, len(infos), file_name)
    layouts.check_shapes(expected, shapes, unexpected, names, f"{file_name} ({layout.title})", layout)
    if config["tokens_mlp_dim"] > config["channels_mlp_dim"]:
        log.warning(
            "%s: D_S = %d is larger than D_C = %d: the two may be swapped, as in lucidrains' port, whose sizes are not "
            "the paper's", file_name, config["tokens_mlp_dim"], config["channels_mlp_dim"],
        )  # fmt: skip

    dtype = torch.float64 if any(info.dtype == torch.float64 for info in infos.values()) else torch.float32
    tensors: dict[str, Tensor] = {}
    for name, layout_name in present.items():
        tensor = layout.to_native(name, container.read(stored_names[layout_name]), patch)
        tensors[name] = tensor.to(tensor.dtype if metadata else dtype).contiguous()
        native.check_finite(tensors[name], layout_name, file_name)
    model = build_meta(config)
    model.load_state_dict(tensors, assign=True)
    model.metadata = metadata or foreign_metadata(container, file, layout, model)
    return model


def read_system(
    container: Container, file: WeightsFile, family: str, stored_names: Mapping[str, str], image_size: Size | None
) -> ZooModel:
    """A comparison system from tensors with timm's names; all shapes are checked before a tensor is read."""
    infos = {
        name: container.infos[stored]
        for name, stored in stored_names.items()
        if not name.endswith(timm_systems.COUNTER)
    }
    require_floats(infos, container.name)
    published_size = input_size(file.config)
    config, metadata = native.embedded_header(container) or (None, None)
    if config is None:
        size = image_size or published_size
        config = timm_systems.infer_system(family, shapes_of(infos), size, file.config, container.name)
    check_arguments(config, image_size, None, container.name)
    names = timm_systems.native_names(family, shapes_of(infos))
    expected = layouts.expected_shapes(config, len(infos), container.name)
    shapes = {ours: timm_systems.native_shape(ours, infos[theirs].shape) for theirs, ours in names.items()}
    stored = {ours: timm_systems.timm_name(family, ours) for ours in (*expected, *shapes)}
    title = FAMILIES[family].title
    layouts.check_shapes(expected, shapes, (), stored, f"{container.name} (timm's layout)", kind=title)
    tensors: dict[str, Tensor] = {}
    for theirs, ours in names.items():
        tensor = timm_systems.to_native(ours, container.read(stored_names[theirs]))
        tensors[ours] = tensor.to(tensor.dtype if metadata else torch.float32).contiguous()
        native.check_finite(tensors[ours], theirs, container.name)
    model = build_meta(config)
    assert isinstance(model, ZooModel)
    model.load_state_dict(tensors, assign=True)
    model.metadata = metadata or system_metadata(container, file, family, model)
    return model


def shapes_of(infos: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(info.shape) for name, info in infos.items()}


def unwrap(names: Iterable[str], file_name: str) -> dict[str, str]:
    """Names without ``opt/target/`` and ``params/`` → names in the file; a training checkpoint's other arrays are left
    out.

    Older flax versions numbered LayerNorms across the whole model, with gaps: each block's two become 0 and 1.
    """
    names = list(names)
    target = "opt/target/"
    if any(name.startswith(target) for name in names):
        names = [name for name in names if name.startswith(target)]
    stored_names: dict[str, str] = {}
    for stored in names:
        name = stored.removeprefix(target).removeprefix("params/")
        if name in stored_names:
            raise UserError(f"{file_name} holds {printable(name)!r} twice, with and without params/: save one of them")
        stored_names[name] = stored
    numbers: dict[str, set[int]] = {}
    pattern = re.compile(r"(.*/LayerNorm_)(\d{1,6})(/.*)")
    for match in filter(None, map(pattern.fullmatch, stored_names)):
        numbers.setdefault(match[1], set()).add(int(match[2]))

    def renumbered(match: re.Match[str]) -> str:
        if len(numbers[match[1]]) != 2:  # one is missing; the other keeps its number
            return match[0]
        return f"{match[1]}{sorted(numbers[match[1]]).index(int(match[2]))}{match[3]}"

    return {pattern.sub(renumbered, name): stored for name, stored in stored_names.items()}


def check_arguments(config: dict[str, Any], image_size: Size | None, in_channels: int | None, file_name: str) -> None:
    """Raises a UserError if an argument of ``load`` contradicts the file."""
    if in_channels is not None and in_channels != config["in_channels"]:
        raise UserError(
            f"{file_name}: in_channels={in_channels}, but its stem takes {config['in_channels']}: leave it out"
        )
    height, width = config["image_size"]
    if image_size is not None and as_pair(image_size) != (height, width):
        raise UserError(
            f"{file_name}: image_size={image_size}, but it was trained at {height}×{width} px: load it without "
            "image_size, then resize it (allmlp.resize, mixer resize)"
        )
