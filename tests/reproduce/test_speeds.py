"""Speeds of many models within one budget."""

import dataclasses
from typing import Any

import pytest
import torch

import allmlp.reproduce.speeds as module
from allmlp.errors import UserError
from allmlp.factory import create
from allmlp.reproduce.speeds import SpeedOptions, measure_speeds, random_model
from allmlp.throughput.measure import Measurement

SIZES = {"patch_size": 8, "num_blocks": 1, "hidden_dim": 8, "tokens_mlp_dim": 4, "channels_mlp_dim": 8}


def configs(*names: str) -> dict[str, Any]:
    return {name: create(num_classes=3, image_size=16, **SIZES).config for name in names}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Records what is measured; "large" does not fit into memory."""
    found: list[dict[str, Any]] = []

    def measure(models: Any, **options: Any) -> list[Measurement]:
        found.append({"models": list(models), **options})
        row = Measurement(name="", image_size=(16, 16), parameters=1, macs=1)
        values = {"images_per_second": 8.0, "images_per_second_range": (7.0, 9.0), "batch_size": 4}
        if options.get("make_training_step") is not None:
            values |= {"train_images_per_second": 2.0, "train_batch_size": 2}
        full = {name: {"problem": "too large"} if name == "large" else values for name in models}
        return [dataclasses.replace(row, name=name, **full[name]) for name in models]

    monkeypatch.setattr(module, "measure", measure)
    return found


def test_all_are_measured_together_and_training_of_those_asked_for(calls: list[dict[str, Any]]) -> None:
    speeds = measure_speeds(configs("a", "b", "large"), {"b", "large"}, SpeedOptions(device="cpu", budget_seconds=100))
    assert [call["models"] for call in calls] == [["a", "b", "large"], ["b"]]
    assert [call["make_training_step"] is None for call in calls if "make_training_step" in call] == [False]
    assert sum(call["budget_seconds"] for call in calls) == pytest.approx(100)
    assert [speeds[name].images_per_second for name in ("a", "b", "large")] == [8.0, 8.0, None]
    assert [speeds[name].train_images_per_second for name in ("a", "b", "large")] == [None, 2.0, None]
    assert speeds["large"].problem == "too large"
    assert speeds["a"].range == (7.0, 9.0)


def test_without_training_the_whole_budget_is_for_throughput(calls: list[dict[str, Any]]) -> None:
    measure_speeds(configs("a"), (), SpeedOptions(device="cpu", budget_seconds=50))
    assert [call["budget_seconds"] for call in calls] == [50]


def test_a_budget_too_small_names_the_least(calls: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match=r"--budget 2s is too small for 3 models: give at least 8s, fewer --models"):
        measure_speeds(configs("a", "b", "c"), {"a", "b", "c"}, SpeedOptions(device="cpu", budget_seconds=2))
    assert calls == []
    measure_speeds(configs("a", "b", "c"), {"a", "b", "c"}, SpeedOptions(device="cpu", budget_seconds=8))


@pytest.mark.parametrize("name", ["S/32", "ViT-B/32"])
def test_random_models_compute_numbers(name: str) -> None:
    if name.startswith("ViT"):
        pytest.importorskip("timm")
    with torch.device("meta"):
        config = create(name, num_classes=5).config
    model = random_model(config).eval()
    with torch.inference_mode():
        logits = model(torch.rand(1, 3, 224, 224))
    assert logits.shape == (1, 5)
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


def test_a_real_measurement() -> None:
    found = measure_speeds(configs("tiny"), {"tiny"}, SpeedOptions(device="cpu", precision="float32", budget_seconds=5))
    speed = found["tiny"]
    assert speed.images_per_second is not None
    assert speed.train_images_per_second is not None
    assert speed.images_per_second > speed.train_images_per_second > 0
    assert speed.range is not None
    assert speed.range[0] <= speed.images_per_second <= speed.range[1]
    assert speed.problem is None
