"""Models by name, or from the arguments that a file stores: Mixers, and the systems that the paper compares them with.

Not called ``create.py``: importing a submodule of that name would replace the function ``allmlp.create``.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from allmlp.classifier import require_classifier
from allmlp.errors import UserError, brief
from allmlp.initial_weights import copy_into
from allmlp.initial_weights import init_weights as init_mixer_weights
from allmlp.model import Mixer
from allmlp.resolution import resized_config as resized_mixer_config
from allmlp.sizes import Size
from allmlp.variants import VARIANTS, variant_of
from allmlp.zoo.configuration import complete, name_of_system
from allmlp.zoo.families import FAMILIES
from allmlp.zoo.model import ZooModel, init_zoo_weights
from allmlp.zoo.systems import SYSTEMS

Model = Mixer | ZooModel
MAX_WRAPPERS = 4  # around one another


def create(
    variant: str | None = None, *, num_classes: int = 1000, image_size: Size | None = None, **options: Any
) -> Model:
    """Creates a model with its authors' initial weights: (B, in_channels, H, W) → (B, num_classes).

    Args:
        variant: a Mixer of Table 1 ("B/16"; case does not matter, "Mixer-B/16" is the same), a comparison system
            ("ViT-B/16", "BiT-R152x4", …; needs timm), or a family of those with sizes of your own ("vit", "bit",
            "halonet", "nfnet", "efficientnet", "botnet"). None: a Mixer with num_blocks, patch_size, hidden_dim,
            tokens_mlp_dim and channels_mlp_dim.
        num_classes: 0 leaves out the head: the model then returns features (B, C).
        image_size: height and width in pixels, or one number for both. None: 224, or that of the comparison system.
        options: any other argument of ``Mixer``, or of ``ZooModel``; they override the sizes of the name, unless they
            are None.

    Raises:
        UserError: an unknown name or option (with the nearest), a missing or invalid size, or timm is missing.
    """
    options = {key: value for key, value in options.items() if value is not None}
    name = resolve_name(variant) if variant is not None else None
    size = 224 if image_size is None else image_size
    if name is not None and name in FAMILIES:
        return ZooModel(system=name, num_classes=num_classes, image_size=size, **options)
    if name is not None and name in SYSTEMS:
        system = SYSTEMS[name]
        settings = dict(system.sizes) | options
        size = system.image_size if image_size is None else image_size
        return ZooModel(system=system.family, num_classes=num_classes, image_size=size, **settings)
    return create_mixer(name, num_classes, size, options)


def create_mixer(variant: str | None, num_classes: int, image_size: Size, options: dict[str, Any]) -> Mixer:
    sizes: dict[str, Any] = dict(VARIANTS[variant]) if variant is not None else {}
    settings = sizes | options
    valid = inspect.signature(Mixer).parameters
    for key in settings:
        if key not in valid:
            if families := [family.key for family in FAMILIES.values() if key in family.sizes]:
                raise UserError(f"{key!r} is no option of a Mixer, but of {', '.join(families)}: name one of these")
            near = difflib.get_close_matches(key, sorted(valid), 3)
            raise UserError(f"unknown option {key!r} of a Mixer: the nearest are {', '.join(near or sorted(valid))}")
    missing = [key for key in VARIANTS["B/16"] if key not in settings]
    if missing:
        raise UserError(f"no variant is given and {', '.join(missing)} missing: add them, or a name such as 'B/16'")
    return Mixer(num_classes=num_classes, image_size=image_size, **settings)


def resolve_name(name: str) -> str:
    """A variant of Table 1, a comparison system or a family as ``create`` spells it, from any case.

    Raises:
        UserError: there is none of this name; the message has the nearest ones.
    """
    if not isinstance(name, str):
        raise UserError(f"model {brief(name)}: give one of {', '.join(VARIANTS)}, or a comparison system")
    known = {simplified(variant): variant for variant in VARIANTS}
    known |= {f"mixer{separator}{key}": variant for key, variant in known.items() for separator in ("", "-")}
    known |= {simplified(system): system for system in SYSTEMS} | {key: key for key in FAMILIES}
    wanted = simplified(name)
    if wanted in known:
        return known[wanted]
    proper = {key: f"Mixer-{value}" if value in VARIANTS else value for key, value in known.items()}
    near = list(dict.fromkeys(proper[key] for key in difflib.get_close_matches(wanted, known, 6, cutoff=0.5)))[:3]
    hint = f"; the nearest: {', '.join(near)}" if near else ""
    raise UserError(f"unknown model {name!r}{hint}; `mixer models` lists all, such as {', '.join(VARIANTS)}")


def simplified(name: str) -> str:
    return re.sub(r"[/_ -]+", "-", name.strip().lower())


def name_of(config: Mapping[str, Any]) -> str | None:
    """The name of a model with this configuration, such as "Mixer-B/16" or "ViT-B/16"; None for other sizes."""
    if is_zoo(config):
        return name_of_system(config)
    variant = variant_of(config)
    return f"Mixer-{variant}" if variant else None


def describe_model(config: Mapping[str, Any]) -> str:
    """The model with its sizes, in a line."""
    name = name_of(config)
    if not is_zoo(config):
        patch = "×".join(map(str, config["patch_size"]))
        sizes = f"{config['num_blocks']} blocks, C {config['hidden_dim']}, patch {patch}"
        return f"{name or 'Mixer'}: {sizes}"
    family = FAMILIES[config["system"]]
    sizes = ", ".join(f"{key} {config[key]}" for key in family.sizes if config[key] is not None)
    return f"{name or family.title}: {sizes}"


def as_model(model: object) -> Model:
    """The model itself, also of one in wrappers: of ``torch.compile``, DataParallel, DDP, or averaged weights (EMA).

    Raises:
        UserError: it is none, or on the meta device, which holds no weights.
    """
    for _ in range(MAX_WRAPPERS):
        inner = [getattr(model, name, None) for name in ("_orig_mod", "module")]
        model = next((module for module in inner if isinstance(module, torch.nn.Module)), model)
    if not isinstance(model, Model):
        raise UserError(f"model {brief(model)}: give a Mixer, such as allmlp.load('model.safetensors')")
    require_classifier(model)
    return model


def is_zoo(config: Mapping[str, Any]) -> bool:
    """Whether this is the configuration of a comparison system; else a Mixer's."""
    return "system" in config


def build_meta(config: Mapping[str, Any]) -> Model:
    """The model of this configuration on the meta device: shapes without memory or initial weights.

    ``load_state_dict(tensors, assign=True)`` or ``to_empty(device=…)`` then gives it memory.
    """
    with torch.device("meta"):
        return ZooModel(**config) if is_zoo(config) else Mixer(**config)


def init_weights(model: Model, seed: int, copy_: Callable[[Tensor, Tensor], None] = copy_into) -> None:
    """Draws the initial weights of a model that was built on the meta device; they are the same on any device.

    Args:
        model: with memory, perhaps sharded.
        seed: seed of the weights.
        copy_: writes a full value into a parameter, which may hold only a shard of it.
    """
    if isinstance(model, ZooModel):
        init_zoo_weights(model, seed, copy_)
    else:
        init_mixer_weights(model, seed, copy_)


def resized_config(config: Mapping[str, Any], image_size: Size) -> dict[str, Any]:
    """The configuration of a model resized to images of another size.

    Raises:
        UserError: a size that the model cannot take.
    """
    if is_zoo(config):
        return complete(config["system"], dict(config) | {"image_size": image_size})
    return resized_mixer_config(dict(config), image_size)
