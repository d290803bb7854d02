"""From a recipe's name and the fields given for it, by keyword or as options, to the recipe of a run."""

import dataclasses
import difflib
import os
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from allmlp.config.limits import flag
from allmlp.config.recipe import (
    MODEL_SIZES,
    DataRecipe,
    FinetuneRecipe,
    ModelRecipe,
    OptimizationRecipe,
    Recipe,
    RunRecipe,
    SearchRecipe,
)
from allmlp.config.serialize import convert, from_json
from allmlp.errors import UserError
from allmlp.recipes import RECIPES, get_recipe

Overrides = dict[str, dict[str, Any]]  # section → field → value, of the fields given

SECTIONS: dict[str, type] = {
    "model": ModelRecipe,
    "data": DataRecipe,
    "optimization": OptimizationRecipe,
    "run": RunRecipe,
}
FINETUNE_SECTIONS = {"search": SearchRecipe, **SECTIONS}
FINETUNE_MODEL_FIELDS = ("frozen", "dropout", "stochastic_depth", "rescale")  # and image_size: one number, or two


def base_recipe(recipe: str | Recipe | None, data: str, resumed: Path | None = None) -> Recipe:
    """The recipe as given, or of this name; None: that of the run to resume, or the one that suits the data."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is None and resumed is not None:
        return recipe_of_run(resumed)
    return get_recipe(recipe or (data if data in RECIPES else "photos"))


def recipe_of_run(folder: Path) -> Recipe:
    if not (folder / "recipe.json").is_file():
        raise UserError(f"--resume {folder}: there is no run, or it stopped before it began; name its folder, or auto")
    return from_json(folder / "recipe.json")


def by_section(fields: Mapping[str, Any], sections: Mapping[str, type]) -> Overrides:
    """Keywords sorted into the recipe's sections, with values of the fields' types.

    Raises:
        UserError: an unknown keyword (the message names the nearest), or a value of the wrong type.
    """
    hints = {section: typing.get_type_hints(kind) for section, kind in sections.items()}
    known = {name: section for section, names in hints.items() for name in names}
    given: Overrides = {section: {} for section in sections}
    for name, value in fields.items():
        if name not in known:
            raise unknown_keyword(name, known)
        section = known[name]
        given[section][name] = converted(hints[section][name], value, name)
    return given


def unknown_keyword(name: str, known: Iterable[str]) -> UserError:
    near = difflib.get_close_matches(name, known, 3)
    return UserError(f"unknown keyword {name!r}: the nearest are {', '.join(near or sorted(known))}")


def converted(hint: Any, value: Any, name: str) -> Any:
    """The value as a recipe stores it: paths as text, numpy's numbers as Python's, sequences as tuples."""
    if isinstance(value, list | tuple):
        value = [os.fspath(item) if isinstance(item, os.PathLike) else item for item in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if hasattr(value, "tolist"):  # a number or array of numpy
        value = value.tolist()
    return convert(hint, value, name)


def override(recipe: Recipe, model: ModelRecipe, given: Overrides) -> Recipe:
    """The recipe with another model section, and with the fields given for its other sections.

    ``epochs`` alone replaces the recipe's own ``steps``, and ``evaluate_every_epochs`` alone its
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

    A name replaces the recipe's own sizes. Weights replace the whole section.
    """
    if given.get("model"):
        check_no_weights(given["model"])
        sizes = dict.fromkeys(MODEL_SIZES)
        return dataclasses.replace(model, **({"image_size": 224} | sizes | given))
    if given.get("weights"):
        return dataclasses.replace(ModelRecipe(image_size=None), **given)
    return dataclasses.replace(model, **given)


def check_no_weights(name: str) -> None:
    """Raises a UserError for the name of published weights where that of a model is needed."""
    from allmlp.weights.named import NAMED  # imports torch, which a --help need not do

    if name.lower() in NAMED:
        raise UserError(f"--model {name} names published weights: give --weights {name}, or mixer finetune {name}")


def override_search(search: SearchRecipe, given: Overrides) -> SearchRecipe:
    """The search with the fields given. One ``learning_rate`` replaces the search."""
    fields = given["search"]
    if "learning_rate" in given["optimization"]:
        if "learning_rates" in fields:
            raise UserError("both --learning-rate and --learning-rates: give one rate, or several to choose from")
        fields = fields | {"learning_rates": ()}
    return dataclasses.replace(search, **fields)


def override_finetune(plan: FinetuneRecipe, weights: str, given: Overrides) -> FinetuneRecipe:
    """The recipe for these weights, with the fields given. ``image_size`` is (), (side,) or (height, width)."""
    model = given["model"]
    if "image_size" in model:
        height, width = height_and_width(model["image_size"]) if model["image_size"] else (None, None)
        model = model | {"image_size": height, "image_width": None if width == height else width}
    recipe = override(plan.recipe, dataclasses.replace(plan.recipe.model, weights=weights, **model), given)
    return FinetuneRecipe(recipe=recipe, search=override_search(plan.search, given))


def linear_plan(plan: FinetuneRecipe, given: Overrides) -> FinetuneRecipe:
    """The recipe of a run with a linear head: frozen weights, no search, no augmentation.

    Where the recipe has no validation images of its own, those on which it would try learning rates are used.

    Raises:
        UserError: fields are given that only training by steps has.
    """
    if steps := [flag(name) for section in ("search", "optimization") for name in given[section]]:
        raise UserError(f"{', '.join(steps)} with a linear head (--head linear), which takes no steps: leave it out")
    data = dataclasses.replace(
        plan.recipe.data, train_crop="none", flip=False, randaugment=None, color_jitter=0.0, mixup=None, cutmix=None
    )
    if "val_fraction" not in given["data"]:
        data = dataclasses.replace(data, val_fraction=data.val_fraction or plan.search.search_fraction)
    model = dataclasses.replace(plan.recipe.model, frozen=True)
    return FinetuneRecipe(recipe=dataclasses.replace(plan.recipe, model=model, data=data))


def check_data(recipe: Recipe) -> None:
    """Raises a UserError for a fine-tuning recipe that does not name its data."""
    if not recipe.data.data:
        raise UserError("no --data: name the images to fine-tune on (cifar10, pets, …, a folder, or a .zip of one)")


def height_and_width(size: tuple[int, ...]) -> tuple[int, int]:
    """The value of ``--image-size``, one number or two, as (height, width)."""
    if len(size) not in (1, 2):
        raise UserError(f"--image-size {' '.join(map(str, size))}: give one number of pixels, or two, height and width")
    return size[0], size[-1]
