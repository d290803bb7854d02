"""The paper's numbers as data: every row names a model that can be created, and is read as it is printed."""

from itertools import groupby

import pytest

from allmlp.factory import resolve_name
from allmlp.reproduce.published import IMAGENET, IMAGENET21K, JFT, WEB, PublishedRow, read_table, table_2, table_3

ROWS = [pytest.param(row, id=f"{row.model}-{row.image_size}-{row.data}") for row in (*table_2(), *table_3())]


@pytest.mark.parametrize("row", ROWS)
def test_every_row_names_a_system(row: PublishedRow) -> None:
    resolved = resolve_name(row.system)
    assert row.system in (resolved, f"Mixer-{resolved}")
    assert row.data in (IMAGENET, IMAGENET21K, JFT, WEB)
    assert row.image_size >= 224
    assert row.top1 is not None
    assert row.core_days is not None
    assert row.real_top1 is None or row.real_top1 > row.top1


def test_the_rows_of_table_3_are_sorted_by_throughput_as_the_paper_says() -> None:
    for _, rows in groupby((row for row in table_3() if not row.preprint_only), key=lambda row: row.data):
        speeds = [row.images_per_second or 0 for row in rows if row.model != "BiT-R152x2"]  # which is out of order
        assert speeds == sorted(speeds, reverse=True)


def test_rows_of_the_preprint_alone_are_marked() -> None:
    assert [(row.model, row.image_size) for row in table_3() if row.preprint_only] == [
        ("Mixer-H/14", 448), ("BiT-R152x4", 480), ("ViT-H/14", 518),
    ]  # fmt: skip
    assert not any(row.preprint_only for row in table_2())


def test_images_seen_are_epochs_times_images() -> None:
    (row,) = [row for row in table_3() if (row.model, row.data) == ("Mixer-B/16", JFT)]
    assert row.images_seen == 7 * 300_000_000
    (steps,) = {round(row.images_seen / 4096) for row in table_3() if row.images_seen and row.data == IMAGENET}
    assert steps == 93_835  # at the paper's batch size


def test_table_2_takes_epochs_only_from_the_same_row_of_table_3() -> None:
    epochs = {(row.model, row.data): row.epochs for row in table_2()}
    assert epochs["Mixer-H/14", JFT] == 14
    assert epochs["BiT-R152x4", JFT] == 40
    assert epochs["BiT-R152x4", IMAGENET21K] is None
    assert all(row.images_seen is None for row in table_2() if row.data == WEB)
    assert all(row.pretraining_key is None for row in table_2() if row.epochs is None)


def test_the_same_row_has_the_same_speed_and_cost_in_both_tables() -> None:
    for row in table_2():
        for other in table_3():
            if (row.key, row.data) == (other.key, other.data):
                assert (row.images_per_second, row.core_days) == (other.images_per_second, other.core_days)


def test_no_cell_is_lost() -> None:
    assert [len(read_table(number)) for number in (1, 2, 3, 4)] == [7, 10, 29, 8]
    for number in (1, 2, 3, 4):
        for row in read_table(number):
            assert None not in row, row  # a cell too many
            assert None not in row.values(), row  # a cell too few
