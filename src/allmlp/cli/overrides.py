"""Command-line options for the fields of a recipe. Those that are given override its values (see api/recipe.py)."""

import typing
from typing import Annotated, Any, NamedTuple

import tyro

from allmlp.cli.docstrings import field_docstrings
from allmlp.config.recipe import Recipe

ALIASES = {"learning_rate": ("--lr",), "global_batch_size": ("--batch-size", "-b")}  # customary names of fields


class Option(NamedTuple):
    """One option of the command line; ``default`` is only shown, in its help."""

    hint: Any
    help: str
    default: Any


def options_of(section: Any) -> dict[str, Option]:
    """An option for each field of a recipe's section: docstrings are the help, the section's values the defaults."""
    kind = type(section)
    help_texts = field_docstrings(kind.__module__)[kind.__name__]
    hints = typing.get_type_hints(kind)
    return {name: Option(hint, help_texts[name], getattr(section, name)) for name, hint in hints.items()}


def option_group(title: str | None, options: dict[str, Option]) -> Any:
    """A TypedDict of optional keys for these options: parsing one returns only the keys that were given."""
    fields = {
        name: Annotated[
            option.hint,
            tyro.conf.arg(help=option.help, help_behavior_hint=show_default(option.default), aliases=ALIASES.get(name)),
        ]
        for name, option in options.items()
    }
    group: Any = typing.TypedDict("OptionGroup", fields, total=False)  # pyright: ignore
    group.__doc__ = title
    return group


def recipe_groups(recipe: Recipe) -> dict[str, Any]:
    """An option group for each section of a recipe."""
    return {name: section_group(getattr(recipe, name)) for name in ("model", "data", "optimization", "run")}


def section_group(section: Any) -> Any:
    return option_group(type(section).__doc__, options_of(section))


def show_default(value: Any) -> str:
    if value in ("", ()):
        return "(required)" if value == "" else "(default: none)"
    return f"(default: {' '.join(map(str, value)) if isinstance(value, tuple) else value})"
