"""mixer status"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from allmlp.cli.arguments import parse
from allmlp.files import to_json

DESCRIPTION = """Prints where a run is: how far, how well, how fast, its checkpoints, and how to go on with it.

example: mixer status runs/digits-20260501-120000"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    run: tyro.conf.Positional[Path]
    """The run's folder."""
    verify: bool = False
    """Read the newest checkpoint in full, and hold every file to its SHA-256."""
    json: bool = False
    """Print one JSON object."""


def run(args: Sequence[str]) -> None:
    chosen = parse(Arguments, args, verb="status", description=DESCRIPTION)
    from allmlp.runs.status import status

    told = status(chosen.run, chosen.verify)
    if chosen.json:
        print(to_json(told))
        return
    for name, text in lines(told):
        print(f"{name:12} {text}")


def lines(told: dict[str, Any]) -> list[tuple[str, str]]:
    """What is known, in words."""
    shown = [("run", f"{told['run']}, recipe {told['recipe']}: {told['state']}")]
    of = f" of {told['steps']:,}" if told["steps"] else ""
    epoch = "" if told["epoch"] is None else f", epoch {told['epoch']:.4g}"
    shown.append(("step", f"{told['step']:,}{of}{epoch}"))
    if told["loss"] is not None:
        shown.append(("loss", f"{told['loss']:.4f}"))
    if told["val_top1"] is not None:
        best = f" (best {told['best'][1]:.4f} at step {told['best'][0]:,})" if told["best"] else ""
        shown.append(("validation", f"top-1 {told['val_top1']:.4f}{best}"))
    if told["images_per_second"] is not None:
        wait = f", {told['data_wait']:.0%} of the time waiting for images"
        shown.append(("speed", f"{told['images_per_second']:,.0f} images/s{wait}"))
    if told["seconds"] is not None:
        left = "" if told["left_seconds"] is None else f", about {duration(told['left_seconds'])} to go"
        shown.append(("time", f"{duration(told['seconds'])} in steps{left}"))
    if told["checkpoints"]:
        steps = ", ".join(f"{step:,}" for step in told["checkpoints"])
        shown.append(("checkpoints", f"steps {steps}; the newest {duration(told['saved_seconds_ago'])} ago"))
    else:
        shown.append(("checkpoints", "none yet"))
    if "sound" in told:
        shown.append(("verified", "nothing to verify" if told["sound"] is None else f"step {told['sound']:,} is sound"))
    if told["state"] == "stopped":
        shown.append(("go on", f"mixer train --resume {shlex.quote(told['run'])}"))
    return shown


def duration(seconds: float) -> str:
    """In the largest unit that is not below one."""
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
