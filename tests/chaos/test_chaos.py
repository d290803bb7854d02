"""A short version of ``make chaos``, by a fixed seed. Rows that other tests cover are left to ``make chaos``."""

import random
from collections.abc import Callable

import pytest
import rows
from harness import Lab, Result

SLOW = ("killed, 2 DDP", "other ranks", "other workers", "two ranks against one", "a NaN loss")
ROWS: dict[str, Callable[[Lab, random.Random], Result]] = {
    "killed, 1 process": lambda lab, rng: rows.killed(lab, rng, 4, "1 process"),
    "killed, 2 DDP": lambda lab, rng: rows.killed(lab, rng, 1, "2 DDP"),
    "killed, 2 FSDP2": lambda lab, rng: rows.killed(lab, rng, 1, "2 FSDP2"),
    "killed during a save, or while checkpoints are removed": lambda lab, rng: rows.killed_during_save(lab, rng, 2),
    "other workers": lambda lab, rng: rows.other_workers(lab, rng, 2),
    "two ranks against one": lambda lab, rng: rows.two_ranks_against_one(lab, rng, 1),
    "terminated": lambda lab, rng: rows.terminated(lab, rng, 1, compile_too=False),
    "a stuck rank": lambda lab, rng: rows.stuck(lab, rng, 1),
    "a full disk": lambda lab, rng: rows.unwritable_disk(lab, rng, 1),
    "a flipped bit": lambda lab, rng: rows.flipped_bit(lab, rng, 2),
    "a NaN loss": lambda lab, rng: rows.nan_loss(lab, rng, 1),
    "other ranks": lambda lab, rng: rows.other_ranks(lab, rng, 2),
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("chaos"))


@pytest.mark.parametrize("row", [pytest.param(row, marks=[pytest.mark.slow] if row in SLOW else []) for row in ROWS])
def test_what_docs_runs_promises(row: str, lab: Lab) -> None:
    result = ROWS[row](lab, random.Random(1))
    if not result.trials:
        pytest.skip(result.remarks[0])
    assert result.passed == result.trials, "\n".join(result.remarks)
