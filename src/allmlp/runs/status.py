"""Where a run is, from its folder alone: for whoever asks, on any machine that sees the folder."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from allmlp.checkpointing.checkpoint import STATE
from allmlp.checkpointing.manager import newest, steps_in
from allmlp.config.serialize import from_json
from allmlp.errors import UserError
from allmlp.runs.folder import is_locked
from allmlp.runs.records import METRICS, read_lines


def status(out: Path, verify: bool = False) -> dict[str, Any]:
    """What is known of a run.

    Args:
        out: its folder.
        verify: whether to read the newest checkpoint in full and hold it to its manifest.

    Returns:
        ``state`` ("running", "finished", or "stopped": it can be gone on with), ``step`` of ``steps``, ``epoch``, the
        last ``loss``, ``val_top1`` and speed, the ``best`` step and accuracy, ``checkpoints`` (steps, newest first),
        ``saved_seconds_ago``, ``left_seconds`` by the speed of the last lines, ``seconds`` in steps so far.

    Raises:
        UserError: there is no run.
        RunError: with ``verify``, there are checkpoints and none is sound.
    """
    if not (out / "recipe.json").is_file():
        raise UserError(f"{out} is no run: name a folder that mixer train has made")
    recipe = from_json(out / "recipe.json")
    checkpoints = steps_in(out / "checkpoints")
    records = [record for _, record in read_lines(out / METRICS)]
    last = {key: value for record in records for key, value in record.items()}
    saved = saved_state(checkpoints)
    finished = (out / "summary.json").is_file()
    told = {
        "run": str(out),
        "recipe": recipe.name,
        "state": "finished" if finished else "running" if is_locked(out) else "stopped",
        "step": last.get("step", saved.get("step", 0)),
        "steps": saved.get("steps"),
        **{key: last.get(key) for key in ("epoch", "loss", "val_top1", "images_per_second", "data_wait")},
        "best": best(records),
        "checkpoints": list(checkpoints),
        "saved_seconds_ago": seconds_since(next(iter(checkpoints.values()), None)),
        "seconds": saved.get("seconds"),
        "left_seconds": None,
    }
    if not finished and told["steps"] and told["images_per_second"]:
        left = (told["steps"] - told["step"]) * recipe.optimization.global_batch_size
        told["left_seconds"] = left / told["images_per_second"]
    if verify:
        found = newest(out / "checkpoints", trusted=True)
        told["sound"] = None if found is None else found[1]["step"]
    return told


def best(records: list[dict[str, Any]]) -> tuple[int, float] | None:
    """The first step with the highest validation accuracy, and that."""
    scores = [(record["val_top1"], -record["step"]) for record in records if "val_top1" in record]
    return (-max(scores)[1], max(scores)[0]) if scores else None


def saved_state(checkpoints: dict[int, Path]) -> dict[str, Any]:
    """Of the newest checkpoint that can be read."""
    for path in checkpoints.values():
        with contextlib.suppress(OSError, ValueError, RecursionError):
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            if isinstance(state, dict):
                return state
    return {}


def seconds_since(path: Path | None) -> float | None:
    return None if path is None else max(time.time() - path.stat().st_mtime, 0.0)
