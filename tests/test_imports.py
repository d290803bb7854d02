"""Imports run one way through the package (docs/architecture.md); this reads the sources and checks it.

foundation ← model, variants ← factory ← weights, data, config ← distributed ← checkpointing ← runs ← training. Beside
training stands evaluation, beside both inference; recipes are made of config alone; api imports these, cli
all. Imports inside functions and under TYPE_CHECKING count. A module may import any other of its own package.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = "allmlp"
SOURCES = Path(__file__).resolve().parents[1] / "src" / ROOT

FOUNDATION = (
    "errors", "metadata", "classifier", "device", "files", "rng", "flops", "sizes", "resolution", "dropout",
    "initial_weights", "timm_methods",
)  # fmt: skip
MODELS = (*FOUNDATION, "model", "variants", "factory")
FILES = (*MODELS, "weights", "data", "config")
RUNS = (*FILES, "distributed", "checkpointing", "runs")

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(FOUNDATION, FOUNDATION),
    "model": FOUNDATION,
    "variants": FOUNDATION,
    "factory": MODELS,
    "weights": MODELS,
    "data": FOUNDATION,
    "config": FOUNDATION,
    "distributed": MODELS,
    "checkpointing": (*FOUNDATION, "distributed"),
    "runs": (*FILES, "distributed", "checkpointing"),
    "training": RUNS,
    "evaluation": RUNS,
    "inference": (*MODELS, "weights", "data"),
    "recipes": (*FOUNDATION, "config"),
    "api": (*RUNS, "training", "evaluation", "inference", "recipes"),
    "cli": (*RUNS, "training", "evaluation", "inference", "recipes", "api"),
}


def violations(path: str, source: str) -> list[str]:
    """What a file ("weights/npz.py", relative to the package) imports against the rules; one line each."""
    tree = ast.parse(source)
    parts = path.removesuffix(".py").split("/")
    package = parts[:-1]  # what a relative import starts from, for a package's __init__ as for its modules
    if parts == ["__init__"]:
        executed = (found for node in executed_at_import(tree) for found in imported(node, package))
        return [
            f"{path}:{line}: imports {target} when it is imported itself: do it lazily"
            for line, target in executed
            if target.split(".")[0] in (ROOT, "torch")
        ]
    own = parts[0]
    if own not in MAY_IMPORT:
        return [f"{path}: {own} is not in MAY_IMPORT of {Path(__file__).name}: say where it stands"]
    found = []
    for node in ast.walk(tree):
        for line, target in imported(node, package):
            if target != ROOT and not target.startswith(f"{ROOT}."):
                continue
            inner = target.removeprefix(ROOT).removeprefix(".")
            allowed = any(inner == name or inner.startswith(f"{name}.") for name in (own, *MAY_IMPORT[own]))
            through_root = inner.split(".")[0] not in MAY_IMPORT  # allmlp itself, or a name that it offers
            if not allowed and not (own == "cli" and through_root):
                found.append(f"{path}:{line}: {own} imports {target}; it may import {', '.join(MAY_IMPORT[own])}")
    return found


def imported(node: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of what one node imports, from-imports down to the imported name."""
    if isinstance(node, ast.Import):
        yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = [node.module] if node.module else []
        if node.level:
            here = [ROOT, *package]
            base = here[: len(here) - node.level + 1] + base
        yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            yield node.lineno, node.args[0].value


def executed_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: not functions' bodies, not what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from executed_at_import(other)
            continue
        yield child
        yield from executed_at_import(child)


def test_the_package_keeps_the_rules() -> None:
    files = sorted(SOURCES.rglob("*.py"))
    assert SOURCES / "model.py" in files
    found = []
    for file in files:
        found += violations(file.relative_to(SOURCES).as_posix(), file.read_text(encoding="utf-8"))
    assert not found, "\n" + "\n".join(found)


def test_importing_the_package_imports_no_torch() -> None:
    code = f"import sys, {ROOT}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# The checker itself


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("errors.py", "from allmlp.model import Mixer"),
        ("model.py", "from allmlp.variants import create"),
        ("model.py", "import allmlp.variants as names"),
        ("model.py", "from allmlp import variants"),
        ("model.py", "from . import errors, variants"),
        ("model.py", "def f():\n    from allmlp.weights import load"),
        ("model.py", "if TYPE_CHECKING:\n    from allmlp.data import Source"),
        ("model.py", "import importlib\nimportlib.import_module('allmlp.training')"),
        ("model.py", "import allmlp"),
        ("model.py", "from allmlp import create"),
        ("weights/npz.py", "from ..data.sources import folder"),
        ("weights/__init__.py", "from ..training import loop"),
        ("data/sources.py", "from allmlp.config.recipe import Recipe"),
        ("training/loop.py", "from allmlp.evaluation import evaluate"),
        ("training/loop.py", "from allmlp.inference import optimize"),
        ("training/loop.py", "from allmlp.recipes import digits"),
        ("evaluation/report.py", "from allmlp.inference import predict"),
        ("evaluation/fewshot.py", "from allmlp.training.losses import softmax"),
        ("runs/resume.py", "from allmlp.training.state import TrainingState"),
        ("checkpointing/manager.py", "from allmlp.runs.folder import run_folder"),
        ("weights/load.py", "from allmlp.config.recipe import Recipe"),
        ("variants.py", "from allmlp.model import Mixer"),
        ("inference/predict.py", "from allmlp.config.recipe import Recipe"),
        ("recipes/digits.py", "from allmlp.training import Recipe"),
        ("recipes/digits.py", "from allmlp.training import loop"),
        ("recipes/digits.py", "from allmlp.training.recipe_tools import x"),
        ("recipes/digits.py", "from allmlp.model import Mixer"),
        ("evaluation/report.py", "from allmlp.cli import main"),
        ("recipes/digits.py", "import allmlp.cli.main"),
        ("__init__.py", "from allmlp.variants import create"),
        ("__init__.py", "from .variants import create"),
        ("__init__.py", "import torch.nn"),
        ("__init__.py", "try:\n    import torch\nexcept ImportError:\n    pass"),
        ("__init__.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch"),
    ],
)
def test_checker_catches_a_violation(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("device.py", "import torch\nfrom allmlp.errors import UserError"),
        ("factory.py", "from allmlp.model import Mixer\nfrom . import errors"),
        (
            "weights/npz.py",
            "from allmlp.weights.layout import names\nfrom .layout import names\nfrom . import layout",
        ),
        ("weights/npz.py", "from ..model import Mixer"),
        ("evaluation/fewshot.py", "from allmlp.data import sources\nfrom allmlp.weights.load import load"),
        ("inference/predict.py", "from allmlp import model, variants, weights, data"),
        ("recipes/digits.py", "from allmlp.config.recipe import Recipe\nfrom allmlp.config import recipe"),
        ("recipes/digits.py", "from allmlp.recipes.cifar import base"),
        (
            "cli/main.py",
            "import allmlp\nfrom allmlp import create, inference\nfrom allmlp.recipes import digits",
        ),
        ("model.py", "import allmlp_extras\nfrom torch import nn"),
        ("__init__.py", "def __getattr__(name):\n    from allmlp import variants\n    import torch"),
        (
            "__init__.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from allmlp.variants import create",
        ),
    ],
)
def test_checker_lets_the_allowed_pass(path: str, source: str) -> None:
    assert violations(path, source) == []


@pytest.mark.parametrize("path", ["helpers.py", "analysis/filters.py"])
def test_checker_asks_where_a_new_module_stands(path: str) -> None:
    (found,) = violations(path, "")
    assert "say where it stands" in found
