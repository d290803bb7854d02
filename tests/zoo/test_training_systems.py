"""Comparison systems in training: every family trains, is interrupted and resumed, saved, loaded, tuned and used."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import CLASSES, SIZES, recipe, replace_data, same, stopped_run, train
from small_systems import SMALL

import allmlp
from allmlp.errors import UserError
from allmlp.factory import create
from allmlp.training.build import build_initializer
from allmlp.training.memory import recompute_blocks
from allmlp.training.optimizer import adamw
from allmlp.weights.native import save

NOISY = {"dropout": 0.2, "stochastic_depth": 0.4}


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_data(monkeypatch)


def settings(family: str, **changes: Any) -> dict[str, Any]:
    """Changes of the small recipe: images of 16 pixels, where no map of features has a single position."""
    sizes = dict.fromkeys(SIZES) | {"image_size": 16, "model": family} | SMALL[family]
    own = {"stem_channels", "num_features"}  # not fields of a recipe
    return {key: value for key, value in sizes.items() if key not in own} | changes


@pytest.mark.parametrize("family", SMALL)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(family: str, tmp_path: Path) -> None:
    changes = settings(family, ema_decay=0.5, micro_batch_size=4, **NOISY)
    out = stopped_run(tmp_path / "run", **changes)
    expected = train(recipe(save_every_steps=1, **changes), tmp_path / "whole", resume=False)
    found = train(recipe(save_every_steps=1, **changes), out)
    files = [load_file(folder / "model.safetensors") for folder in (out, tmp_path / "whole")]
    assert same(*files)
    assert found.summary["val_top1"] == expected.summary["val_top1"]
    start = build_initializer(recipe(**changes))(CLASSES).state_dict()
    unchanged = [name for name in start if torch.equal(start[name], files[0][name])]
    assert [name for name in unchanged if "weight" in name] == []
    model = allmlp.load(out)
    assert model.metadata.classes == CLASSES
    assert same(model.state_dict(), files[0])
    assert json.loads((out / "summary.json").read_text())["model"].startswith(found.summary["model"][:3])
    tensors = [name for file in (out / "checkpoints").glob("*/*.safetensors") for name in load_file(file)]
    assert any("running_mean" in name for name in tensors) == any("running_mean" in name for name in start)


@pytest.mark.parametrize("family", ["vit", "efficientnet", "botnet"])
def test_recomputed_activations_change_nothing(family: str) -> None:
    """Neither the gradients nor the statistics of batch normalization, which the second pass must not count again."""
    results = []
    for recompute in (False, True):
        model = create(family, num_classes=3, image_size=32, seed=1, **SMALL[family], **NOISY).double().train()
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
        if recompute:
            recompute_blocks(model)
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
        model(images, torch.arange(4)).square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        results.append(gradients | dict(model.named_buffers()))
    torch.testing.assert_close(*results)
    assert family == "vit" or any("running_var" in name for name in results[0])


def test_weight_decay_acts_on_kernels_alone() -> None:
    for family in SMALL:
        model = create(family, num_classes=3, image_size=32, **SMALL[family])
        names = {id(p): name for name, p in model.named_parameters()}
        groups = adamw(model, weight_decay=0.1, beta1=0.9, beta2=0.999).param_groups
        decayed, others = ({names[id(p)] for p in group["params"]} for group in groups)
        assert len(decayed) + len(others) == len(names)
        assert all(name.endswith("weight") and dict(model.named_parameters())[name].ndim > 1 for name in decayed)
        marks = ("pos_embed", "cls_token", "gain", "_rel", "bias")
        assert not [name for name in decayed if name.endswith(marks)]
        assert "head.weight" in decayed


@pytest.mark.parametrize("family", SMALL)
def test_fine_tuning_at_another_size(family: str, tmp_path: Path) -> None:
    model = create(family, num_classes=7, image_size=16, seed=2, **SMALL[family])
    torch.nn.init.normal_(model.head.weight)
    save(model, tmp_path / "start.safetensors")
    none = dict.fromkeys(SIZES) | {"model": None, "weights": str(tmp_path / "start.safetensors"), "image_size": 32}
    run = train(recipe(**none, optimizer="sgd", stochastic_depth=0.1, epochs=1), tmp_path / "run", resume=False)
    assert run.model.image_size == (32, 32)
    assert run.model.num_classes == 3
    assert run.model.config["stochastic_depth"] == 0.1
    frozen = train(recipe(**none, frozen=True, optimizer="sgd", epochs=1), tmp_path / "frozen", resume=False)
    before, after = allmlp.resize(model, 32).state_dict(), frozen.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}
    assert after["head.weight"].any()


def test_one_image_at_a_time_is_refused_where_batches_are_normalized(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a batch of 1 image, and this model has batch normalization: use batches"):
        train(recipe(**settings("efficientnet", micro_batch_size=1)), tmp_path / "run", resume=False)
    train(recipe(**settings("bit", micro_batch_size=1, steps=1)), tmp_path / "bit", resume=False)


@pytest.mark.parametrize("family", SMALL)
def test_the_verbs_take_every_family(family: str, mixer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the digits themselves
    own = {"stem_channels", "num_features"}
    words: list[Any] = []
    for name, value in SMALL[family].items():
        if name not in own:
            flag = f"--{name.replace('_', '-')}"
            words += [flag, *value] if isinstance(value, tuple) else [flag, value]
    out, weights = tmp_path / "run", tmp_path / "run" / "model.safetensors"
    options = ["--image-size", 16, "--steps", 3, "-b", 16, "--compile", "off", "--workers", 0, "--device", "cpu"]
    done = mixer("train", "digits", "--model", family, *words, *options, "--out", out, "--json")
    assert done.status == 0, done.err
    summary = json.loads(done.out)
    assert summary["steps"] == 3
    assert summary["parameters"] == sum(p.numel() for p in allmlp.load(weights).parameters())
    evaluated = mixer("evaluate", weights, "--data", "digits", "--workers", 0, "--json")
    assert json.loads(evaluated.out)["top1"] == summary["test_top1"]
    predicted = mixer("predict", weights, out / "examples", "--format", "jsonl")
    assert predicted.status == 0
    assert len(json.loads(predicted.out.splitlines()[0])["predictions"]) == 5
    info = json.loads(mixer("info", weights, "--json").out)
    assert info["system"] == family
    assert info["parameters"] == summary["parameters"]
    resized = mixer("resize", weights, tmp_path / "larger.safetensors", "--image-size", 32, "--json")
    assert json.loads(resized.out)["to"]["image_size"] == [32, 32]
    assert mixer("train", "--resume", out).status == 0
