"""Speeds of many models, measured in one run within a budget of time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from allmlp.device import Precision, select_device, select_precision
from allmlp.errors import UserError
from allmlp.factory import Model
from allmlp.reproduce.systems import build

MIN_SECONDS = 1.0  # for each model


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Images per second of one model on this device. ``problem``: why one is None, in one line."""

    images_per_second: float | None = None
    range: tuple[float, float] | None = None  # minimum and maximum
    batch_size: int | None = None
    train_images_per_second: float | None = None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    device: str = "auto"
    precision: Precision = "auto"
    budget_seconds: float = 600.0
    on_progress: Callable[[int, int, str], None] | None = None


Models = Mapping[str, Callable[[], Model]]
Measure = Callable[[Models, frozenset[str], SpeedOptions], dict[str, Speed]]


def measure_speeds(
    configs: Mapping[str, Mapping[str, Any]],
    trained: frozenset[str],
    options: SpeedOptions,
    measure: Measure | None = None,
) -> dict[str, Speed]:
    """The speeds of models by name.

    Args:
        configs: name → configuration.
        trained: names whose training is measured too.
        options: where, and for how long in all.
        measure: does it; None: ``allmlp.throughput``.

    Raises:
        UserError: a budget that is too small for so many models, or a device that does not exist.
    """
    if not configs:
        return {}
    needed = MIN_SECONDS * len(configs)
    if options.budget_seconds < needed:
        raise UserError(
            f"--budget {options.budget_seconds:g}s is too small for {len(configs)} models: give at least "
            f"{needed:.0f}s, fewer --models, or --no-measure"
        )
    select_device(options.device)
    models = {name: partial(build, config) for name, config in configs.items()}
    return (measure or measure_throughput)(models, trained, options)


def measure_throughput(models: Models, trained: frozenset[str], options: SpeedOptions) -> dict[str, Speed]:
    """The best throughput of a sweep over batch sizes, and the speed of training of the models in ``trained``."""
    from allmlp.throughput.measure import measure

    device = select_device(options.device)
    found = measure(
        models,
        device=device,
        precision=select_precision(options.precision, device),
        budget_seconds=options.budget_seconds,
        latency=False,
        on_progress=options.on_progress,
    )
    return {
        one.name: Speed(
            images_per_second=one.images_per_second,
            range=one.images_per_second_range,
            batch_size=one.batch_size,
            train_images_per_second=one.train_images_per_second,
            problem=one.problem,
        )
        for one in found
    }
