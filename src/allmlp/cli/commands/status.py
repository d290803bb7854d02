"""mixer status"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from allmlp.cli.arguments import parse
from allmlp.cli.docstrings import help_from_docstrings
from allmlp.files import to_json

DESCRIPTION = """Prints the progress of a run: step, accuracy, speed, checkpoints, and how to resume it.

example: mixer status runs/digits-20260501-120000"""


@dataclass(frozen=True, kw_only=True)
@help_from_docstrings
class Arguments:
    run: tyro.conf.Positional[Path]
    """The run's folder."""
    verify: bool = False
    """Read the newest checkpoint in full and check each file's SHA-256."""
    json: bool = False
    """Print one JSON object."""


def run(args: Sequence[str]) -> None:
    arguments = parse(Arguments, args, command="status", description=DESCRIPTION)
    from allmlp.runs.status import run_status

    found = run_status(arguments.run, arguments.verify)
    if arguments.json:
        print(to_json(found))
        return
    for name, text in status_lines(found):
        print(f"{name:12} {text}")


def status_lines(status: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of each line to print."""
    shown = [("run", f"{status['run']}, recipe {status['recipe']}: {status['state']}")]
    of = f" of {status['steps']:,}" if status["steps"] else ""
    epoch = "" if status["epoch"] is None else f", epoch {status['epoch']:.4g}"
    shown.append(("step", f"{status['step']:,}{of}{epoch}"))
    if status["loss"] is not None:
        shown.append(("loss", f"{status['loss']:.4f}"))
    if status["val_top1"] is not None:
        best = f" (best {status['best'][1]:.4f} at step {status['best'][0]:,})" if status["best"] else ""
        majority = "" if status["val_majority"] is None else f", commonest class {status['val_majority']:.4f}"
        shown.append(("validation", f"top-1 {status['val_top1']:.4f}{best}{majority}"))
    if status["images_per_second"] is not None:
        wait = f", {status['data_wait']:.0%} of the time spent waiting for images"
        shown.append(("speed", f"{status['images_per_second']:,.0f} images/s{wait}"))
    if status["seconds"] is not None:
        left = "" if status["left_seconds"] is None else f", about {format_duration(status['left_seconds'])} left"
        shown.append(("time", f"{format_duration(status['seconds'])} in steps{left}"))
    if status["checkpoints"]:
        steps = ", ".join(f"{step:,}" for step in status["checkpoints"])
        shown.append(("checkpoints", f"steps {steps}; the newest {format_duration(status['saved_seconds_ago'])} ago"))
    elif status["state"] != "finished":
        shown.append(("checkpoints", "none yet"))
    if "sound" in status:
        verified = "nothing to verify" if status["sound"] is None else f"step {status['sound']:,} is intact"
        shown.append(("verified", verified))
    if status["state"] == "stopped":
        shown.append(("resume", f"mixer train --resume {shlex.quote(status['run'])}"))
    return shown


def format_duration(seconds: float) -> str:
    """A duration in its largest unit of at least one."""
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
