"""The shape of the code: imports run one way, files and signatures stay small, the step is close to the command."""

import ast
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import allmlp

SOURCES = Path(__file__).resolve().parents[1] / "src" / "allmlp"
FILES = sorted(SOURCES.rglob("*.py"))
MAX_MODULES, MAX_LINES, MAX_PARAMETERS, MAX_FRAMES = 16, 400, 8, 6


def test_imports_run_one_way() -> None:
    """As the contracts in pyproject.toml say; a new module must be placed in one of their layers."""
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=SOURCES.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_only_commands_use_the_packages_lazy_names() -> None:
    names = rf"\b({'|'.join(allmlp.__all__)})\b"
    lazy = re.compile(rf"^ *(import allmlp( as .*)?|from allmlp import .*{names}.*)$", re.MULTILINE)
    users = [file for file in FILES if lazy.search(file.read_text(encoding="utf-8"))]
    assert [file for file in users if file.parent.name != "commands"] == []


def test_folders_have_few_modules() -> None:
    assert FILES
    counts = {folder: len(list(folder.glob("*.py"))) for folder in {file.parent for file in FILES}}
    assert {folder.name: count for folder, count in counts.items() if count > MAX_MODULES} == {}


def test_files_are_short() -> None:
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {file.name: length for file, length in lengths.items() if length > MAX_LINES} == {}


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Number of parameters that a caller may give."""
    spec = function.args
    named = [argument.arg for argument in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)]
    return len([name for name in named if name not in ("self", "cls")])


def test_signatures_in_training_are_short() -> None:
    found = {}
    for file in (SOURCES / "training").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found[f"{file.name}:{node.name}"] = parameters(node)
    assert max(found.values()) > 1
    assert {name: count for name, count in found.items() if count > MAX_PARAMETERS} == {}


def test_the_step_is_close_to_the_command(
    mixer: Callable[..., Any], tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from allmlp.training.step import TrainingStep

    frames: list[list[str]] = []
    call = TrainingStep.__call__

    def recorded(self: TrainingStep, *args: Any, **options: Any) -> Any:
        stack = traceback.extract_stack(sys._getframe(1))
        frames.append([f"{Path(f.filename).name}:{f.name}" for f in stack if Path(f.filename).is_relative_to(SOURCES)])
        return call(self, *args, **options)

    monkeypatch.setattr(TrainingStep, "__call__", recorded)
    assert mixer("train", "--steps", 1, *tiny, "--out", tmp_path / "run").status == 0
    assert frames
    assert len(frames[0]) + 1 <= MAX_FRAMES, frames[0]  # and the step itself
