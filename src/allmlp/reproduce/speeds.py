"""Speeds of many models, measured in one run within a budget of time."""

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from allmlp.api.bench import make_training_step
from allmlp.device import Precision, select_device, select_precision
from allmlp.errors import UserError
from allmlp.factory import Model, build_meta
from allmlp.flops import cost
from allmlp.reproduce.systems import system_at
from allmlp.throughput.measure import LEAST_SECONDS, Measurement, measure
from allmlp.throughput.rounds import Clock, Stopwatch
from allmlp.throughput.subject import ModelSubject, OutOfMemory, fill_with_noise

SHARE = 0.55  # of the budget, for the models whose throughput is measured in alternating rounds
MIN_CALLS = 5  # forward passes that ``measure`` takes of one image at least
SLOWER = 2  # than by its operations in comparison with Mixer-B/16; what a model may be
TRAINING_CALLS = 30  # the time of the shortest measurement of training, in forward passes of one image
IN_TIME = 0.9  # of the time that is left: a round that has begun is finished
FILLED_PER_SECOND = 2e8  # random weights
CALIBRATION = "B/16"


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Images per second of one model on this device. ``problem``: why one is None, in one line."""

    images_per_second: float | None = None
    range: tuple[float, float] | None = None  # minimum and maximum over rounds
    batch_size: int | None = None
    train_images_per_second: float | None = None
    train_batch_size: int | None = None
    alternated: bool = True  # with the others in every round; else by itself, since not all fit into memory together
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    device: str = "auto"
    precision: Precision = "auto"
    budget_seconds: float = 600.0
    on_progress: Callable[[str], None] = lambda text: None


Configs = Mapping[str, Mapping[str, Any]]
Measure = Callable[[Configs, Collection[str], SpeedOptions], dict[str, Speed]]


def measure_speeds(
    configs: Configs, trained: Collection[str], options: SpeedOptions, clock: Clock = time.perf_counter
) -> dict[str, Speed]:
    """The speeds of models by name, with random weights.

    Models alternate in one measurement of throughput, as far as they fit into memory together. Those that are too slow
    for its repetitions follow, each with a single image. Training has the time that is left.

    Args:
        configs: name → configuration.
        trained: names whose training is measured too.
        options: where, and for how long in all.
        clock: the time in seconds.

    Raises:
        UserError: a device that does not exist, or a precision that it does not compute in.
    """
    watch = Stopwatch(options.budget_seconds, clock)
    device = select_device(options.device)
    place = Place(device, select_precision(options.precision, device), options.on_progress)
    options.on_progress("counting operations")
    costs = {name: cost(build_meta(config)) for name, config in configs.items()}
    rate = place.calibrate(clock)
    expected = {name: SLOWER * one.macs / rate for name, one in costs.items()}
    loading = {name: one.parameters / FILLED_PER_SECOND for name, one in costs.items()}
    shortest = {name: MIN_CALLS * expected[name] + loading[name] for name in configs}
    repeated = affordable(shortest, SHARE * watch.left)
    speeds = {}
    if repeated:
        found = place.measure({name: configs[name] for name in configs if name in repeated}, SHARE * watch.left)
        speeds = {one.name: as_speed(one) for one in found}
    left_out = 0.0  # seconds that those without time would have taken
    for name in sorted(configs.keys() - speeds.keys(), key=lambda name: expected[name]):
        if left_out + expected[name] + loading[name] > watch.left:
            left_out += expected[name] + loading[name]
            more = math.ceil(max(left_out - watch.left, 1.0))
            speeds[name] = Speed(problem=f"no time was left: give some {more}s more, in --budget")
        else:
            speeds[name] = place.time_one(name, configs[name], clock)
    return speeds | measure_training(configs, trained, speeds, loading, place, watch)


def measure_training(
    configs: Configs,
    trained: Collection[str],
    speeds: Mapping[str, Speed],
    loading: Mapping[str, float],
    place: "Place",
    watch: Stopwatch,
) -> dict[str, Speed]:
    """The speeds with those of training, of the models for which there is time."""
    rates = {name: speeds[name].images_per_second for name in trained}
    shortest = {name: TRAINING_CALLS / rate + loading[name] for name, rate in rates.items() if rate is not None}
    seconds = IN_TIME * watch.left
    chosen = affordable(shortest, seconds)
    late = {name: replace(speeds[name], problem="no time was left for training") for name in shortest.keys() - chosen}
    if not chosen:
        return late
    found = place.measure({name: configs[name] for name in configs if name in chosen}, seconds, train=True)
    return late | {one.name: with_training(speeds[one.name], one) for one in found}


def affordable(seconds: Mapping[str, float], budget: float) -> set[str]:
    """The quickest ones that fit into the budget together."""
    quickest = sorted(seconds, key=lambda name: seconds[name])
    sums = accumulate(seconds[name] for name in quickest)
    return {name for name, total in zip(quickest, sums, strict=True) if total <= budget}


@dataclass(frozen=True)
class Place:
    """Where models are measured."""

    device: torch.device
    precision: torch.dtype
    on_progress: Callable[[str], None]

    def measure(self, configs: Configs, seconds: float, train: bool = False) -> list[Measurement]:
        """Throughput at the best batch size; for training, that of one image, which is not used, and training."""
        return measure(
            makers(configs, random_model),
            configs=makers(configs, build_meta),
            device=self.device,
            precision=self.precision,
            budget_seconds=max(seconds, LEAST_SECONDS * len(configs)),
            batch_sizes=[1] if train else None,
            latency=False,
            make_training_step=make_training_step if train else None,
            on_progress=self.on_progress,
        )

    def calibrate(self, clock: Clock) -> float:
        """Multiply-accumulates a second of the device, in a forward pass of Mixer-B/16."""
        config, counted = system_at(CALIBRATION)
        self.time_one(CALIBRATION, config, clock)  # warm up
        found = self.time_one(CALIBRATION, config, clock).images_per_second
        return counted.macs * found if found is not None else math.inf

    def time_one(self, name: str, config: Mapping[str, Any], clock: Clock) -> Speed:
        """The speed of a single forward pass of one image."""
        self.on_progress(f"one image of {name}")
        subject = ModelSubject(name, partial(random_model, config), self.device, self.precision)
        try:
            subject.load()
            subject.batch(1)
            start = clock()
            subject.forward(1)
            rate = 1 / max(clock() - start, 1e-9)
        except OutOfMemory:
            return Speed(problem="not even one image fits into memory", alternated=False)
        finally:
            subject.unload()
        return Speed(images_per_second=rate, range=(rate, rate), batch_size=1, alternated=False)


def check_budget(models: int, seconds: float) -> None:
    """Raises a UserError for a budget that is too small for so many models."""
    needed = math.ceil(LEAST_SECONDS * models / SHARE)
    if seconds < needed:
        raise UserError(
            f"--budget {seconds:g}s is too small for {models} models: give at least {needed}s, fewer --models, or "
            "--no-measure"
        )


def makers(configs: Configs, make: Callable[[Mapping[str, Any]], Model]) -> dict[str, Callable[[], Model]]:
    return {name: partial(make, config) for name, config in configs.items()}


def random_model(config: Mapping[str, Any]) -> Model:
    """A model on the CPU with random weights, drawn fast."""
    model = build_meta(config).to_empty(device="cpu")
    fill_with_noise(model)
    return model


def as_speed(found: Measurement) -> Speed:
    return Speed(
        images_per_second=found.images_per_second,
        range=found.images_per_second_range,
        batch_size=found.batch_size,
        alternated=found.alternated,
        problem=found.problem,
    )


def with_training(speed: Speed, found: Measurement) -> Speed:
    return replace(
        speed,
        train_images_per_second=found.train_images_per_second,
        train_batch_size=found.train_batch_size,
        problem=speed.problem or found.problem,
    )
