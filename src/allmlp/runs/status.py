"""The state of a run, read from its folder alone, on any machine that sees the folder."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from allmlp.checkpointing.checkpoint import STATE
from allmlp.checkpointing.manager import checkpoints_by_step, newest_intact
from allmlp.config.serialize import from_json
from allmlp.errors import UserError
from allmlp.runs.folder import is_locked
from allmlp.runs.records import METRICS, read_lines


def run_status(out: Path, verify: bool = False) -> dict[str, Any]:
    """The state of a run.

    Args:
        out: its folder.
        verify: read the newest checkpoint in full and compare it with its manifest.

    Returns:
        ``state`` ("running", "finished", or "stopped": it can be resumed), ``step`` of ``steps``, ``epoch``, the last
        ``loss``, ``val_top1``, ``val_majority`` (the accuracy of always answering the commonest class) and speed, the
        ``best`` step and accuracy, ``checkpoints`` (steps, newest first), ``saved_seconds_ago``, ``left_seconds`` at
        the speed of the last lines, ``seconds`` spent in steps.

    Raises:
        UserError: the folder holds no run.
        RunError: with ``verify``, all checkpoints are damaged.
    """
    if not (out / "recipe.json").is_file():
        raise UserError(f"{out} is not the folder of a run: name one that mixer train has created")
    recipe = from_json(out / "recipe.json")
    checkpoints = checkpoints_by_step(out / "checkpoints")
    records = [record for _, record in read_lines(out / METRICS)]
    last = {key: value for record in records for key, value in record.items()}
    saved, summary = saved_state(checkpoints), read_object(out / "summary.json")
    finished = (out / "summary.json").is_file()
    status = {
        "run": str(out),
        "recipe": recipe.name,
        "state": "finished" if finished else "running" if is_locked(out) else "stopped",
        "step": last.get("step", saved.get("step", 0)),
        "steps": saved.get("steps", summary.get("steps")),
        **{
            key: last.get(key)
            for key in ("epoch", "loss", "val_top1", "val_majority", "images_per_second", "data_wait")
        },
        "best": best(records),
        "checkpoints": list(checkpoints),
        "saved_seconds_ago": seconds_since(next(iter(checkpoints.values()), None)),
        "seconds": saved.get("seconds", summary.get("train_seconds")),
        "left_seconds": None,
    }
    if not finished and status["steps"] and status["images_per_second"]:
        left = (status["steps"] - status["step"]) * recipe.optimization.global_batch_size
        status["left_seconds"] = left / status["images_per_second"]
    if verify:
        found = newest_intact(out / "checkpoints")
        status["sound"] = None if found is None else found[1]["step"]
    return status


def best(records: list[dict[str, Any]]) -> tuple[int, float] | None:
    """The first step with the highest validation accuracy, and that accuracy."""
    scores = [(record["val_top1"], -record["step"]) for record in records if "val_top1" in record]
    return (-max(scores)[1], max(scores)[0]) if scores else None


def saved_state(checkpoints: dict[int, Path]) -> dict[str, Any]:
    """The state of the newest checkpoint that can be read."""
    return next((state for path in checkpoints.values() if (state := read_object(path / STATE))), {})


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def seconds_since(path: Path | None) -> float | None:
    return None if path is None else max(time.time() - path.stat().st_mtime, 0.0)
