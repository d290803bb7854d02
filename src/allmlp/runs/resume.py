"""Resuming a run: with the same recipe and the same data, from the newest intact checkpoint."""

import contextlib
import datetime
import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from allmlp.checkpointing.checkpoint import DamagedCheckpoint, read_manifest
from allmlp.checkpointing.manager import checkpoints_by_step, clean_up, newest_intact, set_aside_damaged
from allmlp.config.limits import flag
from allmlp.config.recipe import Recipe
from allmlp.config.serialize import from_json, to_json_object
from allmlp.data.dataset import DatasetSplits
from allmlp.data.names import joined
from allmlp.errors import UserError
from allmlp.files import to_json, write_text

log = logging.getLogger(__name__)

# Fields that may differ when a run is resumed: they say where and how it is computed and logged, not what
FREE_FIELDS = {
    "data": ("data", "workers", "max_unreadable_fraction"),
    "optimization": ("micro_batch_size", "recompute"),
    "run": (
        "device",
        "fewshot",
        "fewshot_shots",
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


class Checkpoint(NamedTuple):
    """A verified checkpoint: its folder, and the state that is not tensors."""

    folder: Path
    state: dict[str, Any]


def find_checkpoint(recipe: Recipe, out: Path) -> Checkpoint | None:
    """The checkpoint to resume from; None: the run starts at the beginning. Only leftovers of a killed run are removed.

    Raises:
        UserError: the folder holds something else, or the checkpoint has a format that is not read.
        RunError: all checkpoints are damaged.
    """
    check_same_recipe(recipe, out)
    clean_up(out / "checkpoints")
    found = newest_intact(out / "checkpoints")
    return None if found is None else Checkpoint(*found)


def prepare_folder(recipe: Recipe, out: Path, start: Checkpoint | None) -> None:
    """Writes the recipe into the folder and renames damaged checkpoints; called after every check has passed."""
    write_text(out / "recipe.json", to_json(to_json_object(recipe), indent=2) + "\n")
    (out / "checkpoints").mkdir(exist_ok=True)
    if start is not None:
        set_aside_damaged(out / "checkpoints", start.state["step"])


def record_start(out: Path, command: str, resumed: bool) -> list[dict[str, str]]:
    """Adds this start to the folder's list of them, and returns all whose work is in the run, the first one first."""
    path = out / "starts.json"
    starts = json.loads(path.read_text(encoding="utf-8")) if resumed and path.is_file() else []
    starts.append({"command": command, "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")})
    write_text(path, to_json(starts, indent=1) + "\n")
    return starts


def finished_summary(recipe: Recipe, out: Path) -> dict[str, Any] | None:
    """The summary of the run in the folder if it is complete, report included; None for any other.

    Raises:
        UserError: the folder holds something else.
    """
    if not (out / "summary.json").is_file() or not (out / "report.html").is_file():
        return None
    check_same_recipe(recipe, out)
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))


def check_resumable(recipe: Recipe, out: Path) -> None:
    """Raises a UserError for a folder that holds something else than a run of this recipe and version. Only reads."""
    check_same_recipe(recipe, out)
    for path in checkpoints_by_step(out / "checkpoints").values():
        with contextlib.suppress(DamagedCheckpoint):
            read_manifest(path)


def check_same_recipe(recipe: Recipe, out: Path) -> None:
    """Raises a UserError when the folder holds no run, or one with another recipe; the message names the fields."""
    path = out / "recipe.json"
    others = [e for e in out.iterdir() if not e.name.startswith(".")]  # without the lock and a half-written recipe
    if [e.name for e in others] == ["checkpoints"] and others[0].is_dir() and not any(others[0].iterdir()):
        others = []
    if (out / "transfer.json").exists() or (others and not path.is_file()):
        raise UserError(f"{out} exists and holds no run that can be resumed: name another folder with --out")
    if path.is_file():
        before, now = (to_json_object(without_free_fields(r)) for r in (from_json(path), recipe))
        sections = ("model", *FREE_FIELDS)
        changed = [flag(f) for section in sections for f, v in before[section].items() if v != now[section][f]]
        if changed:
            raise UserError(
                f"{out} is a run with another {', '.join(changed)}: repeat its options (they are in {path}), or start "
                "a new run with another --out"
            )


def without_free_fields(recipe: Recipe) -> Recipe:
    """The recipe with defaults for its name and for the fields that may differ."""
    default = Recipe()
    sections = {
        section: replace(getattr(recipe, section), **{name: getattr(getattr(default, section), name) for name in names})
        for section, names in FREE_FIELDS.items()
    }
    return replace(recipe, name=default.name, **sections)


def fingerprint(data: DatasetSplits) -> dict[str, Any]:
    """The number and a digest of the images and labels, in order, that a run trains on and validates with."""
    found = {}
    for name in ("train", "val"):
        if (dataset := data.splits.get(name)) is not None:
            digest = hashlib.sha256()
            for text in joined(dataset.names):
                digest.update(text)
            digest.update(np.ascontiguousarray(dataset.labels, dtype="<i8").data)
            found[name] = {"count": len(dataset), "sha256": digest.hexdigest()}
    return found


def check_same_data(checkpoint: Checkpoint, data: DatasetSplits, precision: str) -> None:
    """Raises a UserError when the data has other images or classes than the checkpoint's run."""
    where, state = checkpoint
    before, now = state["images"], fingerprint(data)
    if tuple(state["classes"]) != data.classes:
        classes = ", ".join(state["classes"][:10])
        raise UserError(f"{where} was trained on the classes {classes}, and the data has others: restore the data")
    for split, name in (("train", "training"), ("val", "validation")):
        if before.get(split) != now.get(split):
            then, here = (found.get(split, {"count": 0})["count"] for found in (before, now))
            counts = f"{then:,} {name} images then, {here:,} now"
            raise UserError(
                f"the data is not that of {where} ({counts}, or different ones): restore it, or start a new run"
            )
    if state["precision"] != precision:
        log.warning("the run used %s so far and continues in %s (--precision)", state["precision"], precision)
