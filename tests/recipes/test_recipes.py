"""The paper's recipes: every number of Table 4 and of the fine-tuning, and twins that do the same on a laptop."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_runs import EVEN, Silent, evaluator_of

import allmlp
from allmlp.config.recipe import FinetuneRecipe, Recipe
from allmlp.errors import UserError
from allmlp.recipes import FINETUNE_RECIPES, RECIPES, get_finetune_recipe, get_recipe
from allmlp.recipes.vtab import resolution, vtab
from allmlp.runs.result import RunResult
from allmlp.training.build import build_initializer
from allmlp.training.run import train

OWN = ("digits", "cifar10", "photos")
CLASSES = tuple("0123456789")

# Table 4; name: (model, epochs, learning rate, weight decay, RandAugment, mixup, stochastic depth, bias of the head)
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
    "imagenet": (20_000, 500, 0.01), "cifar10": (10_000, 500, 0.02), "cifar100": (10_000, 500, 0.02),
    "pets": (500, 100, 0.1), "flowers102": (500, 100, 0.1),
}  # fmt: skip

# VTAB's tasks at 448 pixels, and at 224
VTAB = {
    "natural": ("caltech101 dtd flowers102 pets sun397", "cifar100 svhn"),
    "specialized": ("pcam resisc45 retinopathy", "eurosat"),
    "structured": (
        "clevr-count clevr-distance dmlab kitti-distance smallnorb-azimuth smallnorb-elevation",
        "dsprites-location dsprites-orientation",
    ),
}
TASKS = {
    task: (group, pixels)
    for group, sizes in VTAB.items()
    for tasks, pixels in zip(sizes, (448, 224), strict=True)
    for task in tasks.split()
}


def changed(recipe: Recipe, section: str, **fields: Any) -> Recipe:
    return dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **fields)})


def assert_has(section: Any, **fields: Any) -> None:
    assert {name: getattr(section, name) for name in fields} == fields


def test_each_of_the_papers_runs_has_a_recipe_and_each_recipe_a_twin() -> None:
    assert set(RECIPES) == {*OWN, *TABLE_4, *(f"{name}-small" for name in TABLE_4)}
    transfers = ["photos", *FINE_TUNING, *(f"vtab-{task}" for task in TASKS)]
    assert set(FINETUNE_RECIPES) == {*transfers, *(f"{name}-small" for name in transfers)}
    assert len(TASKS) == 19
    assert all(get_finetune_recipe(name).recipe.name == f"finetune-{name}" for name in FINETUNE_RECIPES)
    for name in OWN:
        with torch.device("meta"):
            model = build_initializer(get_recipe(name))(CLASSES)
        assert model.metadata.preprocessing.crop_ratio == get_recipe(name).data.crop_ratio


@pytest.mark.parametrize(
    ("find", "wrong", "near"),
    [
        (get_recipe, "imagenet-b16-smal", "imagenet-b16-small"), (get_recipe, "digit", "digits"),
        (get_finetune_recipe, "vtab-svnh", "vtab-svhn"), (get_finetune_recipe, "flowers", "flowers102"),
    ],
)  # fmt: skip
def test_an_unknown_recipe_is_told_the_nearest(find: Any, wrong: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"'{wrong}': did you mean .*{near}.*\? there are ") as caught:
        find(wrong)
    listed = str(caught.value).partition("there are ")[2].split(", ")
    assert not [name for name in listed if name.endswith("-small")]  # they are implied
    assert {*listed, *(f"{name}-small" for name in listed)} >= set(RECIPES if find is get_recipe else FINETUNE_RECIPES)


# Pre-training: Table 4, Section 3 and the authors' code


@pytest.mark.parametrize("name", TABLE_4)
def test_pretraining_is_the_papers(name: str) -> None:
    recipe = get_recipe(name)
    model, data, settings = recipe.model, recipe.data, recipe.optimization
    table = (settings.epochs, settings.learning_rate, settings.weight_decay, data.randaugment, data.mixup)
    assert (model.model, *table, model.stochastic_depth, model.head_bias) == TABLE_4[name]
    assert_has(model, image_size=224, image_width=None, dropout=0.0, rescale=False, gelu=None)
    assert_has(settings, optimizer="adamw", beta1=0.9, beta2=0.999, clip_norm=1.0, global_batch_size=4096, steps=None)
    assert_has(settings, warmup_steps=10_000, decay="linear", loss="sigmoid", label_smoothing=0.0, ema_decay=None)
    assert_has(data, train_crop="inception", flip=True, crop="resmall", crop_ratio=224 / 256, interpolation="bilinear")
    assert_has(data, randaugment_layers=2, cutmix=None, color_jitter=0.0, holdout=0.0)
    assert recipe.run.keep == ("best" if name.startswith("jft") else "last")  # Section 3.3: early stopping
    assert data.val_fraction > 0
    if name == "jft-s32":  # the others take as long as their models are large
        with torch.device("meta"):
            built, plain = build_initializer(recipe)(CLASSES), allmlp.create(model.model, num_classes=10)
        assert built.config == plain.config


# Fine-tuning


def assert_section_3(plan: FinetuneRecipe, batch: int = 512, decay: str = "cosine") -> None:
    """What all of the paper's fine-tuning shares."""
    settings, model, data = plan.recipe.optimization, plan.recipe.model, plan.recipe.data
    assert_has(settings, optimizer="sgd", momentum=0.9, global_batch_size=batch, weight_decay=0.0, clip_norm=1.0)
    assert_has(settings, decay=decay, loss="softmax", label_smoothing=0.0, ema_decay=None)
    assert_has(model, dropout=0.0, stochastic_depth=0.0, head_bias=0.0, frozen=False)
    assert_has(data, randaugment=None, mixup=None, cutmix=None, color_jitter=0.0)
    assert_has(data, val_fraction=0.0, holdout=0.0)  # in the end, all training images are trained on


@pytest.mark.parametrize("name", [*FINE_TUNING, "photos"])
def test_fine_tuning_is_the_papers(name: str) -> None:
    """On one's own photos: the same search, in batches for a small machine."""
    plan = get_finetune_recipe(name)
    settings, data, search = plan.recipe.optimization, plan.recipe.data, plan.search
    assert_section_3(plan, batch=64 if name == "photos" else 512)
    assert search.learning_rates == (0.003, 0.01, 0.03, 0.06)
    assert (data.train_crop, data.flip) == ("inception", True)
    assert (data.crop, data.crop_ratio, data.interpolation) == (None, None, None)  # images are seen as the weights did
    if name == "photos":
        assert (settings.epochs, settings.steps, search.search_fraction, search.seeds) == (10, None, 0.1, 1)
        assert plan.recipe.model.image_size is None  # that of the weights
        return
    assert (settings.steps, settings.warmup_steps, search.search_fraction) == FINE_TUNING[name]
    assert (search.seeds, plan.recipe.model.image_size) == (3, 224)
    assert data.data == ("" if name == "imagenet" else name)
    assert plan.recipe.run.evaluate_every_steps == FINE_TUNING[name][0] // 5  # not at each of a small set's passes


@pytest.mark.parametrize("task", TASKS)
def test_vtab_is_as_the_bit_hyperrule_and_section_3_say(task: str) -> None:
    (group, pixels), plan = TASKS[task], get_finetune_recipe(f"vtab-{task}")
    assert_section_3(plan, decay="staircase")
    assert (plan.recipe.optimization.steps, plan.recipe.optimization.warmup_steps) == (500, 100)
    search = plan.search
    assert (search.learning_rates, search.search_fraction, search.seeds) == ((0.003, 0.01, 0.03), 0.2, 3)
    data = plan.recipe.data
    assert (plan.recipe.model.image_size, data.flip) == (pixels, group != "structured")
    assert (data.train_crop, data.crop, data.crop_ratio) == ("none", "resize", 1.0)  # the whole image, at every time


def test_small_images_and_long_runs_of_vtab() -> None:
    """The area counts, not the side, and 96 × 96 is not small."""
    assert [resolution(*size) for size in ((96, 96), (95, 96), (1, 96 * 96), (64, 143))] == [448, 224, 448, 224]
    plan = vtab("dtd", schedule="vit")
    assert_section_3(plan)
    assert (plan.recipe.optimization.steps, plan.recipe.optimization.warmup_steps) == (2500, 500)
    assert plan.recipe.run.evaluate_every_steps == 500


# The twins

SIZES = {
    "model": "model image_size patch_size num_blocks hidden_dim tokens_mlp_dim channels_mlp_dim head_bias",
    "data": "data val_fraction",
    "optimization": "epochs steps global_batch_size",
    "run": "evaluate_every_epochs evaluate_every_steps",
}


def methods(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """All of a recipe that is no size: augmentation, loss, optimizer, schedule, mixing, regularization, the kept."""
    return {
        section: {name: value for name, value in vars(getattr(recipe, section)).items() if name not in sizes.split()}
        for section, sizes in SIZES.items()
    }


def test_a_twin_has_every_method_of_its_original() -> None:
    for name in TABLE_4:
        recipe, twin = get_recipe(name), get_recipe(f"{name}-small")
        assert methods(twin) == methods(recipe)
        assert twin.model.head_bias < 0  # as the loss asks for, though for ten classes
        settings = twin.optimization
        assert (twin.data.data, settings.epochs, settings.global_batch_size) == ("digits", 40, 64)
    for name in FINETUNE_RECIPES:
        if not name.endswith("-small"):
            plan, small = get_finetune_recipe(name), get_finetune_recipe(f"{name}-small")
            assert methods(small.recipe) == methods(plan.recipe)
            assert (small.search.learning_rates, small.search.seeds) == (plan.search.learning_rates, plan.search.seeds)
            assert small.recipe.model.image_size is None  # that of the weights, however small
            assert (small.recipe.optimization.steps, small.recipe.optimization.global_batch_size) == (20, 16)


def one_step(recipe: Recipe, out: Path) -> RunResult[Any]:
    """Trains the recipe's first step; the evaluations are made up."""
    laptop = {"device": "cpu", "precision": "float32", "compile": "off"}
    recipe = changed(changed(recipe, "optimization", steps=1), "run", **laptop)
    evaluate = evaluator_of(lambda *_, **__: SimpleNamespace(top1=0.5, loss=1.0, majority=EVEN, unreadable={}))
    done = train(recipe, out, evaluate, Silent())
    start = build_initializer(recipe)(done.data.classes)
    assert done.summary["steps"] == 1
    assert any(not torch.equal(a, b) for a, b in zip(done.model.parameters(), start.parameters(), strict=True))
    assert all(parameter.isfinite().all() for parameter in done.model.parameters())
    return done


@pytest.mark.parametrize("name", ["imagenet-b16", "imagenet21k-l16", "jft-h14"])
def test_a_twin_trains(name: str, tmp_path: Path) -> None:
    twin, original = get_recipe(f"{name}-small"), get_recipe(name)
    done = one_step(twin, tmp_path / "run")
    assert done.summary["images"]["val"] > 0
    assert [block.token_drop_path.rate for block in done.model.blocks] == [0.0, original.model.stochastic_depth]
    # at the start the logits are the head's bias alone, so the loss is what the sigmoid makes of it, mixed or not
    bias = torch.tensor(twin.model.head_bias)
    expected = 10 * torch.nn.functional.softplus(bias) - bias
    assert done.metrics[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["photos-small", "pets-small", "vtab-svhn-small"])
def test_a_fine_tuning_twin_trains(name: str, tmp_path: Path) -> None:
    sizes = {"patch_size": 4, "num_blocks": 1, "hidden_dim": 8, "tokens_mlp_dim": 4, "channels_mlp_dim": 8}
    allmlp.save(allmlp.create(num_classes=3, image_size=8, **sizes), tmp_path / "w.safetensors", classes=list("abc"))
    plan = get_finetune_recipe(name)
    recipe = changed(plan.recipe, "model", weights=str(tmp_path / "w.safetensors"))
    searched = changed(recipe, "data", holdout=plan.search.search_fraction)
    for one, splits in ((recipe, {"train", "test"}), (searched, {"train", "val"})):
        done = one_step(one, tmp_path / "-".join(sorted(splits)))
        assert done.metrics[0]["loss"] == pytest.approx(torch.tensor(10.0).log().item(), rel=1e-5)  # a head of zeros
        assert set(done.data.splits) == splits
