"""What a target measures."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
from made_speeds import made_speeds

from allmlp.reproduce.run import Options, reproduce
from allmlp.reproduce.speeds import Speed, SpeedOptions


@pytest.mark.parametrize(("target", "trains"), [("figure3", False), ("table3", True)])
def test_training_is_measured_only_where_it_is_shown(tmp_path: Path, target: str, trains: bool) -> None:
    asked: list[tuple[set[str], set[str], float]] = []

    def record(configs: Mapping[str, Any], trained: Collection[str], options: SpeedOptions) -> dict[str, Speed]:
        asked.append((set(configs), set(trained), options.budget_seconds))
        return made_speeds(configs, trained, options)

    options = Options(out=tmp_path, models=["S/32"], device="cpu", budget_seconds=60, speed_of=record, progress=False)
    table, found = reproduce(target, options)
    ((configs, trained, seconds),) = asked
    assert configs == {"Mixer-S/32 at 224", "Mixer-B/16 at 224"}
    assert trained == ({"Mixer-S/32 at 224"} if trains else set())
    assert 0 < seconds <= 60  # counting operations is part of it
    assert found["budget_seconds"] == 60
    assert table.rows[0]["measured_images_per_second"] == pytest.approx(
        found["speeds"]["Mixer-S/32 at 224"]["images_per_second"]
    )
    assert (tmp_path / f"{target}.csv").is_file()
