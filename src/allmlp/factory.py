"""Models by name, or from the arguments that a file stores.

Not called ``create.py``: importing a submodule of that name would replace the function ``allmlp.create``.
"""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from allmlp.classifier import require_classifier
from allmlp.errors import UserError, brief
from allmlp.model import Mixer
from allmlp.sizes import Size
from allmlp.variants import VARIANTS, resolve_variant

MAX_WRAPPERS = 4  # around one another


def create(variant: str | None = None, *, num_classes: int = 1000, image_size: Size = 224, **options: Any) -> Mixer:
    """Creates a Mixer with the authors' initial weights: (B, in_channels, H, W) → (B, num_classes).

    Args:
        variant: a name from Table 1 ("B/16"; case does not matter, "Mixer-B/16" is the same). None: custom sizes;
            num_blocks, patch_size, hidden_dim, tokens_mlp_dim and channels_mlp_dim are then required.
        num_classes: 0 leaves out the head: the model then returns features (B, C).
        image_size: height and width in pixels, or one number for both; multiples of the patch size.
        options: any other argument of ``Mixer``; they override the variant's sizes, unless they are None.

    Raises:
        UserError: an unknown variant or option (with the nearest names), or a missing or invalid size.
    """
    sizes: dict[str, Any] = dict(VARIANTS[resolve_variant(variant)]) if variant is not None else {}
    settings = sizes | {key: value for key, value in options.items() if value is not None}
    valid = inspect.signature(Mixer).parameters
    for key in settings:
        if key not in valid:
            near = difflib.get_close_matches(key, sorted(valid), 3)
            raise UserError(f"unknown option {key!r} of a Mixer: the nearest are {', '.join(near or sorted(valid))}")
    missing = [key for key in VARIANTS["B/16"] if key not in settings]
    if missing:
        raise UserError(f"no variant is given and {', '.join(missing)} missing: add them, or a name such as 'B/16'")
    return Mixer(num_classes=num_classes, image_size=image_size, **settings)


def as_mixer(model: object) -> Mixer:
    """The Mixer itself, also of one in wrappers: of ``torch.compile``, DataParallel, DDP, or averaged weights (EMA).

    Raises:
        UserError: it is none, or on the meta device, which holds no weights.
    """
    for _ in range(MAX_WRAPPERS):
        inner = [getattr(model, name, None) for name in ("_orig_mod", "module")]
        model = next((module for module in inner if isinstance(module, torch.nn.Module)), model)
    if not isinstance(model, Mixer):
        raise UserError(f"model {brief(model)}: give a Mixer, such as allmlp.load('model.safetensors')")
    require_classifier(model)
    return model


def build_meta(config: Mapping[str, Any]) -> Mixer:
    """Builds ``Mixer(**config)`` on the meta device: shapes without memory or initial weights.

    ``load_state_dict(tensors, assign=True)`` or ``to_empty(device=…)`` then gives it memory.
    """
    with torch.device("meta"):
        return Mixer(**config)
