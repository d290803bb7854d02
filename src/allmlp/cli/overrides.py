"""Command-line options for the fields of a recipe. The options that are given override the recipe's values."""

import dataclasses
import typing
from typing import Annotated, Any, NamedTuple

import tyro

from allmlp.cli.docstrings import field_docstrings
from allmlp.config.recipe import ModelRecipe, Recipe, SearchRecipe
from allmlp.errors import UserError

Overrides = dict[str, dict[str, Any]]  # section → field → value, of the options given


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
        name: Annotated[option.hint, tyro.conf.arg(help=option.help, help_behavior_hint=show_default(option.default))]
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


def override(recipe: Recipe, model: ModelRecipe, given: Overrides) -> Recipe:
    """The recipe with another model section, and with the fields given for its other sections.

    ``--epochs`` alone replaces the recipe's own ``steps``, and ``--evaluate-every-epochs`` alone its
    ``evaluate_every_steps``.
    """
    optimization, run = given["optimization"], given["run"]
    if "epochs" in optimization:
        optimization = {"steps": None} | optimization
    if "evaluate_every_epochs" in run:
        run = {"evaluate_every_steps": None} | run
    return dataclasses.replace(
        recipe,
        model=model,
        data=dataclasses.replace(recipe.data, **given["data"]),
        optimization=dataclasses.replace(recipe.optimization, **optimization),
        run=dataclasses.replace(recipe.run, **run),
    )


def override_model(model: ModelRecipe, given: dict[str, Any]) -> ModelRecipe:
    """The model section with the fields given.

    A variant replaces the recipe's own sizes. Weights replace the whole section.
    """
    if given.get("model"):
        sizes = dict.fromkeys(("patch_size", "num_blocks", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim"))
        return dataclasses.replace(model, **({"image_size": 224} | sizes | given))
    if given.get("weights"):
        return dataclasses.replace(ModelRecipe(image_size=None), **given)
    return dataclasses.replace(model, **given)


def override_search(search: SearchRecipe, given: Overrides) -> SearchRecipe:
    """The search with the fields given. One ``--learning-rate`` replaces the search."""
    fields = given["search"]
    if "learning_rate" in given["optimization"]:
        if "learning_rates" in fields:
            raise UserError("both --learning-rate and --learning-rates: give one rate, or several to choose from")
        fields = fields | {"learning_rates": ()}
    return dataclasses.replace(search, **fields)
