"""The commands' modules are independent of one another."""

import ast
from pathlib import Path

import pytest

import allmlp.cli
from allmlp.cli import COMMANDS

FOLDER = Path(allmlp.cli.__file__).parent


def imported_modules(path: Path) -> set[str]:
    """Modules of ``allmlp.cli`` that a file imports, within functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["allmlp.cli" if node.level else "", node.module]))
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    inside = {name.removeprefix("allmlp.cli.") for name in found if name.startswith("allmlp.cli.")}
    return {name.removeprefix("commands.").split(".")[0] for name in inside}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_imports_another(command: str) -> None:
    path = FOLDER / "commands" / f"{command}.py"
    assert "arguments" in imported_modules(path)  # the reader of imports works
    assert not imported_modules(path) & set(COMMANDS)


def test_no_shared_module_imports_a_command() -> None:
    for path in FOLDER.glob("*.py"):
        assert not imported_modules(path) & {*COMMANDS, "commands"}, path.name
