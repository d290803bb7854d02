"""The files of a result: CSV, JSON with hardware, versions and commit, and pictures as PNG and SVG."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from allmlp.errors import UserError
from allmlp.files import atomic_write, to_json, write_text
from allmlp.reproduce.figures.charts import STYLE
from allmlp.reproduce.tables.table import Table
from allmlp.runs.provenance import current_commit, describe_device, versions


def check_folder(out: Path) -> None:
    """Raises a UserError, before anything is computed, if ``out`` cannot become the folder of the results."""
    for path in (out, *out.parents):
        if path.exists():
            if not path.is_dir():
                raise UserError(f"--out {out}: {path} is a file, so name a folder")
            return


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        cpu = f"{len(names)} × {names[0]}" if names else cpu
    hardware = {"device": describe_device(device), "cpu": cpu, "system": platform.platform()}
    return {"hardware": hardware, "versions": versions(), "commit": current_commit()}


def write_table(table: Table, figures: Mapping[str, Figure], machine: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Writes the files into the folder ``out``, which is created; returns the content of the JSON.

    Raises:
        OSError: a file cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{table.name}.csv", out / f"{table.name}.json"]
    write_text(files[0], table.to_csv())
    for name, figure in figures.items():
        for ending in ("png", "svg"):
            files.append(out / f"{name}.{ending}")
            write_figure(figure, files[-1])
    found = {**table.to_json_object(), **machine, "files": [str(file) for file in files]}
    write_text(files[1], to_json(found, indent=2) + "\n")
    return found


def write_figure(figure: Figure, path: Path) -> None:
    kind = path.suffix[1:]
    metadata = {"Date": None} if kind == "svg" else {}  # the same picture is the same file
    with atomic_write(path) as temporary, matplotlib.rc_context(STYLE):
        figure.savefig(temporary, format=kind, metadata=metadata)
