"""The records of a run in training: its metrics, and a digest of the images that each step used."""

import contextlib
import importlib
import json
import logging
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from allmlp.errors import RunError
from allmlp.files import sync, to_json, write_text

log = logging.getLogger(__name__)

METRICS, CONSUMED = "metrics.jsonl", "consumed.jsonl"


class Records:
    """``metrics.jsonl``, ``consumed.jsonl``, TensorBoard events and, if requested, Weights & Biases.

    Args:
        out: the run's folder.
        wandb_project: project of Weights & Biases; None: not used.
        recipe: the recipe as JSON values, for Weights & Biases.
        writes: whether this process writes the records (rank 0); the others only keep them in memory.
    """

    def __init__(self, out: Path, wandb_project: str | None, recipe: dict[str, Any], writes: bool = True) -> None:
        self.out, self.wandb_project, self.recipe, self.writes = out, wandb_project, recipe, writes
        self.metrics: list[dict[str, float]] = []
        self.files: list[Any] = []
        self.closers: list[Callable[[], Any]] = []
        self.senders: list[Callable[[dict[str, float], int], Any]] = []

    @contextlib.contextmanager
    def open(self, step: int) -> Iterator["Records"]:
        """Opens the files for a run that continues after ``step`` (0: a new run), truncated to that step.

        The evaluation of that step is removed too: it comes after the checkpoint and is repeated.
        """
        try:
            if self.writes:
                self.open_files(step)
                self.open_tensorboard(step)
                if self.wandb_project is not None:
                    self.open_wandb(self.wandb_project)
            yield self
        finally:
            for close in self.closers:
                close()

    def open_files(self, step: int) -> None:
        self.metrics = truncate(self.out / METRICS, lambda r: r["step"] < step or (r["step"] == step and "loss" in r))
        truncate(self.out / CONSUMED, lambda r: r["step"] <= step)
        for name in (METRICS, CONSUMED):
            self.files.append((self.out / name).open("a", buffering=1, encoding="utf-8"))
        self.closers += [file.close for file in self.files]

    def open_tensorboard(self, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.info("TensorBoard is not installed, so no events are written: pip install 'allmlp[tensorboard]'")
            return
        writer = SummaryWriter(self.out / "tensorboard", purge_step=step + 1)

        def send(numbers: dict[str, float], step: int) -> None:
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)

        self.senders.append(send)
        self.closers.append(writer.close)

    def open_wandb(self, project: str) -> None:
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise RunError(f"--wandb {project} needs Weights & Biases: pip install wandb, or leave it out") from error
        id_file = self.out / "wandb.json"  # a resumed run continues under the same id
        if not id_file.exists():
            write_text(id_file, to_json({"id": uuid.uuid4().hex[:12]}) + "\n")
        run = wandb.init(
            project=project,
            name=self.out.name,
            id=json.loads(id_file.read_text(encoding="utf-8"))["id"],
            resume="allow",
            dir=str(self.out),
            config=self.recipe,
        )
        self.senders.append(lambda numbers, step: run.log(numbers, step=step))
        self.closers.append(run.finish)

    def log_metrics(self, record: dict[str, float]) -> None:
        """Writes a line of metrics.jsonl."""
        self.metrics.append(record)
        if self.files:
            self.files[0].write(to_json(record) + "\n")
        numbers = {key: value for key, value in record.items() if key not in ("step", "epoch") and value is not None}
        for send in self.senders:
            send(numbers, int(record["step"]))

    def log_samples(self, step: int, samples: int, digest: int) -> None:
        """Writes a line of consumed.jsonl: a step, the samples used up to its end, and a digest of its images."""
        if self.files:
            self.files[1].write(f'{{"step": {step}, "samples": {samples}, "digest": "{digest:016x}"}}\n')

    def sync(self) -> None:
        """Flushes to disk, before a checkpoint that relies on these lines is written."""
        for file in self.files:
            sync(file.fileno())


def truncate(path: Path, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Rewrites the file with the records to keep, without an incomplete last line, and returns them."""
    if not path.exists():
        return []
    kept = [(line, record) for line, record in read_lines(path) if keep(record)]
    write_text(path, "".join(f"{line}\n" for line, _ in kept))
    return [record for _, record in kept]


def read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The complete lines of a file that are records of a step, each with its record."""
    found = []
    for data in path.read_bytes().split(b"\n")[:-1] if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line := data.decode())
            if isinstance(record, dict) and type(record.get("step")) is int:
                found.append((line, record))
    return found
