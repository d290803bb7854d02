"""Speeds as a measurement would find them, by arithmetic."""

from collections.abc import Collection, Mapping
from typing import Any

from allmlp.reproduce.speeds import Speed, SpeedOptions
from allmlp.reproduce.systems import cost_at


def made_speeds(
    configs: Mapping[str, Mapping[str, Any]], trained: Collection[str], options: SpeedOptions
) -> dict[str, Speed]:
    """A device of exactly 1,000 GMAC a second, for training a third of that."""
    rates = {}
    for name in configs:
        system, size = name.split(" at ")
        rates[name] = 1e12 / cost_at(system, int(size)).macs
    return {
        name: Speed(
            images_per_second=rate,
            range=(0.9 * rate, 1.1 * rate),
            batch_size=8,
            train_images_per_second=rate / 3 if name in trained else None,
        )
        for name, rate in rates.items()
    }
