"""Recipes: what they hold, that they are read back as they were, and what is said of wrong ones."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_runs import evaluator_of

from allmlp.config.limits import Limits
from allmlp.config.recipe import (
    DataRecipe,
    FinetuneRecipe,
    ModelRecipe,
    OptimizationRecipe,
    Recipe,
    RunRecipe,
    SearchRecipe,
)
from allmlp.config.serialize import from_json, to_json_object
from allmlp.errors import UserError
from allmlp.recipes import RECIPES, get_recipe
from allmlp.training.run import train

SECTIONS = {"model": ModelRecipe, "data": DataRecipe, "optimization": OptimizationRecipe, "run": RunRecipe}
NAN, INF = math.nan, math.inf
PROPERTY = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run") / "recipe.json"


def read(path: Path, content: Any) -> Recipe:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return from_json(path)


# Defaults and limits

LIMITS: dict[str, list[str]] = {  # in words → fields
    "at_least=0 below=1": [
        "val_fraction", "test_fraction", "dropout", "stochastic_depth", "label_smoothing", "beta1", "beta2", "momentum",
        "ema_decay", "holdout",
    ],
    "above=0": [
        "epochs", "clip_norm", "evaluate_every_epochs", "mixup", "cutmix", "image_size", "image_width", "steps",
        "global_batch_size", "max_pixels", "log_every_steps", "micro_batch_size", "mix_group_size", "patience",
        "randaugment_layers", "evaluate_every_steps", "save_every_steps",
    ],
    "at_least=0": [
        "weight_decay", "max_unreadable_fraction", "color_jitter", "warmup_steps", "crop_padding", "workers",
    ],
    "above=0 at_most=1e30": ["learning_rate"], "above=0 at_most=1": ["crop_ratio"], "": ["head_bias"],
    "at_least=0 at_most=100": ["randaugment"], f"at_least=0 below={2**31}": ["seed"],
}  # fmt: skip
VALUES = [NAN, INF, -INF, -1, 0, 1e-9, 0.5, 1, 1.01, 100, 100.5, 1e30, 1e31, 2**31 - 1, 2**31]
COMPARE = {"above": float.__gt__, "at_least": float.__ge__, "below": float.__lt__, "at_most": float.__le__}


def test_defaults_are_the_papers_and_what_is_not_asked_for_is_off() -> None:
    model, data, optimization, run = (kind() for kind in SECTIONS.values())
    assert (model.image_size, model.gelu, model.dropout, model.head_bias, model.frozen) == (224, None, 0, 0.0, False)
    assert (data.crop, data.crop_ratio, data.train_crop, data.flip) == ("resmall", 224 / 256, "inception", True)
    assert (data.randaugment, data.randaugment_layers, data.color_jitter) == (None, 2, 0.0)
    assert (data.mixup, data.cutmix, data.mix_group_size, data.holdout) == (None, None, 8, 0.0)
    assert (run.keep, run.patience, run.evaluate_every_steps) == ("last", None, None)
    assert (SearchRecipe().learning_rates, SearchRecipe().seeds) == ((), 1)
    assert (optimization.optimizer, optimization.beta1, optimization.beta2) == ("adamw", 0.9, 0.999)
    assert (optimization.epochs, optimization.global_batch_size, optimization.warmup_steps) == (300, 4096, 10_000)
    assert (optimization.learning_rate, optimization.weight_decay, optimization.clip_norm) == (1e-3, 0.1, 1.0)
    assert (optimization.loss, optimization.decay, optimization.label_smoothing) == ("softmax", "linear", 0.0)
    assert (optimization.steps, optimization.micro_batch_size, optimization.ema_decay) == (None, None, None)


@PROPERTY
@given(st.sampled_from([(limits, name) for limits, names in LIMITS.items() for name in names]), st.sampled_from(VALUES))
def test_a_value_beyond_its_limits_names_flag_and_value(field: tuple[str, str], value: float) -> None:
    limits, name = field
    (kind,) = (kind for kind in SECTIONS.values() if name in {f.name for f in dataclasses.fields(kind)})
    bounds = [bound.split("=") for bound in limits.split()]
    if math.isfinite(value) and all(COMPARE[word](float(value), float(bound)) for word, bound in bounds):
        assert getattr(kind(**{name: value}), name) == value
    else:
        with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} {re.escape(str(value))}: must be "):
            kind(**{name: value})


def test_a_hint_and_each_of_several_values() -> None:
    assert str(Limits(above=0, at_most=1, hint="0.5 is usual")) == "above 0 and at most 1; 0.5 is usual"
    with pytest.raises(UserError, match=r"--learning-rates 0\.01 -1: each must be above 0"):
        SearchRecipe(learning_rates=(0.01, -1))


# Files


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_read_back_as_it_was(name: str, path: Path) -> None:
    recipe = get_recipe(name)
    assert recipe.name == name
    assert read(path, to_json_object(recipe)) == recipe


CHANGED = {
    "model": {"head_bias": -6.9, "frozen": True, "weights": "ü/w.npz", "image_size": None},
    "data": {"randaugment": 15.0, "mixup": 0.5, "cutmix": 1.0, "workers": 3, "flip": False, "holdout": 0.2},
    "optimization": {"steps": 7, "global_batch_size": 32, "micro_batch_size": 8, "loss": "sigmoid", "clip_norm": None},
    "run": {"keep": "best", "patience": 3, "precision": "float16", "evaluate_every_steps": 50},
}


def test_changed_and_missing_fields(path: Path) -> None:
    recipe = Recipe(name="mine", **{section: SECTIONS[section](**fields) for section, fields in CHANGED.items()})
    assert read(path, to_json_object(recipe)) == recipe == read(path, {"name": "mine", **CHANGED})
    assert read(path, {}) == Recipe()
    whole = read(path, {"optimization": {"epochs": 3, "clip_norm": 2}}).optimization
    assert (type(whole.epochs), whole.clip_norm) == (float, 2.0)
    for name in ("../up", "", "a/b", ".hidden"):
        with pytest.raises(UserError, match="names a folder"):
            Recipe(name=name)


SINCE_THE_FIRST = {  # fields that version 0.1.0 did not have
    "model": "head_bias frozen", "optimization": "steps micro_batch_size recompute loss ema_decay",
    "data": "randaugment randaugment_layers color_jitter mixup cutmix mix_group_size holdout",
    "run": "evaluate_every_steps keep patience save_every_steps wandb",
}  # fmt: skip


def test_versions(path: Path) -> None:
    """What has come since the first is off by default; a run of mlp-mixer is known by ``polyak``, now ``ema_decay``."""
    stored = to_json_object(get_recipe("digits"))
    sections = {
        key: {k: v for k, v in stored[key].items() if k not in new.split()} for key, new in SINCE_THE_FIRST.items()
    }
    assert read(path, {"name": "digits", **sections}) == get_recipe("digits")
    assert stored["version"] == 1
    with pytest.raises(UserError, match=r"recipe\.json has version 2: .* version 1"):
        read(path, stored | {"version": 2})
    del stored["optimization"]["ema_decay"]
    stored["optimization"]["polyak"] = None
    with pytest.raises(UserError, match="optimization: unknown field 'polyak'"):
        read(path, stored)
    del stored["version"]
    with pytest.raises(
        UserError, match=rf"^{path.parent} .*earlier version.*{path.parent}/model\.safetensors.*resumed$"
    ):
        read(path, stored)


NEAREST: list[tuple[Any, str]] = [
    ({"modle": {}}, "unknown field 'modle'; the nearest: model"),
    ({"search": {}}, "unknown field 'search'; the nearest: name, model, data, optimization, run"),
    ({"optimization": {"learningrate": 1}}, "optimization: unknown field 'learningrate'; the nearest: learning_rate"),
    ({"run": {"xyzzy": 1}}, "run: unknown field 'xyzzy'; the nearest: seed, device, precision, compile"),
]  # fmt: skip
TYPES: list[tuple[Any, str]] = [
    *[({"run": {"seed": value}}, f"run: seed = {value!r}: should be int") for value in ("3", 3.0, True, None)],
    ({"data": {"flip": 1}}, "data: flip = 1: should be bool"),
    ({"data": {"workers": "2"}}, "data: workers = '2': should be int or NoneType"),
    *[({"optimization": {"epochs": value}}, f"epochs = {value!r}: should be float") for value in ("3", True)],
    *[
        ({"optimization": {"decay": value}}, f"decay = {value!r}: use one of 'linear'")
        for value in ("step", ["linear"])
    ],
    ({"name": 3}, "name = 3: should be str"),
    ({"model": "B/16"}, "'B/16' should be an object with the fields model, weights, image_size"),
    ([], "[] should be an object with the fields name, model, data, optimization, run"),
]


@pytest.mark.parametrize(("content", "message"), NEAREST + TYPES)
def test_a_wrong_field_or_type_is_named(content: Any, message: str, path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read(path, content)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_is_no_recipe(tmp_path: Path) -> None:
    for content in (b"", b"{", b"seed: 3", b"\xed\xa0\x80"):
        (tmp_path / "recipe.json").write_bytes(content)
        for file in (tmp_path / "recipe.json", tmp_path / "none.json", tmp_path):
            with pytest.raises(UserError, match=r"is not a recipe .*recipe\.json"):
                from_json(file)


# Fields that depend on one another


@PROPERTY
@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.sampled_from([2, 4, 5, 8]),
    st.sampled_from([{}, {"mixup": 0.5}, {"cutmix": 1.0}]),
)
def test_micro_batches_divide_the_batch_and_hold_whole_groups(batch: int, part: int, group: int, mixes: dict) -> None:
    """Else an image's partner would be another one, and the result depend on the memory."""

    def make(size: int) -> Recipe:
        optimization = OptimizationRecipe(global_batch_size=batch, micro_batch_size=size)
        return Recipe(data=DataRecipe(mix_group_size=group, **mixes), optimization=optimization)

    if part == batch or (batch % part == 0 and (not mixes or part % group == 0)):
        make(part)
        return
    with pytest.raises(UserError, match=f"^--micro-batch-size {part}: .*--global-batch-size {batch}") as caught:
        make(part)
    assert ("--mix-group-size" in str(caught.value)) == bool(mixes)
    nearest = [int(size) for size in str(caught.value).rpartition("the nearest: ")[2].split(", ")]
    assert 1 <= len(nearest) <= 3
    for size in nearest:
        make(size)


def test_what_goes_only_with_something_else(path: Path) -> None:
    for fields in ({"frozen": True}, {"frozen": True, "model": "B/16"}):
        with pytest.raises(UserError, match="--frozen without --weights"):
            read(path, {"model": fields})
    with pytest.raises(UserError, match="--patch-size and --weights"):
        ModelRecipe(weights="w.npz", patch_size=4)
    with pytest.raises(UserError, match=r"--mix-group-size 1: .*at least 2"):
        DataRecipe(mixup=0.5, mix_group_size=1)
    assert not DataRecipe().mixes


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"learning_rates": (0.01, 0.02, 0.01)}, "--learning-rates 0.01 0.02 0.01: one rate is given twice"),
        *[({"search_fraction": n}, f"--search-fraction {n}: must be above 0 and below 1") for n in (0.0, 1.0)],
        ({"seeds": 0}, "--seeds 0: must be at least 1"),
        ({"seeds": 3}, f"--seeds 3: added to --seed {2**31 - 2}, must be at most {2**31}"),
    ],
)  # fmt: skip
def test_a_search_out_of_range_names_flag_and_value(search: dict[str, Any], message: str) -> None:
    recipe = Recipe(run=RunRecipe(seed=2**31 - 2))
    FinetuneRecipe(recipe=recipe, search=SearchRecipe(seeds=2, learning_rates=(1e-9,), search_fraction=0.999))
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        FinetuneRecipe(recipe=recipe, search=SearchRecipe(**search))


@pytest.mark.parametrize("choice", [{"keep": "best"}, {"patience": 2}], ids=str)
def test_choosing_by_validation_needs_validation_images(choice: dict[str, Any], tmp_path: Path) -> None:
    recipe = get_recipe("digits")
    data, run = dataclasses.replace(recipe.data, val_fraction=0.0), RunRecipe(device="cpu", **choice)
    with pytest.raises(UserError, match=rf"--{next(iter(choice))}.*--val-fraction above 0"):
        train(dataclasses.replace(recipe, data=data, run=run), tmp_path / "run", evaluator_of(print), print)  # type: ignore
    assert not (tmp_path / "run").exists()
