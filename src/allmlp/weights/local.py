"""Weights on disk: a file, or the folder of a run or of a copied repository; with timm's config.json beside it."""

import json
import logging
from pathlib import Path
from typing import Any

from allmlp.errors import UserError, printable
from allmlp.weights.hub import WEIGHTS_NAMES

log = logging.getLogger(__name__)

CONFIG_KEYS = {"pretrained_cfg", "label_names", "model_args"}  # of timm's config.json; other programs' have neither


def find_weights(path: Path) -> Path:
    """The weights file at a path: the path itself, or the weights in a folder.

    Raises:
        UserError: a folder without weights.
    """
    if not path.is_dir():
        return path
    folder = path
    found = next((folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()), None)
    if found is not None:
        return found
    name = printable(str(folder))
    if (folder / "recipe.json").is_file():
        last = folder / "checkpoints" / "last.safetensors"
        so_far = f", or give its weights so far, {printable(str(last))}" if last.is_file() else ""
        raise UserError(f"{name} is a run that is not finished: resume it (mixer train --resume {name}){so_far}")
    raise UserError(f"{name} is a folder with neither {' nor '.join(WEIGHTS_NAMES)}: name the weights file in it")


def read_config(path: Path) -> dict[str, Any]:
    """timm's config.json; empty if there is none, or another program's."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s cannot be read (%s): it is not used", printable(str(path)), error)
        return {}
    if not isinstance(config, dict) or not CONFIG_KEYS & config.keys():
        return {}
    log.info("%s: its class names and preprocessing are used", printable(str(path)))
    return config
