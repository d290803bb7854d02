"""The stub, which editors and type checkers read: compared with the code it describes, and checked with pyright."""

import ast
import inspect
import json
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

import allmlp
from allmlp.api.recipe import FINETUNE_MODEL_FIELDS, FINETUNE_SECTIONS, SECTIONS
from allmlp.config import recipe as recipes
from allmlp.model import Mixer
from allmlp.recipes import FINETUNE_RECIPES, RECIPES
from allmlp.variants import VARIANTS
from allmlp.zoo.families import FAMILIES
from allmlp.zoo.systems import SYSTEMS

SOURCES = Path(__file__).resolve().parents[2] / "src"
STUB = ast.parse((SOURCES / "allmlp" / "__init__.pyi").read_text(encoding="utf-8"))
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
WIDER = {"model", "data", "weights", "learning_rates"}  # keywords that take more than the recipe stores
GOOD = """
from pathlib import Path

import allmlp

model = allmlp.create("B/16", num_classes=10, dropout=0.1)
run = allmlp.train("photos", data=Path("photos"), epochs=50, learning_rate=1e-3, resume=True, out="runs/a")
best: float = run.summary["test_top1"]
tuned = allmlp.finetune(run.model, "photos", learning_rates=[0.01, 0.03], seeds=3, image_size=(64, 96))
score: float = allmlp.evaluate(tuned.model, "photos", part="all").top1
rows: int = allmlp.features(allmlp.load("a.npz"), ["a.png"]).shape[0]
label: str = allmlp.predict(model, "a.png", top=3)[0].classes[0][0]
"""
BAD = 'import allmlp\nallmlp.create("B/17")\nallmlp.train("digit")\nallmlp.train(epoch=3)\nprint(allmlp.lod)\n'


def keywords(function: str) -> dict[str, str]:
    """Keyword → type, as written in the stub."""
    return {arg.arg: ast.unparse(arg.annotation) for arg in FUNCTIONS[function].args.kwonlyargs if arg.annotation}


@pytest.mark.parametrize("function", ["train", "finetune"])
def test_keywords_are_the_fields_of_the_recipes(function: str) -> None:
    fields: dict[str, Any] = {}
    for section, kind in (SECTIONS if function == "train" else FINETUNE_SECTIONS).items():
        hints = typing.get_type_hints(kind)
        if function == "finetune":
            hints = {
                k: v for k, v in hints.items() if k != "data" and (section != "model" or k in FINETUNE_MODEL_FIELDS)
            }
        assert not fields.keys() & hints.keys()  # a flat keyword names one field
        fields |= hints
    own = {
        name for name, p in inspect.signature(getattr(allmlp, function)).parameters.items() if p.kind is p.KEYWORD_ONLY
    }
    found = keywords(function)
    assert found.keys() == fields.keys() | own
    for name in fields.keys() - WIDER:
        assert eval(found[name], vars(recipes)) == fields[name], name


def test_names_are_those_of_the_package() -> None:
    literals = {}
    for node in STUB.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
            literals[ast.unparse(node.targets[0])] = ast.literal_eval(node.value.slice)
    assert literals == {
        "ModelName": (*VARIANTS, *SYSTEMS, *FAMILIES),
        "RecipeName": tuple(RECIPES),
        "FinetuneRecipeName": tuple(FINETUNE_RECIPES),
    }
    exported = {alias.asname for node in STUB.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert (exported - {None}) | FUNCTIONS.keys() == set(allmlp.__all__)
    mixer = set(inspect.signature(Mixer).parameters)
    assert keywords("create").keys() == mixer.union(*(family.sizes for family in FAMILIES.values()))


def test_pyright_sees_mistakes_and_only_mistakes(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text(BAD)
    settings = {"typeCheckingMode": "strict", "extraPaths": [str(SOURCES)], "pythonVersion": "3.11"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [Path(sys.executable).parent / "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    errors = [e for e in json.loads(done.stdout)["generalDiagnostics"] if e["severity"] == "error"]
    assert [e["message"] for e in errors if e["file"].endswith("good.py")] == []
    lines = {e["range"]["start"]["line"] for e in errors if e["file"].endswith("bad.py")}
    assert lines == set(range(1, 5))
