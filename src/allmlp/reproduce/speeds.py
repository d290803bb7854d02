"""Speeds of many models, measured in one run within a budget of time."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from allmlp.api.bench import make_training_step
from allmlp.device import Precision, select_device, select_precision
from allmlp.errors import UserError
from allmlp.factory import Model, build_meta
from allmlp.throughput.measure import LEAST_SECONDS, Measurement, measure
from allmlp.throughput.subject import fill_with_noise

TRAINING_SHARE = 0.4  # of the budget


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


def measure_speeds(configs: Configs, trained: Collection[str], options: SpeedOptions) -> dict[str, Speed]:
    """The speeds of models by name, with random weights.

    All models alternate in one measurement of throughput, as far as they fit into memory together; that of training
    follows.

    Args:
        configs: name → configuration.
        trained: names whose training is measured too.
        options: where, and for how long in all.

    Raises:
        UserError: a budget that is too small for so many models, or a device that does not exist.
    """
    device = select_device(options.device)
    precision = select_precision(options.precision, device)
    check_budget(configs, trained, options.budget_seconds)
    share = 1.0 - TRAINING_SHARE if trained else 1.0
    found = measure(
        makers(configs, random_model),
        configs=makers(configs, build_meta),
        device=device,
        precision=precision,
        budget_seconds=share * options.budget_seconds,
        latency=False,
        on_progress=options.on_progress,
    )
    speeds = {one.name: as_speed(one) for one in found}
    able = {name: configs[name] for name in configs if name in trained and speeds[name].images_per_second is not None}
    if not able:
        return speeds
    training = measure(
        makers(able, random_model),
        configs=makers(able, build_meta),
        device=device,
        precision=precision,
        budget_seconds=TRAINING_SHARE * options.budget_seconds,
        batch_sizes=[1],
        latency=False,
        make_training_step=make_training_step,
        on_progress=options.on_progress,
    )
    return speeds | {one.name: with_training(speeds[one.name], one) for one in training}


def check_budget(configs: Configs, trained: Collection[str], seconds: float) -> None:
    """Raises a UserError for a budget that is too small for so many models."""
    needed = LEAST_SECONDS * len(configs)
    if trained:
        needed = max(needed / (1.0 - TRAINING_SHARE), LEAST_SECONDS * len(trained) / TRAINING_SHARE)
    if seconds < needed:
        raise UserError(
            f"--budget {seconds:g}s is too small for {len(configs)} models: give at least {math.ceil(needed)}s, fewer "
            "--models, or --no-measure"
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
