"""Going on with a run: the same recipe, the same data, from the newest sound checkpoint."""

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.checkpointing.manager import newest, set_aside, tidy
from allmlp.config.limits import flag
from allmlp.config.recipe import Recipe
from allmlp.config.serialize import from_json, to_json_object
from allmlp.data.dataset import DatasetSplits
from allmlp.errors import UserError
from allmlp.files import to_json, write_text
from allmlp.training.state import Checkpoint

log = logging.getLogger(__name__)

# What may differ when a run is gone on with: where and how it is computed and watched, not what
FREE = {
    "data": ("data", "workers", "max_unreadable_fraction"),
    "optimization": ("micro_batch_size", "recompute"),
    "run": (
        "device",
        "log_every_steps",
        "save_every_steps",
        "save_every_minutes",
        "save_in_background",
        "keep_checkpoints",
        "shard",
        "timeout_seconds",
        "wandb",
    ),
}


def claim(recipe: Recipe, out: Path, trusted: bool) -> Checkpoint | None:
    """Holds the folder to the recipe, and finds where to go on in it; None: at the start. No run is changed.

    Raises:
        UserError: the folder holds something else, or checkpoints that are not this user's own.
        RunError: none of its checkpoints is sound.
    """
    hold(recipe, out)
    tidy(out / "checkpoints")
    found = newest(out / "checkpoints", trusted)
    return None if found is None else Checkpoint(*found)


def take(recipe: Recipe, out: Path, start: Checkpoint | None) -> None:
    """Makes the folder the recipe's, once nothing speaks against it."""
    write_text(out / "recipe.json", to_json(to_json_object(recipe), indent=2) + "\n")
    (out / "checkpoints").mkdir(exist_ok=True)
    if start is not None:
        set_aside(out / "checkpoints", start.state["step"])


def finished(recipe: Recipe, out: Path) -> dict[str, Any] | None:
    """The summary of the run in the folder, where it is complete to its report; None for any other.

    Raises:
        UserError: the folder holds something else.
    """
    if not (out / "summary.json").is_file() or not (out / "report.html").is_file():
        return None
    hold(recipe, out)
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))


finished_summary = finished


def hold(recipe: Recipe, out: Path) -> None:
    """A UserError where the folder holds a run of another recipe, of which the fields are named, or no run."""
    path = out / "recipe.json"
    others = [e for e in out.iterdir() if not e.name.startswith(".")]  # not the lock, nor half a recipe
    if [e.name for e in others] == ["checkpoints"] and others[0].is_dir() and not any(others[0].iterdir()):
        others = []
    if (out / "transfer.json").exists() or (others and not path.is_file()):
        raise UserError(f"{out} exists and holds no run to go on with: name another folder with --out")
    if path.is_file():
        before, now = (to_json_object(fixed(r)) for r in (from_json(path), recipe))
        changed = [flag(f) for section in ("model", *FREE) for f, v in before[section].items() if v != now[section][f]]
        if changed:
            raise UserError(
                f"{out} is a run with another {', '.join(changed)}: repeat its options (they are in {path}), or start "
                "a new run with another --out"
            )


def fixed(recipe: Recipe) -> Recipe:
    """The recipe without what may differ, and without its name, which is no more than a name."""
    plain = Recipe()
    sections = {
        section: replace(getattr(recipe, section), **{name: getattr(getattr(plain, section), name) for name in names})
        for section, names in FREE.items()
    }
    return replace(recipe, name=plain.name, **sections)


def fingerprint(source: DatasetSplits) -> dict[str, Any]:
    """Of which images are trained on and validated with, in which order, under which labels."""
    told = {}
    for name in ("train", "val"):
        if (part := source.splits.get(name)) is not None:
            names = hashlib.sha256("\0".join(part.names).encode(errors="surrogateescape"))
            names.update(np.ascontiguousarray(part.labels, dtype="<i8").tobytes())
            told[name] = {"count": len(part), "sha256": names.hexdigest()}
    return told


def check_same(state: dict[str, Any], source: DatasetSplits, precision: str, where: Path) -> None:
    """Holds a checkpoint to what the run has been given to go on with.

    Raises:
        UserError: other images or classes.
    """
    before, now = state["images"], fingerprint(source)
    if tuple(state["classes"]) != source.classes:
        raise UserError(f"{where} was trained on the classes {', '.join(state['classes'][:10])}: the data has others")
    for part, what in (("train", "training"), ("val", "validation")):
        if before.get(part) != now.get(part):
            then, here = (told.get(part, {"count": 0})["count"] for told in (before, now))
            counts = f"{then:,} {what} images then, {here:,} now"
            raise UserError(f"the data is not that of {where} ({counts}, or others): restore it, or start a new run")
    if state["precision"] != precision:
        log.warning("the run was in %s until here and goes on in %s (--precision)", state["precision"], precision)
