"""Speeds of many models within one budget."""

import dataclasses
import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import allmlp.reproduce.speeds as module
from allmlp.errors import UserError
from allmlp.factory import build_meta, create
from allmlp.flops import cost
from allmlp.reproduce.speeds import Speed, SpeedOptions, affordable, check_budget, measure_speeds, random_model
from allmlp.throughput.measure import Measurement
from allmlp.throughput.subject import ModelSubject, OutOfMemory

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


@pytest.fixture
def rate(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A device of 100,000 multiply-accumulates a second; records what is timed by a single image."""
    timed: list[str] = []

    def time_one(self: module.Place, name: str, config: Any, clock: Any) -> Speed:
        timed.append(name)
        return Speed(images_per_second=0.5, batch_size=1, alternated=False)

    monkeypatch.setattr(module.Place, "calibrate", lambda self, clock: 1e5)
    monkeypatch.setattr(module.Place, "time_one", time_one)
    return timed


def options(seconds: float) -> SpeedOptions:
    return SpeedOptions(device="cpu", precision="float32", budget_seconds=seconds)


def test_all_are_measured_together_and_training_of_those_asked_for(calls: list, rate: list[str]) -> None:
    speeds = measure_speeds(configs("a", "b", "large"), {"b", "large"}, options(1000), clock=lambda: 0.0)
    assert [call["models"] for call in calls] == [["a", "b", "large"], ["b"]]
    assert [call["make_training_step"] is None for call in calls] == [True, False]
    assert [call["budget_seconds"] for call in calls] == [pytest.approx(550), pytest.approx(900)]  # no time passes here
    assert [speeds[name].images_per_second for name in ("a", "b", "large")] == [8.0, 8.0, None]
    assert [speeds[name].train_images_per_second for name in ("a", "b", "large")] == [None, 2.0, None]
    assert speeds["large"].problem == "too large"
    assert speeds["a"].range == (7.0, 9.0)
    assert rate == []


def test_models_too_slow_for_the_rounds_are_timed_once_and_slower_ones_are_told(calls: list, rate: list[str]) -> None:
    seconds = module.SLOWER * cost(create(num_classes=3, image_size=16, **SIZES)).macs / 1e5  # of one image
    slow = create(num_classes=3, image_size=160, **SIZES).config
    slower = create(num_classes=3, image_size=1600, **SIZES).config
    named = {**configs("a"), "slow": slow, "slower": slower}
    budget = 2 * module.SLOWER * cost(build_meta(slow)).macs / 1e5
    assert budget > 10 * module.MIN_CALLS * seconds
    speeds = measure_speeds(named, ["a", "slow"], options(budget), clock=lambda: 0.0)
    assert calls[0]["models"] == ["a"]
    assert rate == ["slow"]
    assert speeds["slow"].images_per_second == 0.5
    assert not speeds["slow"].alternated
    assert speeds["slower"].images_per_second is None
    assert "no time was left: give some" in (speeds["slower"].problem or "")
    assert speeds["a"].train_images_per_second == 2.0 or "no time" in (speeds["a"].problem or "")


def test_training_that_would_take_too_long_is_left_out(calls: list, rate: list[str]) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 0.5
        return now[0]

    speeds = measure_speeds(configs("a"), {"a"}, options(4.0), clock=clock)  # 30 passes at 8 images/s take 3.75 s
    assert len(calls) == 1
    assert speeds["a"].images_per_second == 8.0
    assert speeds["a"].train_images_per_second is None
    assert speeds["a"].problem == "no time was left for training"


@given(st.dictionaries(st.text("abcdef", min_size=1), st.floats(0, 10), max_size=8), st.floats(0, 40))
def test_the_quickest_that_fit_together_are_affordable(seconds: dict[str, float], budget: float) -> None:
    chosen = affordable(seconds, budget)
    total = sum(seconds[name] for name in chosen)
    assert total <= budget + 1e-9
    left = [seconds[name] for name in seconds.keys() - chosen]
    assert not left or min(left) + total > budget - 1e-9
    assert all(seconds[name] <= min(left, default=10) for name in chosen)


def test_a_budget_too_small_names_the_least() -> None:
    with pytest.raises(UserError, match=r"--budget 2s is too small for 3 models: give at least 6s, fewer --models"):
        check_budget(3, 2)
    check_budget(3, 6)


def test_what_does_not_fit_into_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: ModelSubject) -> None:
        raise OutOfMemory

    monkeypatch.setattr(ModelSubject, "load", load)
    place = module.Place(torch.device("cpu"), torch.float32, lambda text: None)
    found = place.time_one("a", configs("a")["a"], time.perf_counter)
    assert (found.images_per_second, found.problem) == (None, "not even one image fits into memory")


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
    found = measure_speeds(configs("tiny"), {"tiny"}, options(6))
    speed = found["tiny"]
    assert speed.images_per_second is not None
    assert speed.train_images_per_second is not None
    assert speed.images_per_second > speed.train_images_per_second > 0
    assert speed.range is not None
    assert speed.range[0] <= speed.images_per_second <= speed.range[1]
    assert speed.problem is None
