"""One ``load`` for every Mixer there is: what a file holds is told by its content, and all of it is accounted for."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allmlp.errors import UserError, printable
from allmlp.factory import build_meta
from allmlp.model import Mixer
from allmlp.sizes import Size, as_pair
from allmlp.weights import layouts, native
from allmlp.weights.containers import Container, open_container, require_floats
from allmlp.weights.foreign_metadata import foreign_metadata
from allmlp.weights.hub import PREFIX, Download, download

log = logging.getLogger(__name__)


def load(path: str | Path, *, image_size: Size | None = None, in_channels: int | None = None) -> Mixer:
    """Reads a Mixer from any file that holds one: in evaluation mode, on the CPU, its ``card`` filled.

    Read are our own safetensors; the authors' ``.npz`` in both layouts, bare or inside ``params/`` or ``opt/target/``;
    state dicts in timm's, lucidrains' or our names, as safetensors, ``.pt`` or ``.pth``. Sizes come from the shapes.
    GELU, LayerNorm's ε and preprocessing come from our metadata or the hub's config, else from the layout. Tensors of
    16 bits become float32, unless we saved them so.

    Args:
        path: a file, or "hf-hub:OWNER/NAME", "hf-hub:OWNER/NAME@REVISION" on the Hugging Face hub.
        image_size: that it was trained at, in pixels; needed where the grid of patches is no square.
        in_channels: of the images; needed where a stem that is stored flat (lucidrains') does not tell.

    Raises:
        UserError: no such file, a broken or dangerous one, another architecture's, tensors that are missing,
            unexpected, of another shape or not finite (all are named, with the likely cause), or sizes to be given.
        RunError: the hub cannot be reached and the file is not in its cache.
    """
    origin = download(str(path)) if str(path).startswith(PREFIX) else Download(path=Path(path))
    with open_container(origin.path) as container:
        if native.is_native(container.metadata):
            model = native.read(container)
            check_given(model.config, image_size, in_channels, str(path))
        else:
            model = read_foreign(container, origin, image_size, in_channels)
    if origin.source:
        told = model.metadata.provenance.get("source", {})
        model.metadata.provenance["source"] = (told if isinstance(told, dict) else {"told": told}) | origin.source
    if model.config["num_classes"] and not torch.count_nonzero(model.get_parameter("head.weight")):
        log.warning("%s: its head is all zero: it gives features, but no classes until it is trained", path)
    return model.requires_grad_(True).eval()


def read_foreign(container: Container, origin: Download, image_size: Size | None, in_channels: int | None) -> Mixer:
    """A model from tensors in a known layout; shapes are held to a Mixer's before a tensor is read."""
    what = container.name
    full = unwrap(container.infos, what)
    infos = {name: container.infos[stored] for name, stored in full.items()}
    if left_out := [*container.left_out, *sorted(set(container.infos) - set(full.values()))]:
        log.info("%s: left out, for they are no weights: %s", what, printable(layouts.listed(left_out)))
    found = layouts.recognise(infos)
    if found is None:
        raise UserError(
            f"{what} holds {len(infos)} tensors, but no token mixing of a Mixer (its first names: "
            f"{printable(layouts.listed(sorted(infos), 3)) or 'none'}): another architecture's weights; give a Mixer's"
        )
    require_floats(infos, what)
    layout, num_blocks = found
    if num_blocks > len(infos):
        raise layouts.no_mixer(what, ValueError(f"{num_blocks} blocks in {len(infos)} tensors"))
    names = layout.names(num_blocks)
    stored = {ours: theirs for ours, theirs in names.items() if theirs in infos}
    patch = None
    if layout is layouts.LUCIDRAINS and "stem.weight" in stored:
        patch = layouts.flat_patch(infos[stored["stem.weight"]].shape[-1], in_channels, what)

    def oriented(ours: str, tensor: Tensor) -> Tensor:
        return layout.to_ours(ours, tensor, patch)

    shapes: dict[str, tuple[int, ...]] = {
        ours: tuple(oriented(ours, torch.empty(infos[theirs].shape, device="meta")).shape)
        for ours, theirs in stored.items()
    }
    config, metadata = native.exported_header(container) or (None, None)
    if config is None:
        sizes = layouts.infer(shapes, num_blocks, image_size, what)
        config = sizes | {"gelu": layout.gelu, "norm_eps": layout.norm_eps}
    check_given(config, image_size, in_channels, what)
    unexpected = sorted(set(infos) - set(stored.values()))
    expected = layouts.expected_shapes(config, len(infos), what)
    layouts.compare(expected, shapes, unexpected, names, f"{what} ({layout.title})", layout)
    if config["tokens_mlp_dim"] > config["channels_mlp_dim"]:
        log.warning(
            "%s: D_S = %d is larger than D_C = %d: the two may be swapped, as in lucidrains' port, whose sizes are not "
            "the paper's", what, config["tokens_mlp_dim"], config["channels_mlp_dim"],
        )  # fmt: skip

    wide = torch.float64 if any(info.dtype == torch.float64 for info in infos.values()) else torch.float32
    tensors = {}
    for ours, theirs in stored.items():
        tensor = oriented(ours, container.read(full[theirs]))
        tensors[ours] = tensor.to(tensor.dtype if metadata else wide).contiguous()
        native.check_finite(tensors[ours], theirs, what)
    model = build_meta(config)
    model.load_state_dict(tensors, assign=True)
    model.metadata = metadata or foreign_metadata(container, origin, layout, model)
    return model


def unwrap(names: Iterable[str], what: str) -> dict[str, str]:
    """Name without its wrapping → name in the file; of a training checkpoint, what is not the target is left out.

    flax once counted LayerNorms across a whole model, so their numbers may have gaps: in order, they become 0 and 1.
    """
    names = list(names)
    target = "opt/target/"
    if any(name.startswith(target) for name in names):
        names = [name for name in names if name.startswith(target)]
    full: dict[str, str] = {}
    for stored in names:
        name = stored.removeprefix(target).removeprefix("params/")
        if name in full:
            raise UserError(f"{what} holds {printable(name)!r} twice, with and without params/: save one of them")
        full[name] = stored
    numbers: dict[str, set[int]] = {}
    pattern = re.compile(r"(.*/LayerNorm_)(\d{1,6})(/.*)")
    for match in filter(None, map(pattern.fullmatch, full)):
        numbers.setdefault(match[1], set()).add(int(match[2]))

    def renumbered(match: re.Match[str]) -> str:
        if len(numbers[match[1]]) != 2:  # one is missing: which, its number says
            return match[0]
        return f"{match[1]}{sorted(numbers[match[1]]).index(int(match[2]))}{match[3]}"

    return {pattern.sub(renumbered, name): stored for name, stored in full.items()}


def check_given(config: dict[str, Any], image_size: Size | None, in_channels: int | None, what: str) -> None:
    """What the caller says of a file must be what is in it."""
    if in_channels is not None and in_channels != config["in_channels"]:
        raise UserError(f"{what}: in_channels={in_channels}, but its stem takes {config['in_channels']}: leave it out")
    height, width = config["image_size"]
    if image_size is not None and as_pair(image_size) != (height, width):
        raise UserError(
            f"{what}: image_size={image_size}, but it was trained at {height}×{width} px: load it without image_size, "
            "then resize it (allmlp.resize, mixer resize)"
        )
