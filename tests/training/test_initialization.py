"""Where a run starts: trained weights bit for bit, a head of zeros for the new classes, and metadata that says so."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import randomise
from small_runs import CLASSES, FROM_WEIGHTS, recipe, replace_data, train

from allmlp.config.recipe import Recipe
from allmlp.config.serialize import from_json, to_json_object
from allmlp.errors import UserError
from allmlp.metadata import Metadata, Preprocessing
from allmlp.model import Mixer
from allmlp.training.build import build_initializer
from allmlp.weights.convert import save_as
from allmlp.weights.load import load
from allmlp.weights.native import save
from allmlp.weights.resize import resize

VIEW = Preprocessing(crop="resize", crop_ratio=0.7, interpolation="bicubic", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def make(**options: Any) -> Mixer:
    """A Mixer for 8 × 8 px whose every parameter, the head's too, is random."""
    sizes = {"num_classes": 3, "image_size": 8, "patch_size": 2, "num_blocks": 2, "hidden_dim": 12}
    model = Mixer(**sizes | {"tokens_mlp_dim": 5, "channels_mlp_dim": 7} | options)
    randomise(model, seed=0)
    model.metadata = Metadata(
        classes=CLASSES if model.config["num_classes"] == 3 else None,
        preprocessing=VIEW,
        provenance={
            "source": {"hub": "owner/name", "revision": "abc"},
            "weights": "another file",
            "val_top1": 0.9,
            "recipe": {"name": "old"},
        },
    )
    return model


@pytest.fixture
def weights(tmp_path: Path) -> str:
    save(make(), tmp_path / "weights.safetensors")
    return str(tmp_path / "weights.safetensors")


def finetune(weights: str | Path, **changes: Any) -> Recipe:
    """With all that the weights can say left to them."""
    view = dict.fromkeys(("image_size", "crop", "crop_ratio", "interpolation"))
    return recipe(**FROM_WEIGHTS | view | {"weights": str(weights)} | changes)


def started(settings: Recipe, classes: tuple[str, ...] = CLASSES) -> Mixer:
    return build_initializer(settings)(classes)


def assert_transferred(model: Mixer, trained: Mixer, classes: int = len(CLASSES)) -> None:
    """The head all zero, every other tensor bit for bit."""
    before, after = trained.state_dict(), model.state_dict()
    assert {*before, "head.weight", "head.bias"} == set(after)
    assert after["head.weight"].shape == (classes, trained.config["hidden_dim"])
    assert after["head.bias"].shape == (classes,)
    for name, tensor in after.items():
        if name.startswith("head."):
            assert torch.count_nonzero(tensor) == 0, name
        else:
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor.view(torch.int32), before[name].view(torch.int32)), name


# From weights


@pytest.mark.parametrize("to", ["native", "npz", "timm"])
@pytest.mark.parametrize(("num_classes", "classes"), [(0, CLASSES), (3, CLASSES), (10, ("x", "y"))])
def test_the_head_is_zero_and_the_rest_is_bit_for_bit_the_same(
    to: Any, num_classes: int, classes: tuple[str, ...], tmp_path: Path
) -> None:
    """From every layout, with and without a head; for the very same classes too."""
    trained, path = make(num_classes=num_classes), tmp_path / ("w.npz" if to == "npz" else "w.safetensors")
    save_as(trained, path, to)
    model = started(finetune(path), classes)
    assert_transferred(model, trained, len(classes))
    assert model.config == trained.config | {"num_classes": len(classes)}
    assert model.metadata.classes == classes
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


def test_sizes_are_those_of_the_weights_and_regularization_is_the_recipes(tmp_path: Path) -> None:
    trained = make(gelu="erf", norm_eps=1e-5, patch_size=(2, 4), image_size=(8, 16), dropout=0.3, rescale=True)
    save(trained, tmp_path / "w.safetensors")
    model = started(finetune(tmp_path / "w.safetensors", stochastic_depth=0.25))
    assert_transferred(model, trained)
    assert model.config == trained.config | {"dropout": 0.0, "stochastic_depth": 0.25, "rescale": False}
    assert [block.token_drop_path.rate for block in model.blocks] == [0.0, 0.25]
    assert model.blocks[0].token_mixing.gelu.approximate == "none"


def test_each_model_is_separate(weights: str) -> None:
    start = build_initializer(finetune(weights))
    first = start(CLASSES)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.fill_(7)
    first.metadata.provenance["started_from"]["source"]["hub"] = "changed"
    second = start(("a", "b"))
    assert_transferred(second, make(), 2)
    assert second.metadata.provenance["started_from"]["source"]["hub"] == "owner/name"


@pytest.mark.parametrize("new", [True, False])
def test_the_bias_of_the_head_is_the_recipes(weights: str, new: bool) -> None:
    model, plain = (started(recipe(**bias) if new else finetune(weights, **bias)) for bias in ({"head_bias": -6.9}, {}))
    assert torch.equal(model.get_parameter("head.bias"), torch.full((3,), -6.9))
    assert not plain.get_parameter("head.bias").any()
    different = {n for n, p in model.named_parameters() if not torch.equal(p, plain.get_parameter(n))}
    assert different == {"head.bias"}


@pytest.mark.parametrize("size", [8, 16, 6])
def test_another_image_size_goes_through_resize(weights: str, size: int) -> None:
    model = started(finetune(weights, image_size=size))
    assert model.image_size == (size, size)
    assert model.config["tokens_mlp_dim"] == (20 if size == 16 else 5)
    assert_transferred(model, resize(load(weights), size))
    resized_from = model.metadata.provenance["started_from"].get("resized_from")
    assert resized_from == (None if size == 8 else [[8, 8]])


# Metadata


@pytest.mark.parametrize(
    "fields",
    [{}, {"crop": "resmall"}, {"crop_ratio": 1.0}, {"interpolation": "nearest"},
     {"crop": "resmall", "crop_ratio": 0.5, "interpolation": "bilinear"}],
    ids=str,
)  # fmt: skip
def test_the_view_is_the_recipes_else_the_weights_the_normalization_always_theirs(
    weights: str, fields: dict[str, Any]
) -> None:
    assert started(finetune(weights, **fields)).metadata.preprocessing == dataclasses.replace(VIEW, **fields)
    fresh = started(recipe(**{"crop": None, "crop_ratio": None, "interpolation": None} | fields))
    assert fresh.metadata.preprocessing == dataclasses.replace(Preprocessing(), **fields)


def test_the_provenance_says_where_it_started(weights: str) -> None:
    settings = finetune(weights, image_size=16)
    assert started(settings).metadata.provenance == {  # no result of the earlier run passes for this one's
        "recipe": to_json_object(settings),
        "started_from": {
            "weights": weights,
            "source": {"hub": "owner/name", "revision": "abc"},
            "before_resize": {"image_size": [8, 8], "val_top1": 0.9},
            "resized_from": [[8, 8]],
        },
    }


def test_a_new_model_is_the_recipes() -> None:
    model = started(recipe())
    assert model.metadata.classes == CLASSES
    assert model.metadata.provenance == {"recipe": to_json_object(recipe())}
    assert model.config["gelu"] == "tanh"
    assert started(recipe(gelu="erf")).config["gelu"] == "erf"


# Mistakes


OWN_SIZES = {
    "model": "B/16", "patch_size": 2, "num_blocks": 2, "hidden_dim": 12, "tokens_mlp_dim": 5, "channels_mlp_dim": 7,
    "gelu": "erf",
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_SIZES)
def test_sizes_beside_weights_are_a_mistake(weights: str, name: str) -> None:
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} and --weights: .* leave it out"):
        finetune(weights, **{name: OWN_SIZES[name]})


def test_neither_weights_nor_a_size() -> None:
    with pytest.raises(UserError, match=r"--image-size.*--weights"):
        build_initializer(recipe(image_size=None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 9}, "image size 9×9 is not a multiple of the patch size 2×2: use 8×8"),
        ({"weights": "gone.safetensors"}, "gone.safetensors does not exist: give a weights file"),
        ({"weights": "hf-hub:name"}, "give hf-hub:OWNER/NAME"),
    ],
    ids=str,
)
def test_mistakes_in_weights_and_size_are_reported_before_data_is_read(
    weights: str, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(finetune(**{"weights": weights, "data": "no/such/data"} | change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Whole runs


def test_what_a_run_saves_and_a_run_from_it(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first at twice the size, by steps so small that no weight moves; the second learns."""
    replace_data(monkeypatch)
    settings, expected = finetune(weights, image_size=16, learning_rate=1e-30), resize(make(), 16)
    before = Path(weights).read_bytes()
    run = train(settings, tmp_path / "first")
    assert run.summary["started_from"] == weights
    assert run.metrics[0]["loss"] == pytest.approx(math.log(3), abs=1e-6)  # of a head that is zero
    assert from_json(tmp_path / "first" / "recipe.json") == settings
    for name in ("model.safetensors", "checkpoints/last.safetensors", "checkpoints/best.safetensors"):
        saved = load(tmp_path / "first" / name)
        assert saved.metadata.classes == CLASSES
        assert saved.metadata.preprocessing == VIEW
        assert saved.config == expected.config
        with torch.no_grad():
            assert saved.head.weight.abs().max() < 1e-20
            assert saved.head.bias.abs().max() < 1e-20
            saved.head.weight.zero_()
            saved.head.bias.zero_()
        assert_transferred(saved, expected)
        assert saved.metadata.provenance["recipe"] == to_json_object(settings)
        assert saved.metadata.provenance["started_from"]["weights"] == weights
        assert saved.metadata.provenance["started_from"]["source"] == {"hub": "owner/name", "revision": "abc"}
    provenance = load(tmp_path / "first" / "model.safetensors").metadata.provenance
    assert (provenance["val_top1"], provenance["data"]) == (run.summary["val_top1"], "unused")

    first = tmp_path / "first" / "model.safetensors"
    train(finetune(first, learning_rate=0.1), tmp_path / "second")
    second = load(tmp_path / "second" / "model.safetensors")
    assert second.image_size == (16, 16)
    assert torch.count_nonzero(second.head.weight) > 0
    assert not torch.equal(second.stem.weight, expected.stem.weight)
    origin = second.metadata.provenance["started_from"]
    assert origin["weights"] == str(first)
    assert origin["started_from"]["weights"] == weights
    assert origin["started_from"]["resized_from"] == [[8, 8]]
    assert "recipe" not in origin
    assert "resized_from" not in second.metadata.provenance
    assert Path(weights).read_bytes() == before
    assert load(first).config == expected.config
