"""Arrays that processes map instead of copying. Imports no torch, so that the spawned processes start fast."""

import errno
import hashlib
import multiprocessing
import pickle
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from allmlp.data.dataset import ImageDataset
from allmlp.data.shared import Shared, SharedMap, find_map, publish
from allmlp.data.stores import FolderStore
from allmlp.errors import UserError

NAMES = [f"n{i % 10}/{i}.JPEG" for i in range(100_000)]
LABELS = np.arange(100_000) % 10
CONTENT = (hashlib.sha256("".join(NAMES).encode()).hexdigest(), int(LABELS.sum()))


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def summarize(dataset: Shared[ImageDataset], answer: Connection) -> None:
    """Runs in a spawned process."""
    names, labels = dataset.value.names, dataset.value.labels
    mapped = find_map(labels.data) is not None
    answer.send((mapped, hashlib.sha256("".join(names).encode()).hexdigest(), int(labels.sum())))


@pytest.mark.parametrize("published", [True, False])
def test_a_spawned_process_maps_the_arrays(published: bool, temporary: Path) -> None:
    """A second one maps the same file. What is mapped already is not written again."""
    dataset = ImageDataset(store=FolderStore(temporary), names=NAMES, labels=LABELS, classes=("a",))
    if published:
        found, memory = publish(dataset)
        dataset = found.open()
        assert memory is not None
        memory.unlink()
        assert not dataset.labels.flags.writeable
    inherited, spawn = Shared(dataset), multiprocessing.get_context("spawn")
    maps: set[SharedMap] = set()
    for _ in range(1 if published else 2):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=summarize, args=(inherited, theirs))
        process.start()
        assert ours.recv() == (True, *CONTENT)
        process.join()
        assert inherited.spawnable is not None
        maps |= {memory for memory, _ in inherited.spawnable[1]}
    assert len(maps) == 1
    if published:
        place = find_map(dataset.labels.data)
        assert place is not None
        assert place[0] in maps
    assert not any(temporary.iterdir())  # after a kill nothing is left either
    assert len(pickle.dumps(inherited)) > LABELS.nbytes  # for any other process it is a copy


def test_a_full_temporary_folder_is_a_clear_error(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SharedMap, "open", full)
    with pytest.raises(UserError, match=r"2,000,000 bytes .*No space left.*TMPDIR"):
        publish(np.ones(2_000_000, np.uint8))
    assert not any(temporary.iterdir())


def test_small_values_are_copied(temporary: Path) -> None:
    found, memory = publish({"few": np.arange(3)})
    assert memory is None
    assert found.open()["few"].tolist() == [0, 1, 2]
    assert not any(temporary.iterdir())
