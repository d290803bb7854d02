"""What to train: one function a recipe, by name."""

import difflib
from collections.abc import Callable

from mlp_mixer.errors import UserError
from mlp_mixer.recipes.cifar10 import cifar10
from mlp_mixer.recipes.digits import digits
from mlp_mixer.recipes.photos import photos
from mlp_mixer.training.recipe import Recipe

RECIPES: dict[str, Callable[[], Recipe]] = {"digits": digits, "cifar10": cifar10, "photos": photos}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name; a UserError, with the nearest, for one that does not exist."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, 2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"unknown recipe {name!r}: {hint}there are {', '.join(RECIPES)}")
    return RECIPES[name]()
