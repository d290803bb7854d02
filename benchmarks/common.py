"""What the benchmarks share: training steps, the machine, tables, and results as JSON."""

import json
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from allmlp.data.loader import Batch
from allmlp.model import Mixer
from allmlp.runs.provenance import current_commit, describe_device
from allmlp.training.step import StepResult, TrainingStep


def machine(device: torch.device) -> dict[str, str | None]:
    """Hardware, PyTorch version and commit, for the file of results."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = f"{len(names)} × {names[0]}"
    return {"cpu": cpu, "device": describe_device(device), "torch": torch.__version__, "commit": current_commit()}


class NoProgress:
    """For ``training.run.train``: shows nothing."""

    def update(self, done: int, total: int, text: str) -> None:
        pass


def train_steps(model: Mixer, step: TrainingStep, batches: Iterable[Batch]) -> Iterator[StepResult]:
    """Trains the model, one step per batch."""
    for number, batch in enumerate(batches, start=1):
        model.train()
        yield step(number, [batch])


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def write_results(name: str, results: dict) -> Path:
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    return path
