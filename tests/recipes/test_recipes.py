"""The paper's recipes: every number of Table 4 and of the fine-tuning, and twins that do the same on a laptop."""

import csv
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_runs import evaluator_of

import allmlp
from allmlp.config.recipe import FinetuneRecipe, Recipe
from allmlp.errors import UserError
from allmlp.recipes import FINETUNE_RECIPES, RECIPES, get_finetune_recipe, get_recipe
from allmlp.recipes.finetune import resolution, vtab
from allmlp.runs.result import RunResult
from allmlp.training.build import build_initializer, build_mixing, build_optimizer, build_training_transform
from allmlp.training.run import train

PAPER = Path(__file__).resolve().parents[3] / "shared" / "paper"
OWN = ("digits", "cifar10", "photos")
CLASSES = tuple("0123456789")
LAPTOP = {"device": "cpu", "precision": "float32", "compile": "off"}

# name: (model, epochs, learning rate, weight decay, RandAugment, mixup, stochastic depth, bias of the head)
TABLE_4 = {
    "imagenet-b16": ("B/16", 300, 1e-3, 0.1, 15, 0.5, 0.1, -6.9),
    "imagenet-l16": ("L/16", 300, 1e-3, 0.1, 15, 0.5, 0.1, -6.9),
    "imagenet21k-b16": ("B/16", 300, 1e-3, 0.1, 10, 0.2, 0.1, -10.0),
    "imagenet21k-l16": ("L/16", 300, 1e-3, 0.1, 20, 0.5, 0.1, -10.0),
    "jft-s32": ("S/32", 5, 3e-3, 0.03, None, None, 0.0, -10.0),
    "jft-s16": ("S/16", 5, 3e-3, 0.03, None, None, 0.0, -10.0),
    "jft-b32": ("B/32", 7, 3e-3, 0.03, None, None, 0.0, -10.0),
    "jft-b16": ("B/16", 7, 3e-3, 0.03, None, None, 0.0, -10.0),
    "jft-l32": ("L/32", 7, 1e-3, 0.03, None, None, 0.0, -10.0),
    "jft-l16-7": ("L/16", 7, 1e-3, 0.03, None, None, 0.0, -10.0),
    "jft-l16": ("L/16", 14, 1e-3, 0.03, None, None, 0.0, -10.0),
    "jft-h14": ("H/14", 14, 1e-3, 0.03, None, None, 0.0, -10.0),
}

# name: (steps, warm-up, share of the training images held out for the search)
FINE_TUNING = {
    "imagenet": (20_000, 500, 0.01),
    "cifar10": (10_000, 500, 0.02),
    "cifar100": (10_000, 500, 0.02),
    "pets": (500, 100, 0.1),
    "flowers102": (500, 100, 0.1),
}

# task: pixels
VTAB = {
    "natural": {
        "caltech101": 448, "cifar100": 224, "dtd": 448, "flowers102": 448, "pets": 448, "svhn": 224, "sun397": 448,
    },
    "specialized": {"pcam": 448, "eurosat": 224, "resisc45": 448, "retinopathy": 448},
    "structured": {
        "clevr-count": 448, "clevr-distance": 448, "dmlab": 448, "kitti-distance": 448, "dsprites-location": 224,
        "dsprites-orientation": 224, "smallnorb-azimuth": 448, "smallnorb-elevation": 448,
    },
}  # fmt: skip
TASKS = {task: (group, pixels) for group, tasks in VTAB.items() for task, pixels in tasks.items()}


def changed(recipe: Recipe, section: str, **fields: Any) -> Recipe:
    return dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **fields)})


# Which there are


def test_each_of_the_papers_runs_has_a_recipe_and_each_recipe_a_twin() -> None:
    assert set(RECIPES) == {*OWN, *TABLE_4, *(f"{name}-small" for name in TABLE_4)}
    transfers = ["photos", *FINE_TUNING, *(f"vtab-{task}" for task in TASKS)]
    assert set(FINETUNE_RECIPES) == {*transfers, *(f"{name}-small" for name in transfers)}
    assert len(TASKS) == 19
    assert [len(tasks) for tasks in VTAB.values()] == [7, 4, 8]


@pytest.mark.parametrize("name", FINETUNE_RECIPES)
def test_every_transfer_is_sound_and_named(name: str) -> None:
    assert get_finetune_recipe(name).recipe.name == f"finetune-{name}"


@pytest.mark.parametrize(
    ("find", "wrong", "near"),
    [
        (get_recipe, "imagenet-b17", "imagenet-b16"),
        (get_recipe, "imagenet-b16-smal", "imagenet-b16-small"),
        (get_recipe, "imagenet21k", "imagenet21k-"),
        (get_recipe, "jft-h1", "jft-h14"),
        (get_finetune_recipe, "pet", "pets"),
        (get_finetune_recipe, "vtab-svnh", "vtab-svhn"),
        (get_finetune_recipe, "flowers", "flowers102"),
    ],
)
def test_an_unknown_recipe_is_told_the_nearest(find: Any, wrong: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"unknown recipe '{wrong}': did you mean .*{near}.*\? there are ") as caught:
        find(wrong)
    listed = str(caught.value).partition("there are ")[2].split(", ")
    assert not [name for name in listed if name.endswith("-small")]  # they are implied
    assert {*listed, *(f"{name}-small" for name in listed)} >= set(RECIPES if find is get_recipe else FINETUNE_RECIPES)


# Table 4


@pytest.mark.parametrize("name", TABLE_4)
def test_pretraining_is_table_4(name: str) -> None:
    recipe = get_recipe(name)
    model, epochs, rate, decay, magnitude, mixup, depth, bias = TABLE_4[name]
    assert (recipe.model.model, recipe.model.dropout, recipe.model.stochastic_depth) == (model, 0.0, depth)
    assert (recipe.optimization.epochs, recipe.optimization.steps) == (epochs, None)
    assert (recipe.optimization.learning_rate, recipe.optimization.weight_decay) == (rate, decay)
    assert (recipe.data.randaugment, recipe.data.randaugment_layers, recipe.data.mixup) == (magnitude, 2, mixup)
    assert recipe.model.head_bias == bias


@pytest.mark.parametrize("name", TABLE_4)
def test_pretraining_is_section_3(name: str) -> None:
    """What all models share, in the paper's text and the authors' code."""
    recipe = get_recipe(name)
    settings = recipe.optimization
    assert (recipe.model.image_size, recipe.model.image_width, settings.global_batch_size) == (224, None, 4096)
    assert (settings.optimizer, settings.beta1, settings.beta2, settings.clip_norm) == ("adamw", 0.9, 0.999, 1.0)
    assert (settings.warmup_steps, settings.decay) == (10_000, "linear")
    assert (settings.loss, settings.label_smoothing, settings.ema_decay) == ("sigmoid", 0.0, None)
    assert (recipe.data.train_crop, recipe.data.flip) == ("inception", True)
    assert (recipe.data.crop, recipe.data.crop_ratio, recipe.data.interpolation) == ("resmall", 224 / 256, "bilinear")
    assert (recipe.data.cutmix, recipe.data.color_jitter, recipe.data.holdout) == (None, 0.0, 0.0)
    assert (recipe.model.rescale, recipe.model.gelu, recipe.model.weights) == (False, None, None)


@pytest.mark.parametrize("name", TABLE_4)
def test_only_jft_stops_early(name: str) -> None:
    """Section 3.3: the weights that are best on held-out images; elsewhere, those at the end."""
    assert get_recipe(name).run.keep == ("best" if name.startswith("jft") else "last")
    assert get_recipe(name).data.val_fraction > 0  # or nothing could tell which


@pytest.mark.parametrize("name", TABLE_4)
def test_pretraining_makes_the_model_of_table_1(name: str) -> None:
    recipe = get_recipe(name)
    with torch.device("meta"):
        model, plain = build_initializer(recipe)(CLASSES), allmlp.create(TABLE_4[name][0], num_classes=10)
    depth = recipe.model.stochastic_depth
    assert model.config == plain.config | {"stochastic_depth": depth}
    assert model.blocks[0].token_drop_path.rate == 0.0
    assert model.blocks[-1].token_drop_path.rate == depth


DATA_SETS = {"ImNet": "imagenet-", "ImNet-21k": "imagenet21k-", "JFT-300M": "jft-"}


def test_table_4_cell_by_cell() -> None:
    path = PAPER / "table4.csv"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    seen: dict[str, list[float]] = {}
    for row in rows:
        letter = row["model"].removeprefix("Mixer-")
        names = [
            name
            for name in TABLE_4
            if name.startswith(DATA_SETS[row["dataset"]]) and (get_recipe(name).model.model or "")[0] == letter
        ]
        assert names, row
        for name in names:
            recipe = get_recipe(name)
            settings, data, model = recipe.optimization, recipe.data, recipe.model
            assert settings.learning_rate == float(row["learning_rate"]), name
            assert settings.weight_decay == float(row["weight_decay"]), name
            assert data.randaugment == (float(row["randaugment_magnitude"]) if row["randaugment_magnitude"] else None)
            assert data.mixup == (float(row["mixup_strength_p"]) if row["mixup_strength_p"] else None), name
            assert model.dropout == float(row["dropout_rate"] or 0), name
            assert model.stochastic_depth == float(row["stochastic_depth_max_rate"] or 0), name
            seen.setdefault(f"{row['model']} {row['dataset']}", []).append(settings.epochs)
        assert set(seen[f"{row['model']} {row['dataset']}"]) == set(map(float, row["epochs"].split("/"))), row
    assert sum(map(len, seen.values())) == len(TABLE_4)  # none of ours is not in the table


# Fine-tuning


def assert_section_3(plan: FinetuneRecipe, batch: int = 512) -> None:
    """What all of the paper's fine-tuning shares."""
    settings = plan.recipe.optimization
    assert (settings.optimizer, settings.momentum, settings.global_batch_size) == ("sgd", 0.9, batch)
    assert (settings.weight_decay, settings.clip_norm, settings.decay) == (0.0, 1.0, "cosine")
    assert (settings.loss, settings.label_smoothing, settings.ema_decay) == ("softmax", 0.0, None)
    model, data = plan.recipe.model, plan.recipe.data
    assert (model.dropout, model.stochastic_depth, model.head_bias, model.frozen) == (0.0, 0.0, 0.0, False)
    assert (data.randaugment, data.mixup, data.cutmix, data.color_jitter) == (None, None, None, 0.0)
    assert (data.val_fraction, data.holdout) == (0.0, 0.0)  # in the end, all training images are trained on


@pytest.mark.parametrize("name", FINE_TUNING)
def test_fine_tuning_is_the_papers(name: str) -> None:
    plan = get_finetune_recipe(name)
    settings = plan.recipe.optimization
    assert_section_3(plan)
    assert (settings.steps, settings.warmup_steps, plan.search.search_fraction) == FINE_TUNING[name]
    assert plan.search.learning_rates == (0.003, 0.01, 0.03, 0.06)
    assert plan.search.seeds == 3
    assert plan.recipe.model.image_size == 224
    assert (plan.recipe.data.train_crop, plan.recipe.data.flip) == ("inception", True)
    assert plan.recipe.data.data == ("" if name == "imagenet" else name)
    assert plan.recipe.run.evaluate_every_steps == FINE_TUNING[name][0] // 5  # not at each of a small set's passes


@pytest.mark.parametrize("task", TASKS)
def test_vtab_is_as_the_bit_hyperrule_and_section_3_say(task: str) -> None:
    group, pixels = TASKS[task]
    plan = get_finetune_recipe(f"vtab-{task}")
    assert_section_3(plan)
    assert (plan.recipe.optimization.steps, plan.recipe.optimization.warmup_steps) == (2500, 500)
    assert plan.search.learning_rates == (0.003, 0.01, 0.03)
    assert (plan.search.search_fraction, plan.search.seeds) == (0.2, 3)
    data = plan.recipe.data
    assert plan.recipe.model.image_size == pixels
    assert data.flip == (group != "structured")
    assert (data.train_crop, data.crop, data.crop_ratio) == ("none", "resize", 1.0)  # the whole image, at every time


def test_five_tasks_of_vtab_have_small_images() -> None:
    small = {task for task in TASKS if get_finetune_recipe(f"vtab-{task}").recipe.model.image_size == 224}
    assert small == {"cifar100", "svhn", "dsprites-location", "dsprites-orientation", "eurosat"}


def test_small_is_strictly_less_than_96_squared() -> None:
    assert resolution(96, 96) == 448
    assert resolution(95, 96) == resolution(32, 32) == 224
    assert resolution(1, 96 * 96) == 448
    assert resolution(64, 143) == 224  # the area counts, not the side


def test_vtab_in_500_steps_has_the_short_warm_up() -> None:
    settings = vtab("dtd", steps=500).recipe.optimization
    assert (settings.steps, settings.warmup_steps) == (500, 100)


def test_fine_tuning_on_ones_own_photos_searches_too_in_batches_for_a_small_machine() -> None:
    plan = get_finetune_recipe("photos")
    assert_section_3(plan, batch=64)
    assert plan.search.learning_rates == (0.003, 0.01, 0.03, 0.06)
    assert (plan.search.search_fraction, plan.search.seeds) == (0.1, 1)
    assert (plan.recipe.optimization.epochs, plan.recipe.optimization.steps) == (10, None)
    assert plan.recipe.model.image_size is None  # that of the weights


@pytest.mark.parametrize("name", [*FINE_TUNING, "photos"])
def test_fine_tuning_sees_images_as_the_weights_did(name: str) -> None:
    data = get_finetune_recipe(name).recipe.data
    assert (data.crop, data.crop_ratio, data.interpolation) == (None, None, None)


# The twins


SIZES = {
    "model": {
        *("model", "image_size", "patch_size", "num_blocks", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim"),
        "head_bias",
    },
    "data": {"data", "val_fraction"},
    "optimization": {"epochs", "steps", "global_batch_size"},
    "run": {"evaluate_every_epochs", "evaluate_every_steps"},
}


def methods(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """All of a recipe that is no size: augmentation, loss, optimizer, schedule, mixing, regularization, the kept."""
    return {
        section: {name: value for name, value in vars(getattr(recipe, section)).items() if name not in sizes}
        for section, sizes in SIZES.items()
    }


@pytest.mark.parametrize("name", TABLE_4)
def test_a_twin_has_every_method_of_its_original(name: str) -> None:
    recipe, twin = get_recipe(name), get_recipe(f"{name}-small")
    assert methods(twin) == methods(recipe)
    assert twin.model.head_bias < 0  # as the loss asks for, though for ten classes
    assert twin.data.data == "digits"
    assert (twin.optimization.epochs, twin.optimization.global_batch_size) == (40, 64)


@pytest.mark.parametrize("name", [name for name in FINETUNE_RECIPES if not name.endswith("-small")])
def test_a_fine_tuning_twin_has_every_method_of_its_original(name: str) -> None:
    plan, twin = get_finetune_recipe(name), get_finetune_recipe(f"{name}-small")
    assert methods(twin.recipe) == methods(plan.recipe)
    assert twin.search.learning_rates == plan.search.learning_rates
    assert twin.search.seeds == plan.search.seeds
    assert twin.recipe.model.image_size is None  # that of the weights, however small
    assert (twin.recipe.optimization.steps, twin.recipe.optimization.global_batch_size) == (20, 16)


class Silent:
    def update(self, done: int, total: int, text: str) -> None:
        pass


def one_step(recipe: Recipe, out: Path) -> RunResult[Any]:
    """Trains the recipe's first step; the evaluations are made up."""
    recipe = changed(changed(recipe, "optimization", steps=1), "run", **LAPTOP)
    return train(
        recipe, out, evaluator_of(lambda *_, **__: SimpleNamespace(top1=0.5, loss=1.0, unreadable={})), Silent()
    )


def moved(model: allmlp.Mixer, start: allmlp.Mixer) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))


@pytest.mark.parametrize("name", TABLE_4)
def test_a_twin_trains(name: str, tmp_path: Path) -> None:
    twin, original = get_recipe(f"{name}-small"), get_recipe(name)
    done = one_step(twin, tmp_path / "run")
    assert done.summary["steps"] == 1
    assert done.summary["images"]["val"] > 0
    assert done.metrics[0]["gradient_norm"] > 0
    assert moved(done.model, build_initializer(twin)(done.data.classes))
    assert all(parameter.isfinite().all() for parameter in done.model.parameters())
    assert [block.token_drop_path.rate for block in done.model.blocks] == [0.0, original.model.stochastic_depth]
    # at the start the logits are the head's bias alone, so the loss is what the sigmoid makes of it, mixed or not
    bias = torch.tensor(twin.model.head_bias)
    expected = 10 * torch.nn.functional.softplus(bias) - bias
    assert done.metrics[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["imagenet-b16", "imagenet21k-l16", "jft-h14", "jft-s32"])
def test_what_a_twin_is_trained_with_is_what_its_original_would_be(name: str) -> None:
    """As the run makes them: the view of each image, the mixing, the optimizer."""
    made = []
    for recipe in (get_recipe(name), get_recipe(f"{name}-small")):
        model = build_initializer(get_recipe(f"{name}-small"))(CLASSES)
        optimizer = build_optimizer(recipe.optimization, model)
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        made.append((build_training_transform(recipe.data, model), build_mixing(recipe.data), type(optimizer), groups))
    assert made[0] == made[1]
    view, mixing, _, _ = made[0]
    regularized = name.startswith("imagenet")
    assert (view.randaugment is not None, mixing is not None) == (regularized, regularized)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a Mixer for 8 × 8 pixels."""
    sizes = {"patch_size": 4, "num_blocks": 1, "hidden_dim": 8, "tokens_mlp_dim": 4, "channels_mlp_dim": 8}
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    allmlp.save(allmlp.create(num_classes=3, image_size=8, **sizes), path, classes=["a", "b", "c"])
    return str(path)


@pytest.mark.parametrize("name", [name for name in FINETUNE_RECIPES if name.endswith("-small")])
def test_a_fine_tuning_twin_trains(name: str, weights: str, tmp_path: Path) -> None:
    plan = get_finetune_recipe(name)
    recipe = changed(plan.recipe, "model", weights=weights)
    searched = changed(recipe, "data", holdout=plan.search.search_fraction)
    start = build_initializer(recipe)
    for folder, one in (("run", recipe), ("searched", searched)):
        done = one_step(one, tmp_path / folder)
        assert done.summary["steps"] == 1
        assert done.metrics[0]["loss"] == pytest.approx(torch.tensor(10.0).log().item(), rel=1e-5)  # a head of zeros
        assert moved(done.model, start(done.data.classes))
        assert set(done.data.splits) == ({"train", "test"} if one is recipe else {"train", "val"})
