"""A short version of ``make chaos``: one or a few trials of each row, by a fixed seed."""

import random

import pytest
import rows
from harness import Lab, Result


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("chaos"))


def check(result: Result) -> None:
    if not result.trials:
        pytest.skip(result.remarks[0])
    assert result.passed == result.trials, "\n".join(result.remarks)


@pytest.mark.parametrize(("mode", "trials"), [("1 process", 4), ("2 DDP", 1), ("2 FSDP2", 1)])
def test_a_run_that_is_killed_and_resumed_ends_like_an_uninterrupted_one(lab: Lab, mode: str, trials: int) -> None:
    check(rows.killed(lab, random.Random(1), trials, mode))


def test_a_run_killed_during_a_save_leaves_an_intact_checkpoint(lab: Lab) -> None:
    check(rows.killed_during_save(lab, random.Random(2), 2))


def test_the_number_of_workers_may_change(lab: Lab) -> None:
    check(rows.other_workers(lab, random.Random(3), 2))


def test_two_ranks_compute_the_same_as_one(lab: Lab) -> None:
    check(rows.two_ranks_against_one(lab, random.Random(4), 1))


def test_a_terminated_run_saves_and_says_how_to_resume(lab: Lab) -> None:
    check(rows.terminated(lab, random.Random(5), 1, compile_too=False))


def test_a_stuck_rank_is_named(lab: Lab) -> None:
    check(rows.stuck(lab, random.Random(6), 1))


def test_a_full_disk_loses_nothing(lab: Lab) -> None:
    check(rows.unwritable_disk(lab, random.Random(7), 1))


def test_a_flipped_bit_is_found(lab: Lab) -> None:
    check(rows.flipped_bit(lab, random.Random(8), 2))


def test_a_nan_loss_stops_all_ranks(lab: Lab) -> None:
    check(rows.nan_loss(lab, random.Random(9), 1))


@pytest.mark.slow
def test_the_number_of_ranks_may_change(lab: Lab) -> None:
    check(rows.other_ranks(lab, random.Random(10), 2))
