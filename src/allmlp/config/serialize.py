"""Recipes to and from JSON."""

import dataclasses
import difflib
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

from allmlp.config.recipe import Recipe
from allmlp.errors import UserError, brief

VERSION = 1  # of the format; the first package, mlp-mixer, wrote none


def to_json_object(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON stores it: ``version``, ``name``, and an object for each section, with lists for tuples."""
    return {"version": VERSION, **dataclasses.asdict(recipe, dict_factory=with_lists)}


def with_lists(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in items}


def from_json(path: Path) -> Recipe:
    """Reads a recipe file; fields that it leaves out have their defaults.

    Raises:
        UserError: the file cannot be read, was written by another version, names an unknown field (the message lists
            the nearest), or holds a value of the wrong type or beyond its limits.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a recipe ({error}): give the recipe.json of a run's folder") from None
    if isinstance(stored, dict):
        check_version(stored, path)
        stored = {key: value for key, value in stored.items() if key != "version"}
    return build(Recipe, stored, str(path))


def check_version(stored: dict[str, Any], path: Path) -> None:
    """Checks that a recipe's JSON object, read from ``path`` in a run's folder, is in this version's format.

    Raises:
        UserError: says what can still be done with the run.
    """
    optimization = stored.get("optimization")
    if "version" not in stored and isinstance(optimization, dict) and "polyak" in optimization:
        files = [path.parent / name for name in ("model.safetensors", "checkpoints/last.safetensors")]
        weights = next((file for file in files if file.exists()), files[0])
        raise UserError(
            f"{path.parent} was made by an earlier version (mlp-mixer): its weights can be used (mixer evaluate, "
            f"predict, finetune, or mixer train --weights {weights}), but it cannot be resumed"
        )
    if stored.get("version", VERSION) != VERSION:
        raise UserError(f"{path} has version {stored['version']!r}: this allmlp reads version {VERSION}, so update it")


def build(kind: type, stored: Any, where: str) -> Any:
    """A dataclass from parsed JSON; each field's type is checked."""
    if not isinstance(stored, dict):
        names = ", ".join(field.name for field in dataclasses.fields(kind))
        raise UserError(f"{where}: {stored!r} should be an object with the fields {names}")
    hints = typing.get_type_hints(kind)
    for key in stored:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 3) or list(hints)
            raise UserError(f"{where}: unknown field {key!r}; the nearest: {', '.join(near)}")
    return kind(**{key: convert(hints[key], value, f"{where}: {key}") for key, value in stored.items()})


def convert(hint: Any, value: Any, where: str) -> Any:
    """The value as its type hint says: a section, a list, one of the choices, or a number, text or None."""
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} = {brief(value)}: should be a list")
        return tuple(convert(typing.get_args(hint)[0], item, where) for item in value)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    sequence = next((kind for kind in kinds if typing.get_origin(kind) is tuple), None)
    if sequence is not None and value is not None:
        return convert(sequence, value, where)
    choices = [choice for kind in kinds if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]
    if choices:
        choices += [None] * (type(None) in kinds)
        if value not in choices:
            raise UserError(f"{where} = {brief(value)}: use one of {', '.join(map(repr, choices))}")
        return value
    if float in kinds and type(value) is int and abs(value) < 10**300:
        return float(value)
    if value is None and type(None) in kinds:
        return None
    if type(value) not in kinds:
        raise UserError(f"{where} = {brief(value)}: should be {' or '.join(kind.__name__ for kind in kinds)}")
    return value
