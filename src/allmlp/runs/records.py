"""What a run writes down as it goes: its numbers, and which images it has consumed."""

import contextlib
import importlib
import json
import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from allmlp.config.recipe import Recipe
from allmlp.config.serialize import to_json_object
from allmlp.errors import RunError
from allmlp.files import to_json, write_text

log = logging.getLogger(__name__)

METRICS, CONSUMED = "metrics.jsonl", "consumed.jsonl"


class Records:
    """``metrics.jsonl``, ``consumed.jsonl``, TensorBoard's events and, where asked for, Weights & Biases.

    Going on with a run, the first two are cut back to the checkpoint's step, whose evaluation is still to come.

    Args:
        out: the run's folder.
        recipe: the run's.
        writes: false on all ranks but the first, which remember what is written and write nothing.
        step: the checkpoint's; 0 for a new run.
    """

    def __init__(self, out: Path, recipe: Recipe, writes: bool = True, step: int = 0) -> None:
        self.metrics: list[dict[str, float]] = []
        self.files: list[Any] = []
        self.closing: list[Callable[[], Any]] = []
        self.senders: list[Callable[[dict[str, float], int], Any]] = []
        if not writes:
            return
        self.metrics = cut(out / METRICS, lambda r: r["step"] < step or (r["step"] == step and "val_top1" not in r))
        cut(out / CONSUMED, lambda r: r["step"] <= step)
        for name in (METRICS, CONSUMED):
            self.files.append((out / name).open("a", buffering=1, encoding="utf-8"))
        self.closing += [file.close for file in self.files]
        self.open_tensorboard(out / "tensorboard", step)
        if recipe.run.wandb is not None:
            self.open_wandb(out, recipe, recipe.run.wandb)

    def open_tensorboard(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.info("no TensorBoard events are written: pip install 'allmlp[tensorboard]' for them")
            return
        board = SummaryWriter(folder, purge_step=step + 1)

        def send(numbers: dict[str, float], step: int) -> None:
            for key, value in numbers.items():
                board.add_scalar(key, value, step)

        self.senders.append(send)
        self.closing.append(board.close)

    def open_wandb(self, out: Path, recipe: Recipe, project: str) -> None:
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise RunError(f"--wandb {project} needs Weights & Biases: pip install wandb, or leave it out") from error
        known = out / "wandb.json"  # under which the run is known there, so that it is gone on with
        if not known.exists():
            write_text(known, to_json({"id": uuid.uuid4().hex[:12]}) + "\n")
        there = wandb.init(
            project=project,
            name=out.name,
            id=json.loads(known.read_text(encoding="utf-8"))["id"],
            resume="allow",
            dir=str(out),
            config=to_json_object(recipe),
        )
        self.senders.append(lambda numbers, step: there.log(numbers, step=step))
        self.closing.append(there.finish)

    def write(self, record: dict[str, float]) -> None:
        """A line of metrics.jsonl."""
        self.metrics.append(record)
        if self.files:
            self.files[0].write(to_json(record) + "\n")
        numbers = {key: value for key, value in record.items() if key not in ("step", "epoch") and value is not None}
        for send in self.senders:
            send(numbers, int(record["step"]))

    def consume(self, step: int, samples: int, digest: int) -> None:
        """A line of consumed.jsonl: a step, how many samples of the run it ended at, and a digest of which it took."""
        if self.files:
            self.files[1].write(f'{{"step": {step}, "samples": {samples}, "digest": "{digest:016x}"}}\n')

    def sync(self) -> None:
        """So that no checkpoint is on the disk whose lines are not."""
        for file in self.files:
            os.fsync(file.fileno())

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *error: object) -> None:
        for close in self.closing:
            close()


def cut(path: Path, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """The records to keep, and the file with no others; what a lost machine left at its end goes."""
    if not path.exists():
        return []
    kept = [(line, record) for line, record in read_lines(path) if keep(record)]
    write_text(path, "".join(f"{line}\n" for line, _ in kept))
    return [record for _, record in kept]


def read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a file that are records of a step, whole; and the records."""
    found = []
    for data in path.read_bytes().split(b"\n")[:-1] if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line := data.decode())
            if isinstance(record, dict) and type(record.get("step")) is int:
                found.append((line, record))
    return found
