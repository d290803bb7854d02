"""Names of many images: packed like the tuple that they stand for, found in one walk, shared by all processes."""

import pickle
import tempfile
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allmlp.config.recipe import DataRecipe, Recipe
from allmlp.data.dataset import DatasetSplits
from allmlp.data.folders.layout import read_tree
from allmlp.data.folders.walk import MAX_KINDS
from allmlp.data.loader import EvaluationOrder
from allmlp.data.names import CHUNK, concatenate, joined, pack
from allmlp.data.shared import find_map
from allmlp.data.sources import load_source, walk_once
from allmlp.data.stores import FolderStore, Listing, ZipStore
from allmlp.distributed.context import DistributedContext
from allmlp.errors import UserError
from allmlp.training.build import build_data

MANY = 50_000
AS_BEFORE = settings(deadline=None, derandomize=True, max_examples=60)


@AS_BEFORE
@given(st.lists(st.text(max_size=4) | st.sampled_from(["\udcff", "\ud800x", "é\0", ""]), max_size=9), st.data())
def test_names_are_the_tuple_that_was_packed(given_names: list[str], data: st.DataObject) -> None:
    names, expected = pack(iter(given_names)), tuple(given_names)
    picks = data.draw(st.lists(st.sampled_from(range(len(expected))), max_size=5)) if expected else []
    cut = slice(data.draw(st.none() | st.integers(-9, 9)), data.draw(st.none() | st.integers(-9, 9)))
    assert names == expected
    assert names == pickle.loads(pickle.dumps(names))
    assert [names[i] for i in range(-len(expected), len(expected))] == [*expected, *expected]
    assert names[cut] == expected[cut]
    picked = names.subset(np.array(picks, dtype=np.int64))
    assert picked == [expected[i] for i in picks]
    assert concatenate([picked, names, pack(["a"])]) == (*picked, *expected, "a")
    assert pack("p/é" + name for name in expected).without_prefix("p/é") == expected
    assert names != (*expected, "another")
    with pytest.raises(IndexError):
        names[len(expected)]


def test_the_digest_of_many_names_is_that_of_the_joined_text() -> None:
    for count in (0, 1, CHUNK, CHUNK + 1):
        names = [f"a/{i}\udcff" for i in range(count)]
        assert b"".join(joined(names)) == "\0".join(names).encode(errors="surrogateescape")


class Listed(ZipStore):
    """A store of these names."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(Path("listed.zip"))
        self.entries = lambda: sorted(set(names))  # pyright: ignore[reportIncompatibleMethodOverride]
        self.replaced_entries = lambda: 0  # pyright: ignore[reportIncompatibleMethodOverride]
        self.head = lambda name, size: b""  # pyright: ignore[reportIncompatibleMethodOverride]


PIECES = st.sampled_from(["a", "a-b", "a.b", "b", "\udcff", "\uffff", "\U0001f408", "Z", "a b"])


@AS_BEFORE
@given(st.lists(st.lists(PIECES, min_size=2, max_size=5).map(lambda pieces: "/".join(pieces) + ".png"), min_size=1))
def test_images_are_in_the_order_of_their_complete_names(names: list[str]) -> None:
    names += ["x/1.png", "y/1.png"]  # so that nothing is an outer folder
    datasets = read_tree(Listed(names), "listed").datasets
    expected = sorted(set(names))
    assert datasets["all"].names == expected
    assert datasets["all"].classes == tuple(sorted({name.split("/")[0] for name in names}))
    assert [datasets["all"].classes[i] for i in datasets["all"].labels] == [name.split("/")[0] for name in expected]


def test_kinds_of_other_files_are_bounded() -> None:
    names = ["x/1.png", "y/1.png", *(f"x/file{i}" for i in range(MAX_KINDS + 50))]
    left_out = read_tree(Listed(names), "listed").left_out
    assert sum(left_out.values()) == MAX_KINDS + 50
    assert left_out["other files"] == 50


# Many images


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that were walked; each seems to hold MANY images in ten class folders."""
    walked: list[str] = []

    def walk(store: FolderStore) -> Iterator[Listing]:
        walked.append(str(store.root))
        yield Listing("", [])
        for i in range(10):
            yield Listing(f"n{i:08d}/", [f"n{i:08d}_{k}.JPEG" for k in range(MANY // 10)])

    monkeypatch.setattr(FolderStore, "walk", walk)
    return walked


def test_memory_per_image_is_that_of_the_names_and_some_numbers(tmp_path: Path, walks: list[str]) -> None:
    tracemalloc.start()
    data = load_source(str(tmp_path))
    kept, peak = (size / MANY for size in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    assert len(walks) == 1
    assert sum(len(split) for split in data.splits.values()) == MANY
    assert kept < 60  # 25 of text and 20 of numbers, and those of what the splits were cut from
    assert peak < 115
    evaluation = EvaluationOrder(10**12, 256, 1, 2)  # is not a list either
    assert len(evaluation) == -(-(10**12) // 512)
    assert next(iter(evaluation))[0] == (0, 256)


def test_several_runs_of_a_search_walk_once(tmp_path: Path, walks: list[str]) -> None:
    with walk_once():
        first = load_source(str(tmp_path))
        with walk_once():
            again = load_source(str(tmp_path), split_seed=1)
    assert len(walks) == 1
    assert len(again.split("all")) == len(first.split("all")) == MANY
    load_source(str(tmp_path))
    assert len(walks) == 2


class Rank(DistributedContext):
    """A rank of several, each a thread of this process."""

    def all_gather(self, value: Any) -> list[Any]:
        barrier, values = self.control_group
        values[self.rank] = value
        barrier.wait(60)
        found = list(values)
        barrier.wait(60)
        return found


def in_ranks(recipe: Recipe, count: int, machines: int) -> list[Any]:
    """The data of all ranks, or their errors."""
    group, each = (threading.Barrier(count), [None] * count), count // machines

    def run(rank: int) -> DatasetSplits | UserError:
        places = {"rank": rank, "world_size": count, "local_rank": rank % each, "local_world_size": each}
        try:
            return build_data(recipe, Rank(**places, control_group=group))
        except UserError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_one_process_of_each_machine_walks_and_all_map_its_names(
    tmp_path: Path, walks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(data=DataRecipe(data=str(tmp_path)))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, *others = in_ranks(recipe, 4, machines=2)
    assert len(walks) == 2
    assert not any(tmp_path.iterdir())
    for data in (first, *others):
        for name, split in data.splits.items():
            assert np.array_equal(split.labels, first.splits[name].labels)
            assert split.names[-3:] == first.splits[name].names[-3:]
            for array in (split.labels, split.names.text, split.names.starts):
                assert find_map(array.data) is not None
                assert not array.flags.writeable
    assert others[0].split("val").names == first.split("val").names


def test_a_failure_to_read_the_data_reaches_all_ranks(tmp_path: Path) -> None:
    errors = in_ranks(Recipe(data=DataRecipe(data=str(tmp_path))), 2, machines=1)
    assert all("holds no images" in str(error) for error in errors)
