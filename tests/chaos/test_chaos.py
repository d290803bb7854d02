"""A short version of ``make chaos``: a trial or two of each row, by a fixed seed."""

import random

import pytest
import rows
from harness import Lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("chaos"))


def passes(result: rows.Result) -> None:
    if not result.of:
        pytest.skip(result.remarks[0])
    assert result.passed == result.of, "\n".join(result.remarks)


@pytest.mark.parametrize(("way", "trials"), [("1 process", 4), ("2 DDP", 1), ("2 FSDP2", 1)])
def test_killed_and_gone_on_with_it_ends_as_if_nothing_had_happened(lab: Lab, way: str, trials: int) -> None:
    passes(rows.killed(lab, random.Random(1), trials, way))


def test_killed_in_a_save_a_sound_checkpoint_is_there(lab: Lab) -> None:
    passes(rows.killed_in_a_save(lab, random.Random(2), 2))


def test_the_number_of_workers_may_change(lab: Lab) -> None:
    passes(rows.other_workers(lab, random.Random(3), 2))


def test_two_ranks_compute_what_one_does(lab: Lab) -> None:
    passes(rows.one_and_two(lab, random.Random(4), 1))


def test_terminated_it_saves_and_says_so(lab: Lab) -> None:
    passes(rows.terminated(lab, random.Random(5), 1, compile_too=False))


def test_a_stuck_rank_is_named(lab: Lab) -> None:
    passes(rows.stuck(lab, random.Random(6), 1))


def test_a_full_disk_loses_nothing(lab: Lab) -> None:
    passes(rows.no_room(lab, random.Random(7), 1))


def test_a_flipped_bit_is_found(lab: Lab) -> None:
    passes(rows.flipped(lab, random.Random(8), 2))


def test_a_loss_that_is_no_number_stops_all_ranks(lab: Lab) -> None:
    passes(rows.no_number(lab, random.Random(9), 1))


@pytest.mark.slow
def test_the_number_of_ranks_may_change(lab: Lab) -> None:
    passes(rows.other_ranks(lab, random.Random(10), 2))
