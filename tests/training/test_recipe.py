"""Recipes: what they hold, that they are read back as they were, and what is said of wrong ones."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mlp_mixer.data.sources import load_source
from mlp_mixer.errors import UserError
from mlp_mixer.recipes import RECIPES, get_recipe
from mlp_mixer.training.recipe import (
    DataRecipe,
    ModelRecipe,
    OptimizationRecipe,
    Recipe,
    RunRecipe,
    check,
    flag,
    from_json,
    to_json_object,
)
from mlp_mixer.training.start import prepare

SECTIONS = {"model": ModelRecipe, "data": DataRecipe, "optimization": OptimizationRecipe, "run": RunRecipe}


def write(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "recipe.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def changed(section: str, **fields: Any) -> Recipe:
    recipe = Recipe()
    return dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **fields)})


def test_defaults_are_the_papers() -> None:
    recipe = Recipe()
    optimization = dataclasses.asdict(recipe.optimization)
    assert optimization == {
        "optimizer": "adamw",
        "momentum": 0.9,
        "epochs": 300,
        "global_batch_size": 4096,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.999,
        "warmup_steps": 10_000,
        "decay": "linear",
        "clip_norm": 1.0,
        "label_smoothing": 0.0,
    }
    assert (recipe.model.image_size, recipe.model.gelu, recipe.model.dropout) == (224, None, 0)
    assert (recipe.data.crop, recipe.data.crop_ratio, recipe.data.train_crop) == ("resmall", 224 / 256, "inception")
    assert recipe.data.flip


def test_the_default_recipe_is_sound_and_read_back_as_it_was(tmp_path: Path) -> None:
    assert from_json(write(tmp_path, to_json_object(Recipe()))) == Recipe()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_sound_and_read_back_as_it_was(name: str, tmp_path: Path) -> None:
    recipe = get_recipe(name)
    assert check(recipe) is recipe
    assert recipe.name == name
    assert from_json(write(tmp_path, to_json_object(recipe))) == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_a_model(name: str) -> None:
    recipe = get_recipe(name)
    with torch.device("meta"):
        model = prepare(recipe)(load_source("digits").classes)
    assert model.image_size == (recipe.model.image_size,) * 2
    assert model.card.classes == tuple("0123456789")
    assert model.card.preprocessing.crop_ratio == recipe.data.crop_ratio


@pytest.mark.parametrize(("wrong", "near"), [("digit", "digits"), ("cifar", "cifar10"), ("photo", "photos")])
def test_an_unknown_recipe_is_told_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"unknown recipe '{wrong}': did you mean {near}\? there are digits, cifar10,"):
        get_recipe(wrong)


def test_changed_fields_are_read_back(tmp_path: Path) -> None:
    recipe = changed("data", data="a folder/ü", workers=3, flip=False)
    recipe = dataclasses.replace(recipe, name="mine", optimization=OptimizationRecipe(clip_norm=None, epochs=0.5))
    assert from_json(write(tmp_path, to_json_object(recipe))) == recipe


def test_fields_left_out_have_their_defaults(tmp_path: Path) -> None:
    assert from_json(write(tmp_path, {})) == Recipe()
    assert from_json(write(tmp_path, {"run": {"seed": 4}})) == changed("run", seed=4)


def test_whole_numbers_are_numbers(tmp_path: Path) -> None:
    recipe = from_json(write(tmp_path, {"optimization": {"epochs": 3, "clip_norm": 2}}))
    assert type(recipe.optimization.epochs) is float
    assert recipe.optimization.clip_norm == 2.0


def test_recipes_are_frozen_and_by_keyword() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().run.seed = 3  # pyright: ignore
    for kind in (Recipe, *SECTIONS.values()):
        with pytest.raises(TypeError):
            kind("x")  # pyright: ignore


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"modle": {}}, "unknown field 'modle'; the nearest: model"),
        ({"optimization": {"learningrate": 1}}, "optimization: unknown field 'learningrate'; the nearest: learning_r"),
        ({"model": {"drop_out": 0.1}}, "model: unknown field 'drop_out'; the nearest: dropout"),
        ({"run": {"xyzzy": 1}}, "run: unknown field 'xyzzy'; the nearest: seed, device, precision, compile"),
    ],
)
def test_an_unknown_field_is_told_the_nearest(content: dict, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    with pytest.raises(UserError, match=f"^{re.escape(f'{path}: {message}')}"):
        from_json(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"run": {"seed": "3"}}, "run: seed = '3': should be int"),
        ({"run": {"seed": 3.0}}, "run: seed = 3.0: should be int"),
        ({"run": {"seed": True}}, "run: seed = True: should be int"),
        ({"run": {"seed": None}}, "run: seed = None: should be int"),
        ({"data": {"flip": 1}}, "data: flip = 1: should be bool"),
        ({"data": {"workers": "2"}}, "data: workers = '2': should be int or NoneType"),
        ({"optimization": {"epochs": "3"}}, "optimization: epochs = '3': should be float"),
        ({"optimization": {"epochs": True}}, "optimization: epochs = True: should be float"),
        ({"optimization": {"decay": "step"}}, "optimization: decay = 'step': use one of 'linear', 'cosine'"),
        ({"optimization": {"decay": ["linear"]}}, "optimization: decay = ['linear']: use one of"),
        ({"name": 3}, "name = 3: should be str"),
        ({"model": "B/16"}, "model: 'B/16' should be an object with the fields model, weights, image_size"),
        ([], "[] should be an object with the fields name, model, data, optimization, run"),
    ],
)
def test_a_wrong_type_names_field_value_and_type(content: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        from_json(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("content", ["", "{", "seed: 3", "\ud800"])
def test_a_file_that_is_no_json(content: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"is not a recipe .*: give the recipe\.json of a run's folder"):
        from_json(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match="is not a recipe"):
            from_json(path)


BELOW_ONE = ["val_fraction", "test_fraction", "dropout", "stochastic_depth", "label_smoothing", "beta1", "beta2"]
ABOVE_ZERO = ["epochs", "learning_rate", "clip_norm", "evaluate_every_epochs"]
COUNTS_FROM_ONE = ["image_size", "global_batch_size", "max_pixels", "log_every_steps"]
FROM_ZERO = ["weight_decay", "max_unreadable_fraction"]
COUNTS_FROM_ZERO = ["warmup_steps", "crop_padding", "workers", "seed"]
NAN, INF = float("nan"), float("inf")


def section_of(name: str) -> str:
    return next(s for s, kind in SECTIONS.items() if name in {f.name for f in dataclasses.fields(kind)})


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in BELOW_ONE for value in (-0.01, 1.0, 1.5, NAN)]
    + [(name, value) for name in ABOVE_ZERO for value in (0.0, -1.0, NAN, INF)]
    + [(name, value) for name in COUNTS_FROM_ONE for value in (0, -1)]
    + [(name, value) for name in FROM_ZERO for value in (-0.1, NAN, INF)]
    + [(name, value) for name in COUNTS_FROM_ZERO for value in (-1,)]
    + [("crop_ratio", value) for value in (0.0, -0.5, 1.01, NAN)]
    + [("seed", 2**32)],
)
def test_a_value_out_of_range_names_flag_and_value(name: str, value: float, tmp_path: Path) -> None:
    recipe = changed(section_of(name), **{name: value})
    message = re.escape(f"--{name.replace('_', '-')} {value}: must be ")
    with pytest.raises(UserError, match=message):
        check(recipe)
    with pytest.raises(UserError, match=message):
        from_json(write(tmp_path, to_json_object(recipe)))


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in BELOW_ONE for value in (0.0, 0.99)]
    + [(name, 1e-9) for name in ABOVE_ZERO]
    + [(name, 1) for name in COUNTS_FROM_ONE]
    + [(name, 0.0) for name in FROM_ZERO]
    + [(name, 0) for name in COUNTS_FROM_ZERO]
    + [("crop_ratio", 1.0), ("clip_norm", None), ("workers", None), ("seed", 2**31 - 1)],
)
def test_values_at_the_limits_are_allowed(name: str, value: float | None) -> None:
    recipe = changed(section_of(name), **{name: value})
    assert check(recipe) is recipe


def test_flags_are_fields_with_dashes() -> None:
    assert flag("learning_rate") == "--learning-rate"


@pytest.mark.parametrize("name", ["/somewhere/else", "../up", "", "a/b", ".hidden"])
def test_a_name_that_is_no_folders_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="names a folder"):
        check(dataclasses.replace(get_recipe("digits"), name=name))
