"""Recipes by name, each made by a function; the paper's also have a small version, NAME-small."""

import difflib
from collections.abc import Callable, Mapping
from typing import TypeVar

from allmlp.config.recipe import FinetuneRecipe, Recipe
from allmlp.errors import UserError
from allmlp.recipes.cifar10 import cifar10
from allmlp.recipes.digits import digits
from allmlp.recipes.finetune import FINETUNE
from allmlp.recipes.photos import photos
from allmlp.recipes.pretrain import PRETRAIN
from allmlp.recipes.small import small, small_finetune
from allmlp.recipes.vtab import VTAB

T = TypeVar("T")

RECIPES: dict[str, Callable[[], Recipe]] = {
    "digits": digits,
    "cifar10": cifar10,
    "photos": photos,
    **PRETRAIN,
    **{f"{name}-small": lambda make=make: small(make()) for name, make in PRETRAIN.items()},
}
FINETUNE_RECIPES: dict[str, Callable[[], FinetuneRecipe]] = {
    **FINETUNE,
    **VTAB,
    **{f"{name}-small": lambda make=make: small_finetune(make()) for name, make in (FINETUNE | VTAB).items()},
}


def get_recipe(name: str) -> Recipe:
    """The training recipe with this name; for an unknown one, a UserError that names the nearest."""
    return find(RECIPES, name)()


def get_finetune_recipe(name: str) -> FinetuneRecipe:
    """The fine-tuning recipe with this name; for an unknown one, a UserError that names the nearest."""
    return find(FINETUNE_RECIPES, name)()


def find(recipes: Mapping[str, T], name: str) -> T:
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, 2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"unknown recipe {name!r}: {hint}there are {list_names(recipes)}")
    return recipes[name]


def list_names(recipes: Mapping[str, object]) -> str:
    """The recipes' names in one line; those of small versions are left out."""
    return ", ".join(name for name in recipes if not name.endswith("-small"))
