"""Worker processes: whatever happens in one, the iteration ends soon, in one line, and leaves no process behind."""

import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from allmlp.data import loader, workers
from allmlp.data.dataset import ImageDataset
from allmlp.data.decode import UnreadableImage
from allmlp.data.loader import evaluation_batches
from allmlp.data.stores import ArrayStore
from allmlp.data.transforms import EvaluationTransform
from allmlp.data.workers import Plan, load_in_workers, plan_workers
from allmlp.errors import RunError, UserError
from allmlp.metadata import Preprocessing

SECONDS = 20  # in which every iteration ends
PLENTY = float("inf")


@pytest.fixture(autouse=True)
def quick_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch looks for dead workers every 5 s; here more often."""
    monkeypatch.setattr(workers.LoaderIterator._try_get_data, "__defaults__", (0.5,))


def forever() -> None:
    time.sleep(1000)


def raise_error(error: Exception) -> None:
    raise error


FAULTS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "a mistake": (lambda: raise_error(UserError("the zip is gone: copy it")), UserError, "^the zip is gone: copy it$"),
    "an unreadable image": (lambda: raise_error(UnreadableImage("x is bad")), UserError, "^x is bad$"),
    "a failure": (
        lambda: raise_error(RunError("the disk is full: free some")),
        RunError,
        "^the disk is full: free some$",
    ),
    "no room": (lambda: raise_error(OSError(errno.ENOSPC, "No space left")), RunError, "No space left.*--workers 0"),
    "a bug": (lambda: raise_error(KeyError("a\nb")), RunError, "KeyError.*--workers 0"),
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), RunError, "killed by signal 9.*--workers N"),
    "ended": (lambda: os._exit(3), RunError, "ended with status 3.*--workers 0"),
    "stuck": (forever, RunError, "delivered nothing for 1 s.*--workers 0"),
    "cannot be sent": (lambda: threading.Lock(), RunError, "ended with status 1.*--workers 0"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="the faults are not pickled")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_worker_is_one_line_and_an_end(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "stuck":
        monkeypatch.setattr(workers, "STUCK_SECONDS", 1)
    act, kind, message = FAULTS[fault]
    before, taken = time.monotonic(), []
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(kind, match=message) as caught:
        taken += load_in_workers(lambda key: act() if key == 3 else key, range(40), Plan(2, 2), pin_memory=False)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - before < SECONDS
    assert multiprocessing.active_children() == []
    assert signal.getsignal(signal.SIGCHLD) is handler


def test_a_fault_before_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "prepare_worker", lambda worker: raise_error(OSError(errno.ENOMEM, "no memory")))
    with pytest.raises(RunError, match=r"failed \(OSError: \[Errno 12\] no memory\): --workers 0") as caught:
        list(load_in_workers(abs, range(9), Plan(2, 2), pin_memory=False))
    assert "\n" not in str(caught.value)
    assert multiprocessing.active_children() == []


def test_workers_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    process, started = type(multiprocessing.get_context().Process()), []
    start = process.start

    def start_one(self: multiprocessing.Process) -> None:
        if started:
            raise OSError(errno.EMFILE, "Too many open files")
        started.append(self)
        start(self)

    monkeypatch.setattr(process, "start", start_one)
    with pytest.raises(RunError, match=r"cannot be started \(.*Too many open files\): --workers 0"):
        list(load_in_workers(abs, range(9), Plan(3, 2), pin_memory=False))
    assert started
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("busy", [False, True])
def test_an_iteration_that_is_given_up_ends_its_workers(busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "GRACE_SECONDS", 1)
    batches = load_in_workers(lambda key: forever() if busy and key else key, range(40), Plan(2, 2), pin_memory=False)
    assert next(batches) == 0
    assert len(multiprocessing.active_children()) == 2
    before = time.monotonic()
    batches.close()
    assert multiprocessing.active_children() == []
    assert time.monotonic() - before < SECONDS / 2


def test_a_process_that_exits_does_not_wait_for_its_workers() -> None:
    """They ignore the one signal that multiprocessing sends."""
    program = """
    import time
    from allmlp.data.workers import Plan, load_in_workers
    def load(key):
        if key > 1:
            time.sleep(1000)
        return key
    if __name__ == "__main__":
        batches = load_in_workers(load, range(9), Plan(2, 2), pin_memory=False)
        print(next(batches))
        raise SystemExit(3)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=2 * SECONDS
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "0\n", "")


# As many workers as there is room for


@pytest.mark.parametrize(
    ("room", "processes", "expected", "said"),
    [
        (PLENTY, 1, Plan(4, 4), ""),
        (1 << 40, 8, Plan(4, 4), ""),
        (200, 1, Plan(4, 2), ""),  # of 10 bytes each; two fifths of the room are for one loader
        (100, 1, Plan(4, 1), ""),
        (100, 2, Plan(2, 1), "with --workers 2 instead of 4: .* little room"),
        (20, 1, Plan(0, 1), r"in the main process \(--workers 0\): .* little room"),
    ],
)
def test_workers_fit_into_the_shared_memory(
    room: float,
    processes: int,
    expected: Plan,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(workers, "shared_memory_room", lambda: room)
    monkeypatch.setattr(workers, "workers_with_files", lambda count: count)
    assert plan_workers(4, 10, processes) == expected
    assert len(caplog.messages) == bool(said)
    assert re.search(said, "".join(caplog.messages))


def test_no_more_bytes_are_made_ahead_than_the_limit() -> None:
    for size in (1 << 20, 64 << 20, 600 << 20):
        plan = plan_workers(8, size, 1)
        assert plan.workers * plan.ahead * size <= max(workers.MAX_BYTES_AHEAD, plan.workers * size)


def test_few_descriptors_and_long_paths_need_the_main_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 40))
    assert plan_workers(2, 10, 1).workers == 0
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / ("x" * 90)))
    assert plan_workers(2, 10, 1).workers == 0
    assert ["ulimit -n 40" in caplog.messages[0], "TMPDIR" in caplog.messages[1]] == [True, True]


def test_a_low_limit_of_descriptors_is_raised() -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        assert plan_workers(8, 10, 1).workers == 8
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("count", [0, 2])
def test_a_large_batch_is_put_together_from_chunks(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    names = tuple(map(str, range(10)))
    dataset = ImageDataset(
        store=ArrayStore(pixels, names), names=names, labels=np.arange(10), classes=tuple("abcdefghij")
    )
    transform = EvaluationTransform(image_size=(4, 4), preprocessing=Preprocessing(crop_ratio=1.0))
    whole = list(evaluation_batches(dataset, transform, batch_size=6, workers=0))
    monkeypatch.setattr(loader, "MAX_CHUNK_BYTES", 2 * 3 * 4 * 4 + 1)  # two images
    chunked = list(evaluation_batches(dataset, transform, batch_size=6, workers=count))
    assert len(whole) == len(chunked) == 2
    for a, b in zip(whole, chunked, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
