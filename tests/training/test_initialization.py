"""Where a run starts: trained weights bit for bit, a head of zeros for the new classes, and the card that says so."""

import copy
import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference import randomise
from small_runs import evaluator_of

from allmlp.config.recipe import ModelRecipe, Recipe, RunRecipe
from allmlp.config.serialize import from_json, to_json_object
from allmlp.errors import UserError
from allmlp.metadata import Metadata, Preprocessing
from allmlp.model import Mixer
from allmlp.recipes import get_finetune_recipe
from allmlp.recipes.digits import digits
from allmlp.runs.result import RunResult
from allmlp.training.build import build_initializer, build_preprocessing
from allmlp.training.initialization import load_weights, with_new_head
from allmlp.training.run import train
from allmlp.weights.convert import save_as
from allmlp.weights.load import load
from allmlp.weights.native import save
from allmlp.weights.resize import resize

VIEW = Preprocessing(crop="resize", crop_ratio=0.7, interpolation="bicubic", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
DIGITS = tuple("0123456789")


def make(**options: Any) -> Mixer:
    """A Mixer for 8 × 8 px whose every parameter, the head's too, is random."""
    sizes = {"num_classes": 3, "image_size": 8, "patch_size": 2, "num_blocks": 2, "hidden_dim": 12}
    model = Mixer(**sizes | {"tokens_mlp_dim": 5, "channels_mlp_dim": 7} | options)
    randomise(model, seed=0)
    model.metadata = Metadata(
        classes=("x", "y", "z") if model.config["num_classes"] == 3 else None,
        preprocessing=VIEW,
        provenance={"source": {"hub": "owner/name", "revision": "abc"}, "val_top1": 0.9, "recipe": {"name": "old"}},
    )
    return model


@pytest.fixture
def weights(tmp_path: Path) -> str:
    save(make(), tmp_path / "weights.safetensors")
    return str(tmp_path / "weights.safetensors")


def changed(recipe: Recipe, section: str, **fields: Any) -> Recipe:
    return dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **fields)})


def finetune(weights: str, data: str) -> Recipe:
    recipe = get_finetune_recipe("photos").recipe
    return changed(changed(recipe, "model", weights=weights), "data", data=data)


def started(recipe: Recipe, classes: tuple[str, ...] = DIGITS) -> Mixer:
    return build_initializer(recipe)(classes)


def assert_transferred(model: Mixer, trained: Mixer, classes: int) -> None:
    """The head all zero, every other tensor bit for bit."""
    before, after = trained.state_dict(), model.state_dict()
    assert {name for name in before if not name.startswith("head.")} | {"head.weight", "head.bias"} == set(after)
    assert after["head.weight"].shape == (classes, trained.config["hidden_dim"])
    assert after["head.bias"].shape == (classes,)
    for name, tensor in after.items():
        assert tensor.isfinite().all()
        if name.startswith("head."):
            assert torch.count_nonzero(tensor) == 0, name
        else:
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor.view(torch.int32), before[name].view(torch.int32)), name


# From weights


@pytest.mark.parametrize("classes", [DIGITS, ("a", "b"), ("x", "y", "z")], ids=len)
def test_the_head_is_zero_and_the_rest_is_bit_for_bit_the_same(weights: str, classes: tuple[str, ...]) -> None:
    """Also for as many classes, and for the very same: whatever its head knew is of another dataset."""
    model = started(finetune(weights, "digits"), classes)
    assert_transferred(model, make(), len(classes))
    assert model.metadata.classes == classes
    assert model.config == make().config | {"num_classes": len(classes)}
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(model.eval().features(images), make().eval().features(images))
        assert not model(images).any()


@pytest.mark.parametrize("num_classes", [0, 3, 10])
@pytest.mark.parametrize("to", ["native", "npz", "timm"])
def test_from_every_layout_with_and_without_a_head(tmp_path: Path, to: Any, num_classes: int) -> None:
    trained, path = make(num_classes=num_classes), tmp_path / ("w.npz" if to == "npz" else "w.safetensors")
    save_as(trained, path, to)
    model = started(finetune(str(path), "digits"))
    assert_transferred(model, trained, 10)
    assert model.metadata.provenance["started_from"]["weights"] == str(path)


def test_sizes_gelu_and_epsilon_are_those_of_the_weights(tmp_path: Path) -> None:
    trained = make(gelu="erf", norm_eps=1e-5, patch_size=(2, 4), image_size=(8, 16), dropout=0.3, rescale=True)
    save(trained, tmp_path / "w.safetensors")
    recipe = changed(finetune(str(tmp_path / "w.safetensors"), "digits"), "model", stochastic_depth=0.25)
    model = started(recipe)
    assert_transferred(model, trained, 10)
    kept = {
        "num_classes": 10,
        "dropout": 0.0,
        "stochastic_depth": 0.25,
        "rescale": False,
    }
    assert model.config == trained.config | kept
    assert [block.token_drop_path.rate for block in model.blocks] == [0.0, 0.25]
    assert model.blocks[0].token_mixing.gelu.approximate == "none"


def test_all_of_it_is_trained(weights: str) -> None:
    model = started(finetune(weights, "digits"))
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    model.train()(torch.randn(4, 3, 8, 8)).logsumexp(1).sum().backward()
    assert model.head.bias.grad is not None
    assert model.head.bias.grad.abs().sum() > 0


def test_the_seed_changes_nothing_and_draws_are_none(weights: str) -> None:
    first, other = (started(changed(finetune(weights, "digits"), "run", seed=seed)) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_each_model_is_one_of_its_own(weights: str) -> None:
    start = build_initializer(finetune(weights, "digits"))
    first = start(DIGITS)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.fill_(7)
    first.metadata.provenance["started_from"]["source"]["hub"] = "changed"
    second = start(("a", "b"))
    assert_transferred(second, make(), 2)
    assert second.metadata.provenance["started_from"]["source"]["hub"] == "owner/name"
    assert_transferred(build_initializer(finetune(weights, "digits"))(DIGITS), make(), 10)


def test_frozen_trains_the_head_alone(weights: str) -> None:
    model = started(changed(finetune(weights, "digits"), "model", frozen=True))
    assert_transferred(model, make(), 10)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["head.weight", "head.bias"]


@pytest.mark.parametrize("bias", [-6.9, -10.0, 0.0])
def test_the_bias_of_the_head_is_the_recipes(weights: str, bias: float) -> None:
    """New or from weights; nothing else changes with it."""
    for plain in (digits(), finetune(weights, "digits")):
        model, without = started(changed(plain, "model", head_bias=bias)), started(plain)
        assert torch.equal(model.get_parameter("head.bias"), torch.full((10,), bias))
        assert not without.get_parameter("head.bias").any()
        assert all(
            torch.equal(parameter, without.get_parameter(name))
            for name, parameter in model.named_parameters()
            if name != "head.bias"
        )


def with_zero_head(trained: Mixer, num_classes: int, **changes: Any) -> Mixer:
    """What a run that starts from these weights starts from."""
    model = with_new_head(trained, num_classes, **changes).to_empty(device="cpu")
    load_weights(model, trained)
    return model


def test_with_zero_head_leaves_the_trained_model() -> None:
    trained = make()
    before = copy.deepcopy(trained.state_dict())
    model = with_zero_head(trained, 5, dropout=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
    assert trained.config["num_classes"] == 3
    assert model.config == trained.config | {"num_classes": 5, "dropout": 0.5}


# At another size


@pytest.mark.parametrize("size", [8, 16, 12, 6, 4])
def test_another_image_size_goes_through_resize(weights: str, size: int) -> None:
    recipe = changed(finetune(weights, "digits"), "model", image_size=size)
    model = started(recipe)
    assert model.image_size == (size, size)
    assert model.config["tokens_mlp_dim"] == (20 if size == 16 else 5)
    assert_transferred(model, resize(load(weights), size), 10)
    told = model.metadata.provenance["started_from"].get("resized_from")
    assert told == (None if size == 8 else [[8, 8]])


def test_without_a_size_it_is_that_of_the_weights(tmp_path: Path) -> None:
    save(make(image_size=(4, 12)), tmp_path / "w.safetensors")
    assert started(finetune(str(tmp_path / "w.safetensors"), "digits")).image_size == (4, 12)


# The card


def test_preprocessing_is_that_of_the_weights(weights: str) -> None:
    assert started(finetune(weights, "digits")).metadata.preprocessing == VIEW
    assert build_preprocessing(finetune(weights, "digits").data) == Preprocessing()


@pytest.mark.parametrize(
    "told", [{"crop": "resmall"}, {"crop_ratio": 1.0}, {"interpolation": "nearest"},
             {"crop": "resmall", "crop_ratio": 0.5, "interpolation": "bilinear"}],
    ids=str,
)  # fmt: skip
def test_what_the_recipe_says_of_the_view_goes_first(weights: str, told: dict[str, Any]) -> None:
    """But the normalization is the weights': their stem has learnt it."""
    recipe = changed(finetune(weights, "digits"), "data", **told)
    assert started(recipe).metadata.preprocessing == dataclasses.replace(VIEW, **told)


def test_the_card_says_where_it_started(weights: str) -> None:
    recipe = changed(finetune(weights, "digits"), "model", image_size=16)
    provenance = started(recipe).metadata.provenance
    assert provenance.keys() == {"recipe", "started_from"}  # no result of the earlier run passes for this one's
    assert provenance["recipe"] == to_json_object(recipe)
    assert provenance["started_from"] == {
        "weights": weights,
        "source": {"hub": "owner/name", "revision": "abc"},
        "before_resize": {"image_size": [8, 8], "val_top1": 0.9},
        "resized_from": [[8, 8]],
    }


def test_the_weights_of_the_recipe_are_named_whatever_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save(make(), path, weights="another file")
    assert started(finetune(str(path), "digits")).metadata.provenance["started_from"]["weights"] == str(path)


# New


def test_a_new_model_has_the_recipes_view_and_classes() -> None:
    recipe = changed(digits(), "data", crop=None, crop_ratio=None, interpolation=None)
    model = started(recipe)
    assert model.metadata.preprocessing == Preprocessing()
    assert model.metadata.classes == DIGITS
    assert model.metadata.provenance == {"recipe": to_json_object(recipe)}
    assert model.config["gelu"] == "tanh"
    assert started(changed(digits(), "model", gelu="erf")).config["gelu"] == "erf"
    assert started(digits()).metadata.preprocessing == dataclasses.replace(Preprocessing(), crop_ratio=1.0)


# Mistakes


OWN_SIZES = {
    "model": "B/16", "patch_size": 2, "num_blocks": 2, "hidden_dim": 12, "tokens_mlp_dim": 5, "channels_mlp_dim": 7,
    "gelu": "erf",
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_SIZES)
def test_sizes_beside_weights_are_a_mistake(weights: str, tmp_path: Path, name: str) -> None:
    recipe, size = finetune(weights, "digits"), {name: OWN_SIZES[name]}
    message = f"--{name.replace('_', '-')} and --weights: the weights set the sizes, so leave it out"
    with pytest.raises(UserError, match=message):
        carried_out(changed(recipe, "model", **size), tmp_path / "run")
    stored = to_json_object(recipe)
    (tmp_path / "recipe.json").write_text(json.dumps(stored | {"model": stored["model"] | size}))
    with pytest.raises(UserError, match=message):
        from_json(tmp_path / "recipe.json")
    assert not (tmp_path / "run").exists()


def test_neither_weights_nor_a_size() -> None:
    with pytest.raises(UserError, match="no --image-size: give one, or --weights to use the size of the weights"):
        build_initializer(changed(digits(), "model", image_size=None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 9}, "image size 9×9 is not a multiple of the patch size 2×2: use 8×8"),
        ({"image_size": 3}, "image size 3×3 is not a multiple of the patch size 2×2"),
        ({"weights": "gone.safetensors"}, "gone.safetensors does not exist: give a weights file"),
        ({"weights": "hf-hub:name"}, "give hf-hub:OWNER/NAME"),
    ],
    ids=str,
)
def test_mistakes_in_weights_and_size_are_told_before_data_is_read(
    weights: str, tmp_path: Path, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(finetune(weights, "no/such/data"), "model", **change)
    with pytest.raises(UserError, match=message):
        build_initializer(recipe)
    with pytest.raises(UserError, match=message):
        carried_out(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# A whole run


class Silent:
    def update(self, done: int, total: int, text: str) -> None:
        pass


def evaluated(model: Mixer, part: Any, **_options: Any) -> Any:
    return SimpleNamespace(top1=0.25, loss=2.0, unreadable={})


def carried_out(recipe: Recipe, out: Path) -> RunResult:
    return train(recipe, out, evaluator_of(evaluated), Silent())


def short(weights: str, **run: Any) -> Recipe:
    """Two steps, so small that no weight moves."""
    recipe = changed(finetune(weights, "digits"), "optimization", epochs=0.1, learning_rate=1e-30)
    recipe = changed(recipe, "data", train_crop="pad", crop_padding=1, flip=False, workers=0, val_fraction=0.1)
    return dataclasses.replace(
        recipe, run=RunRecipe(device="cpu", precision="float32", compile="off", log_every_steps=1, **run)
    )


def test_what_a_run_saves(weights: str, tmp_path: Path) -> None:
    recipe = short(weights)
    run = carried_out(recipe, tmp_path / "run")
    assert run.summary["steps"] == 2
    assert run.summary["started_from"] == weights
    assert run.metrics[0]["loss"] == pytest.approx(math.log(10), abs=1e-6)  # of a head that is zero
    for name in ("model.safetensors", "checkpoints/last.safetensors", "checkpoints/best.safetensors"):
        saved = load(tmp_path / "run" / name)
        assert saved.metadata.classes == DIGITS
        assert saved.metadata.preprocessing == VIEW
        assert saved.config == make().config | {"num_classes": 10}
        before = make().state_dict()
        for key, tensor in saved.state_dict().items():
            if key.startswith("head."):
                assert tensor.abs().max() < 1e-20
            else:
                assert torch.equal(tensor, before[key]), key
        assert saved.metadata.provenance["started_from"]["weights"] == weights
        assert saved.metadata.provenance["started_from"]["source"] == {"hub": "owner/name", "revision": "abc"}
    told = load(tmp_path / "run" / "model.safetensors").metadata.provenance
    assert (told["val_top1"], told["data"]) == (0.25, "digits")
    assert told["started_from"]["val_top1"] == 0.9


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ema_decay": 0.5},
        {"recompute": True},
        {"micro_batch_size": 16},
        {"optimizer": "adamw", "weight_decay": 0.5},
    ],
    ids=str,
)
def test_a_frozen_run_changes_the_head_and_not_a_bit_of_the_rest(
    weights: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    recipe = changed(changed(short(weights), "model", frozen=True), "optimization", learning_rate=0.1, **options)
    carried_out(recipe, tmp_path / "run")
    for name in ("model.safetensors", "checkpoints/last.safetensors"):
        tuned, before = load(tmp_path / "run" / name).state_dict(), make().state_dict()
        assert torch.count_nonzero(tuned.pop("head.weight")) > 0
        assert torch.count_nonzero(tuned.pop("head.bias")) > 0
        assert all(torch.equal(tensor, before[key]) for key, tensor in tuned.items())


def test_a_run_at_twice_the_size_and_one_from_that(weights: str, tmp_path: Path) -> None:
    recipe = changed(short(weights), "model", image_size=16)
    carried_out(recipe, tmp_path / "first")
    first = load(tmp_path / "first" / "model.safetensors")
    expected = resize(load(weights), 16).state_dict()
    assert first.image_size == (16, 16)
    assert all(torch.equal(t, expected[key]) for key, t in first.state_dict().items() if not key.startswith("head."))
    carried_out(short(str(tmp_path / "first" / "model.safetensors")), tmp_path / "second")
    second = load(tmp_path / "second" / "model.safetensors")
    assert second.image_size == (16, 16)
    origin = second.metadata.provenance["started_from"]
    assert origin["weights"].endswith("first/model.safetensors")
    assert origin["started_from"]["weights"] == weights
    assert origin["started_from"]["resized_from"] == [[8, 8]]
    assert "recipe" not in origin
    assert "resized_from" not in second.metadata.provenance


def test_the_recipe_of_a_run_is_read_back_as_it_was(weights: str, tmp_path: Path) -> None:
    for name, recipe in (
        ("plain", short(weights)),
        ("sized", changed(changed(short(weights), "model", image_size=12), "data", crop="resize")),
    ):
        carried_out(recipe, tmp_path / name)
        assert from_json(tmp_path / name / "recipe.json") == recipe
        assert load(tmp_path / name / "model.safetensors").metadata.provenance["recipe"] == to_json_object(recipe)
    recipe = finetune("hf-hub:owner/name@abc", "photos")
    (tmp_path / "recipe.json").write_text(json.dumps(to_json_object(recipe)))
    assert from_json(tmp_path / "recipe.json") == recipe
    assert recipe.model == ModelRecipe(weights="hf-hub:owner/name@abc", image_size=None)


def test_a_run_from_weights_leaves_them(weights: str, tmp_path: Path) -> None:
    before = Path(weights).read_bytes()
    carried_out(changed(short(weights), "optimization", learning_rate=0.1), tmp_path / "run")
    assert Path(weights).read_bytes() == before
    tuned = load(tmp_path / "run" / "model.safetensors").state_dict()
    assert torch.count_nonzero(tuned["head.weight"]) > 0
    assert not torch.equal(tuned["stem.weight"], make().state_dict()["stem.weight"])
