"""Recipes: what they hold, that they are read back as they were, and what is said of wrong ones."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from small_runs import evaluator_of

from allmlp.config.limits import flag
from allmlp.config.recipe import (
    DataRecipe,
    FinetuneRecipe,
    LossName,
    ModelRecipe,
    OptimizationRecipe,
    Recipe,
    RunRecipe,
    SearchRecipe,
)
from allmlp.config.serialize import from_json, to_json_object
from allmlp.data.sources import load_source
from allmlp.errors import UserError
from allmlp.recipes import RECIPES, get_recipe
from allmlp.training.build import build_initializer
from allmlp.training.run import train

LOSS_NAMES = ", ".join(map(repr, get_args(LossName)))
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
        "steps": None,
        "global_batch_size": 4096,
        "micro_batch_size": None,
        "recompute": False,
        "loss": "softmax",
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.999,
        "warmup_steps": 10_000,
        "decay": "linear",
        "clip_norm": 1.0,
        "label_smoothing": 0.0,
        "ema_decay": None,
    }
    assert (recipe.model.image_size, recipe.model.gelu, recipe.model.dropout) == (224, None, 0)
    assert (recipe.data.crop, recipe.data.crop_ratio, recipe.data.train_crop) == ("resmall", 224 / 256, "inception")
    assert recipe.data.flip


def test_what_is_not_asked_for_is_off() -> None:
    data, run = Recipe().data, Recipe().run
    assert (data.randaugment, data.randaugment_layers, data.color_jitter) == (None, 2, 0.0)
    assert (data.mixup, data.cutmix, data.mix_group_size, data.holdout) == (None, None, 8, 0.0)
    assert (run.keep, run.patience, run.evaluate_every_steps) == ("last", None, None)
    assert (Recipe().model.head_bias, Recipe().model.frozen) == (0.0, False)
    assert (SearchRecipe().learning_rates, SearchRecipe().seeds) == ((), 1)


def test_the_default_recipe_is_sound_and_read_back_as_it_was(tmp_path: Path) -> None:
    assert from_json(write(tmp_path, to_json_object(Recipe()))) == Recipe()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_sound_and_read_back_as_it_was(name: str, tmp_path: Path) -> None:
    recipe = get_recipe(name)
    assert recipe.name == name
    assert from_json(write(tmp_path, to_json_object(recipe))) == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_a_model(name: str) -> None:
    recipe = get_recipe(name)
    with torch.device("meta"):
        model = build_initializer(recipe)(load_source("digits").classes)
    assert model.image_size == (recipe.model.image_size,) * 2
    assert model.metadata.classes == tuple("0123456789")
    assert model.metadata.preprocessing.crop_ratio == recipe.data.crop_ratio


@pytest.mark.parametrize(("wrong", "near"), [("digit", "digits"), ("cifar", "cifar10"), ("photo", "photos")])
def test_an_unknown_recipe_is_told_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"unknown recipe '{wrong}': did you mean {near}\? there are digits, cifar10,"):
        get_recipe(wrong)


def test_changed_fields_are_read_back(tmp_path: Path) -> None:
    recipe = changed("data", data="a folder/ü", workers=3, flip=False)
    recipe = dataclasses.replace(recipe, name="mine", optimization=OptimizationRecipe(clip_norm=None, epochs=0.5))
    assert from_json(write(tmp_path, to_json_object(recipe))) == recipe


NEW = {  # fields that the first version's recipe.json does not have, none of them at its default
    "model": {"head_bias": -6.9, "frozen": True, "weights": "w.npz", "image_size": None},
    "data": {
        "randaugment": 15.0, "randaugment_layers": 3, "color_jitter": 0.4, "mixup": 0.5, "cutmix": 1.0,
        "mix_group_size": 4, "holdout": 0.2,
    },
    "optimization": {
        "steps": 7, "global_batch_size": 32, "micro_batch_size": 8, "recompute": True, "loss": "sigmoid",
        "ema_decay": 0.999,
    },
    "run": {"keep": "best", "patience": 3, "precision": "float16", "evaluate_every_steps": 50},
}  # fmt: skip


def test_the_new_fields_are_read_back(tmp_path: Path) -> None:
    recipe = Recipe(**{section: SECTIONS[section](**fields) for section, fields in NEW.items()})
    stored = to_json_object(recipe)
    assert from_json(write(tmp_path, stored)) == recipe
    for section, fields in NEW.items():
        default = getattr(Recipe(), section)
        for name, value in fields.items():
            assert stored[section][name] == value != getattr(default, name), f"{name} is not told from its default"
    assert from_json(write(tmp_path, NEW)) == recipe


FIRST_VERSION = {  # digits, as version 0.1.0 wrote it
    "name": "digits",
    "model": {
        "model": None, "weights": None, "image_size": 8, "image_width": None, "patch_size": 2, "num_blocks": 4,
        "hidden_dim": 64, "tokens_mlp_dim": 32, "channels_mlp_dim": 256, "gelu": None, "dropout": 0.0,
        "stochastic_depth": 0.0, "rescale": False,
    },
    "data": {
        "data": "digits", "val_fraction": 0.1, "test_fraction": 0.2, "split_seed": 0, "crop": "resmall",
        "crop_ratio": 1.0, "interpolation": "bilinear", "train_crop": "pad", "crop_padding": 1, "flip": False,
        "max_pixels": 64000000, "max_unreadable_fraction": 0.01, "workers": None,
    },
    "optimization": {
        "optimizer": "adamw", "epochs": 60, "global_batch_size": 64, "learning_rate": 0.003, "momentum": 0.9,
        "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.999, "warmup_steps": 100, "decay": "cosine", "clip_norm": 1.0,
        "label_smoothing": 0.1,
    },
    "run": {
        "seed": 0, "device": "auto", "precision": "auto", "compile": "auto", "evaluate_every_epochs": 5,
        "log_every_steps": 10,
    },
}  # fmt: skip


def test_a_recipe_of_the_first_version_means_what_it_meant(tmp_path: Path) -> None:
    """digits is still what it was then: what has come since is off by default."""
    assert from_json(write(tmp_path, FIRST_VERSION)) == get_recipe("digits")


def test_the_version_is_stored_and_read(tmp_path: Path) -> None:
    stored = to_json_object(get_recipe("digits"))
    assert stored["version"] == 1
    assert from_json(write(tmp_path, stored)) == get_recipe("digits")
    with pytest.raises(UserError, match=r"recipe\.json has version 2: this allmlp reads version 1"):
        from_json(write(tmp_path, stored | {"version": 2}))


def test_a_run_of_an_earlier_version_is_told_apart(tmp_path: Path) -> None:
    """By ``polyak``, which became ``ema_decay`` when the package was renamed."""
    earlier = to_json_object(get_recipe("digits"))
    del earlier["version"], earlier["optimization"]["ema_decay"]
    earlier["optimization"]["polyak"] = None
    message = (
        f"{tmp_path} was made by an earlier version (mlp-mixer): its weights can be used (mixer evaluate, predict, "
        f"finetune, or mixer train --weights {tmp_path / 'model.safetensors'}), but it cannot be resumed"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        from_json(write(tmp_path, earlier))
    with pytest.raises(UserError, match="optimization: unknown field 'polyak'; the nearest: "):
        from_json(write(tmp_path, earlier | {"version": 1}))


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
        ({"data": {"rand_augment": 15}}, "data: unknown field 'rand_augment'; the nearest: randaugment"),
        ({"data": {"mix_up": 0.5}}, "data: unknown field 'mix_up'; the nearest: mixup"),
        ({"data": {"hold_out": 0.1}}, "data: unknown field 'hold_out'; the nearest: holdout"),
        ({"optimization": {"microbatch_size": 8}}, "optimization: unknown field 'microbatch_size'; the nearest: micro"),
        ({"optimization": {"ema_decai": 0.9}}, "optimization: unknown field 'ema_decai'; the nearest: ema_decay"),
        ({"run": {"patients": 2}}, "run: unknown field 'patients'; the nearest: patience"),
        ({"search": {}}, "unknown field 'search'; the nearest: name, model, data, optimization, run"),
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
        ({"optimization": {"steps": 2.5}}, "optimization: steps = 2.5: should be int or NoneType"),
        (
            {"optimization": {"loss": "hinge"}},
            f"optimization: loss = 'hinge': use one of {', '.join(map(repr, get_args(LossName)))}",
        ),
        ({"data": {"mixup": "0.5"}}, "data: mixup = '0.5': should be float or NoneType"),
        ({"data": {"randaugment_layers": 2.0}}, "data: randaugment_layers = 2.0: should be int"),
        ({"model": {"frozen": 1}}, "model: frozen = 1: should be bool"),
        ({"run": {"keep": "first"}}, "run: keep = 'first': use one of 'last', 'best'"),
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


BELOW_ONE = [
    *("val_fraction", "test_fraction", "dropout", "stochastic_depth", "label_smoothing", "beta1", "beta2", "momentum"),
    *("ema_decay", "holdout"),
]
ABOVE_ZERO = ["epochs", "learning_rate", "clip_norm", "evaluate_every_epochs", "mixup", "cutmix"]
COUNTS_FROM_ONE = [
    *("image_size", "image_width", "global_batch_size", "max_pixels", "log_every_steps", "steps", "micro_batch_size"),
    *("mix_group_size", "randaugment_layers", "patience", "evaluate_every_steps"),
]
FROM_ZERO = ["weight_decay", "max_unreadable_fraction", "color_jitter"]
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
    + [("randaugment", value) for value in (-0.1, 100.5, NAN, INF)]
    + [("learning_rate", 1e31)]
    + [("head_bias", value) for value in (NAN, INF, -INF)]
    + [("seed", 2**32)],
)
def test_a_value_out_of_range_names_flag_and_value(name: str, value: float, tmp_path: Path) -> None:
    section, stored = section_of(name), to_json_object(Recipe())
    message = re.escape(f"--{name.replace('_', '-')} {value}: must be ")
    with pytest.raises(UserError, match=message):
        SECTIONS[section](**{name: value})
    with pytest.raises(UserError, match=message):
        changed(section, **{name: value})
    stored[section][name] = value
    with pytest.raises(UserError, match=message):
        from_json(write(tmp_path, stored))


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in BELOW_ONE for value in (0.0, 0.99)]
    + [(name, 1e-9) for name in ABOVE_ZERO]
    + [(name, 1) for name in COUNTS_FROM_ONE]
    + [(name, 0.0) for name in FROM_ZERO]
    + [(name, 0) for name in COUNTS_FROM_ZERO]
    + [("crop_ratio", 1.0), ("clip_norm", None), ("workers", None), ("seed", 2**31 - 1)]
    + [("randaugment", 0.0), ("randaugment", 100.0), ("head_bias", -10.0), ("learning_rate", 1e30)]
    + [
        (name, None)
        for name in ("randaugment", "mixup", "cutmix", "steps", "micro_batch_size", "ema_decay", "patience")
    ],
)
def test_values_at_the_limits_are_allowed(name: str, value: float | None) -> None:
    section = section_of(name)
    assert getattr(getattr(changed(section, **{name: value}), section), name) == value


def test_flags_are_fields_with_dashes() -> None:
    assert flag("learning_rate") == "--learning-rate"


@pytest.mark.parametrize("name", ["/somewhere/else", "../up", "", "a/b", ".hidden"])
def test_a_name_that_is_no_folders_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="names a folder"):
        dataclasses.replace(get_recipe("digits"), name=name)


# Micro-batches


MIXES = [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}]


def batches(whole: int, part: int, group: int = 8, **data: Any) -> Recipe:
    return Recipe(
        data=DataRecipe(mix_group_size=group, **data),
        optimization=OptimizationRecipe(global_batch_size=whole, micro_batch_size=part),
    )


@pytest.mark.parametrize(
    ("part", "near"), [(5, {4, 6, 3}), (7, {6, 8, 4}), (25, {24, 12, 8}), (100, {24, 12, 8})], ids=str
)
def test_micro_batches_divide_the_batch(part: int, near: set[int], tmp_path: Path) -> None:
    message = f"--micro-batch-size {part}: must divide --global-batch-size 24; the nearest: "
    with pytest.raises(UserError, match=f"^{re.escape(message)}") as caught:
        batches(24, part)
    told = {int(number) for number in str(caught.value).removeprefix(message).split(", ")}
    assert told == near
    stored = {"optimization": {"global_batch_size": 24, "micro_batch_size": part}}
    with pytest.raises(UserError, match=re.escape(message)):
        from_json(write(tmp_path, stored))
    for better in told:
        batches(24, better)


@pytest.mark.parametrize("mixes", MIXES, ids=str)
def test_micro_batches_hold_whole_groups_that_mix(mixes: dict[str, float]) -> None:
    """Else an image's partner would be another one, and the result depend on the memory."""
    for part in (1, 2, 3, 4, 6, 12):
        said = rf"--micro-batch-size {part}: .* whole groups of 8 .*--mix-group-size.*; the nearest: (8, 24|24, 8)$"
        with pytest.raises(UserError, match=said):
            batches(24, part, **mixes)
        batches(24, part)
    for part in (8, 24):
        batches(24, part, **mixes)
    for part in (4, 12):
        batches(24, part, group=4, **mixes)


@pytest.mark.parametrize(("whole", "group"), [(20, 8), (12, 5), (4, 8)])
def test_a_batch_without_whole_groups_is_taken_whole(whole: int, group: int) -> None:
    batches(whole, whole, group, mixup=0.5)
    for part in (1, 2):
        with pytest.raises(UserError, match=rf"^--micro-batch-size {part}: .*; the nearest: {whole}$"):
            batches(whole, part, group, mixup=0.5)


# What goes only with something else


@pytest.mark.parametrize("model", [{}, {"model": "B/16"}], ids=str)
def test_frozen_without_weights_is_a_mistake(model: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--frozen without --weights: "):
        changed("model", frozen=True, **model)
    with pytest.raises(UserError, match="--frozen without --weights: "):
        from_json(write(tmp_path, {"model": {"frozen": True, **model}}))
    changed("model", frozen=True, weights="w.npz")


def fine_tuned(**search: Any) -> FinetuneRecipe:
    return FinetuneRecipe(recipe=get_recipe("digits"), search=SearchRecipe(**search))


@pytest.mark.parametrize(
    ("search", "message"),
    [({"learning_rates": (0.01, rate)}, f"--learning-rates 0.01 {rate}: each must be above 0")
     for rate in (0.0, -0.1, NAN, INF)]
    + [({"learning_rates": (0.01, 0.02, 0.01)}, "--learning-rates 0.01 0.02 0.01: one rate is given twice")]
    + [({"search_fraction": value}, f"--search-fraction {value}: must be above 0 and below 1")
       for value in (0.0, 1.0, -0.1, 1.5, NAN)]
    + [({"seeds": value}, f"--seeds {value}: must be at least 1") for value in (0, -1)]
    + [({"seeds": 2**31 + 1}, f"--seeds {2**31 + 1}: added to --seed 0, must be at most {2**31}")],
    ids=str,
)  # fmt: skip
def test_a_search_out_of_range_names_flag_and_value(search: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        fine_tuned(**search)


def test_searches_at_the_limits_are_allowed() -> None:
    for search in ({"learning_rates": ()}, {"learning_rates": (1e-9,)}, {"search_fraction": 0.999}, {"seeds": 2**31}):
        assert fine_tuned(**search).search == SearchRecipe(**search)


def test_the_last_seed_of_a_transfer_is_a_seed() -> None:
    recipe = dataclasses.replace(get_recipe("digits"), run=RunRecipe(seed=2**31 - 2))
    FinetuneRecipe(recipe=recipe, search=SearchRecipe(seeds=2))
    with pytest.raises(UserError, match=f"--seeds 3: added to --seed {2**31 - 2}, must be at most {2**31}"):
        FinetuneRecipe(recipe=recipe, search=SearchRecipe(seeds=3))


def test_the_recipe_of_a_transfer_is_checked_too() -> None:
    with pytest.raises(UserError, match="--learning-rate -1: must be above 0"):
        FinetuneRecipe(recipe=changed("optimization", learning_rate=-1))


class Silent:
    def update(self, done: int, total: int, text: str) -> None:
        raise AssertionError("a step was made")


@pytest.mark.parametrize("choice", [{"keep": "best"}, {"patience": 2}], ids=str)
def test_choosing_by_validation_needs_validation_images(choice: dict[str, Any], tmp_path: Path) -> None:
    recipe = get_recipe("digits")
    recipe = dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, val_fraction=0.0), run=RunRecipe(device="cpu", **choice)
    )
    (name,) = choice
    with pytest.raises(UserError, match=rf"--{name}.* needs validation .* give a --val-fraction above 0"):
        train(recipe, tmp_path / "run", evaluator_of(lambda *_, **__: None), Silent())
    assert not (tmp_path / "run").exists()
