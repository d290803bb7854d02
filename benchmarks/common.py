"""What the benchmarks share: what ran where, tables, and results as JSON."""

import json
import platform
from pathlib import Path

import torch

from allmlp.runs.provenance import current_commit, describe_device


def machine(device: torch.device) -> dict[str, str | None]:
    """Hardware, versions and commit, for the result's file."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = f"{len(names)} × {names[0]}"
    return {"cpu": cpu, "device": describe_device(device), "torch": torch.__version__, "commit": current_commit()}


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def write_results(name: str, results: dict) -> Path:
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    return path
