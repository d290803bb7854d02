"""Options that override a recipe's fields: only those given count, and some replace others."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest

from allmlp.api.recipe import override, override_finetune, override_model
from allmlp.cli.arguments import SYNONYMS, option_names
from allmlp.cli.commands import evaluate, finetune, predict, train
from allmlp.cli.overrides import recipe_groups
from allmlp.cli.training import recipe_or_data
from allmlp.config.recipe import ModelRecipe, Recipe
from allmlp.errors import UserError
from allmlp.recipes import RECIPES, get_finetune_recipe, get_recipe

SECTIONS = ("model", "data", "optimization", "run")


def trained(*words: str) -> Recipe:
    """The recipe of ``mixer train WORDS``."""
    arguments, given = train.parse_arguments(words)
    recipe = train.choose_recipe(arguments, given)
    return override(recipe, override_model(recipe.model, given["model"]), given)


def transferred(*words: str) -> Any:
    """The recipe of ``mixer finetune w.npz WORDS``."""
    arguments, given = finetune.parse_arguments(["w.npz", *words])
    return override_finetune(get_finetune_recipe(arguments.recipe), arguments.weights, given)


def given(*words: str) -> dict[str, dict[str, Any]]:
    return {section: fields for section, fields in train.parse_arguments(words)[1].items() if fields}


def test_only_what_was_given_is_returned() -> None:
    assert given() == {}
    assert given("imagenet-b16", "--out", "x", "--json") == {}
    assert given("--epochs", "60") == {"optimization": {"epochs": 60}}  # though it is the default
    assert given("--no-flip") == {"data": {"flip": False}}
    assert given("--flip", "--loss", "sigmoid", "--keep=best") == {
        "data": {"flip": True},
        "optimization": {"loss": "sigmoid"},
        "run": {"keep": "best"},
    }
    assert given("--steps", "None", "--clip-norm", "2") == {"optimization": {"steps": None, "clip_norm": 2.0}}
    assert given("--global_batch_size", "8", "--ema_decay=0.9") == {
        "optimization": {"global_batch_size": 8, "ema_decay": 0.9}
    }


@pytest.mark.parametrize("words", [("--lr", "0.5", "-b", "8"), ("--batch-size=8", "--lr=0.5"), ("--batch_size", "8")])
def test_customary_names_are_understood(words: tuple[str, ...]) -> None:
    fields = given(*words)["optimization"]
    assert fields == {"global_batch_size": 8} | ({"learning_rate": 0.5} if len(words) != 2 or "=" in words[0] else {})
    assert transferred(*words).recipe.optimization.global_batch_size == 8
    assert transferred("--lr", "0.2").search.learning_rates == ()


@pytest.mark.parametrize(
    ("option", "ours"),
    [
        ("--img-size", "--image-size"),
        ("--img_size=224", "--image-size"),
        ("--wd", "--weight-decay"),
        ("--bs", "--global-batch-size"),
        ("--num_train_epochs", "--epochs"),
        ("-j", "--workers"),
        ("--output_dir", "--out"),
        ("--drop-path", "--stochastic-depth"),
    ],
)
def test_options_of_other_programs_are_told_by_ours(option: str, ours: str) -> None:
    for verb in (train, finetune):
        with pytest.raises(UserError, match=rf"unknown option {option.partition('=')[0]}: did you mean {ours}\?"):
            verb.parse_arguments(["x", option, "3"])


def test_synonyms_name_options_that_exist() -> None:
    known = {name for group in recipe_groups(Recipe()).values() for name in option_names(group)}
    known |= {name for verb in (train, finetune, evaluate, predict) for name in option_names(verb.Arguments)}
    assert SYNONYMS.keys() <= known
    assert not known & {other for words in SYNONYMS.values() for other in words.split()}


MEANINGS: list[tuple[str, str | None, str | None, str]] = [  # word, the recipe, the data, what is told
    ("flowers/", None, "flowers/", ""),
    ("photos/", None, "photos/", ""),
    ("digits/", None, "digits/", ""),
    ("./flowers", None, "./flowers", ""),
    ("flowers\\", None, "flowers", ""),
    ("/nowhere", None, "/nowhere", ""),
    ("flowers", None, "flowers", "taken as --data flowers"),
    ("flowers.zip", None, "flowers.zip", "taken as --data flowers.zip"),
    ("deep/er", None, "deep/er", "taken as --data deep/er"),
    ("photos", "photos", None, "for the folder of that name, give photos/"),
    ("digits", "digits", None, "for the folder of that name, give digits/"),
    ("cifar10", "cifar10", None, ""),
    ("b16", "b16", None, ""),  # which is unknown, and told as such
]


@pytest.mark.parametrize(("word", "recipe", "data", "told"), MEANINGS)
def test_a_recipe_or_the_data(
    word: str, recipe: str | None, data: str | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("photos", "flowers", "pets", "digits", "deep/er"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "flowers.zip").touch()
    fields: dict[str, dict[str, Any]] = {"data": {}}
    choice = recipe_or_data(word, RECIPES, fields)
    assert (choice.recipe, fields["data"].get("data")) == (recipe, data)
    assert told in choice.note
    assert bool(told) == bool(choice.note)
    if data is not None:
        with pytest.raises(UserError, match="and --data other: give one of them"):
            recipe_or_data(word, RECIPES, {"data": {"data": "other"}})
    with pytest.raises(UserError, match="give --data pets for the data set, or pets/ for the folder"):
        recipe_or_data("pets", RECIPES, {"data": {}})


def test_every_field_is_an_option_with_its_docstring_as_help(mixer) -> None:
    groups = recipe_groups(Recipe())
    text = " ".join(mixer("train", "--help").out.replace("│", " ").split())
    for section in SECTIONS:
        names = [field.name for field in dataclasses.fields(getattr(Recipe(), section))]
        assert option_names(groups[section]) == [f"--{name.replace('_', '-')}" for name in names]
        for name, hint in typing.get_type_hints(groups[section], include_extras=True).items():
            (option,) = hint.__metadata__
            assert len(option.help) > 10, name
            assert option.help.split(";")[0] in text


@pytest.mark.parametrize("name", ["digits", "photos", "imagenet-b16", "jft-h14", "imagenet-b16-small"])
def test_without_options_a_recipe_is_itself(name: str) -> None:
    assert trained(name) == get_recipe(name)


def test_a_field_given_replaces_that_field_alone() -> None:
    recipe = get_recipe("digits")
    assert trained("digits", "--seed", "3") == dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, seed=3))


def test_a_variant_replaces_the_recipes_sizes() -> None:
    model = trained("digits", "--model", "B/16", "--dropout", "0.5").model
    assert model == ModelRecipe(model="B/16", image_size=224, dropout=0.5)
    assert trained("digits", "--model", "B/16", "--image-size", "32").model.image_size == 32
    assert trained("digits", "--model", "B/16", "--num-blocks", "2").model.num_blocks == 2


def test_weights_replace_the_model_section() -> None:
    assert trained("imagenet-b16", "--weights", "w.npz").model == ModelRecipe(weights="w.npz", image_size=None)
    model = trained("imagenet-b16", "--weights", "w.npz", "--image-size", "448", "--frozen").model
    assert model == ModelRecipe(weights="w.npz", image_size=448, frozen=True)
    with pytest.raises(UserError, match="--model and --weights: "):
        trained("--weights", "w.npz", "--model", "B/16")


def test_epochs_alone_replace_steps() -> None:
    assert transferred("pets").recipe.optimization.steps == 500
    assert transferred("pets", "--epochs", "3").recipe.optimization.steps is None
    assert transferred("pets", "--epochs", "3", "--steps", "7").recipe.optimization.steps == 7


def test_evaluations_by_epochs_alone_replace_those_by_steps() -> None:
    assert transferred("pets").recipe.run.evaluate_every_steps == 100
    run = transferred("pets", "--evaluate-every-epochs", "2").recipe.run
    assert (run.evaluate_every_epochs, run.evaluate_every_steps) == (2, None)
    run = transferred("pets", "--evaluate-every-epochs", "2", "--evaluate-every-steps", "5").recipe.run
    assert run.evaluate_every_steps == 5


def test_one_learning_rate_replaces_the_search() -> None:
    assert transferred().search.learning_rates == (0.003, 0.01, 0.03, 0.06)
    plan = transferred("--learning-rate", "0.2")
    assert (plan.recipe.optimization.learning_rate, plan.search.learning_rates) == (0.2, ())
    assert transferred("--learning-rates", "0.2", "0.1").search.learning_rates == (0.2, 0.1)
    with pytest.raises(UserError, match="both --learning-rate and --learning-rates"):
        transferred("--learning-rate", "0.2", "--learning-rates", "0.1")


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ((), (224, None)),
        (("--image-size", "448"), (448, None)),
        (("--image-size", "224", "448"), (224, 448)),
        (("--image-size",), (None, None)),
    ],
    ids=str,
)
def test_the_size_of_a_transfer(words: tuple[str, ...], size: tuple[int | None, int | None]) -> None:
    model = transferred("pets", *words).recipe.model
    assert (model.image_size, model.image_width, model.weights) == (*size, "w.npz")


def test_the_recipe_may_follow_options() -> None:
    assert trained("--seed", "1", "cifar10").name == "cifar10"
    assert transferred("--seed", "1", "pets").recipe.name == "finetune-pets"
