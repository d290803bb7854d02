"""Signals during a run: the first one is recorded, a second one ends the process, and handlers are restored."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from allmlp.checkpointing.manager import CheckpointManager
from allmlp.distributed.context import SINGLE_PROCESS
from allmlp.errors import Stopped
from allmlp.training import preemption as module
from allmlp.training.preemption import Preemption, SignalState, deferred_signals

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
BOTH = [signal.SIGTERM, signal.SIGINT]


def wait_until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("number", BOTH)
def test_the_first_signal_is_only_recorded(number: signal.Signals) -> None:
    with deferred_signals() as signals:
        assert signals.received == 0
        os.kill(os.getpid(), number)
        wait_until(lambda: signals.received)
        assert signals.received == number


def test_a_signal_is_recorded_while_the_main_thread_computes() -> None:
    """A Python signal handler would wait until the main thread returns to the interpreter."""
    with deferred_signals() as signals:
        timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGTERM))
        timer.start()
        times = []
        watcher = threading.Thread(
            target=lambda: (wait_until(lambda: signals.received), times.append(time.monotonic()))
        )
        watcher.start()
        b"x".join([b"y"] * 3)
        sorted(range(2_000_000, 0, -1))
        watcher.join(10)
        timer.join()
        assert times


def test_a_sigterm_repeated_at_once_is_the_same_request() -> None:
    with deferred_signals() as signals:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: signals.received)
        time.sleep(0.05)
        assert signals.received == signal.SIGTERM


def test_handlers_threads_and_files_are_restored() -> None:
    def mine(number: int, frame: object) -> None:
        pass

    before = [signal.signal(number, mine) for number in BOTH]
    threads, files = threading.active_count(), open_files()
    try:
        for _ in range(3):
            with deferred_signals():
                os.kill(os.getpid(), signal.SIGTERM)
        assert [signal.getsignal(number) for number in BOTH] == [mine, mine]
        assert signal.set_wakeup_fd(-1) == -1
        assert (threading.active_count(), open_files()) == (threads, files)
    finally:
        for number, handler in zip(BOTH, before, strict=True):
            signal.signal(number, handler)


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir()) if sys.platform == "linux" else 0


def test_nested_blocks() -> None:
    with deferred_signals() as outer:
        with deferred_signals() as inner:
            os.kill(os.getpid(), signal.SIGINT)
            wait_until(lambda: inner.received)
        assert outer.received == 0
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: outer.received)
        assert (inner.received, outer.received) == (signal.SIGINT, signal.SIGTERM)


def test_other_signals_are_left_alone() -> None:
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        with deferred_signals() as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_until(lambda: seen)
            time.sleep(0.02)
            assert signals.received == 0
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_outside_the_main_thread_no_handler_is_changed() -> None:
    seen = []

    def work() -> None:
        with deferred_signals() as signals:
            seen.append((signals.received, [signal.getsignal(number) for number in BOTH]))

    before = [signal.getsignal(number) for number in BOTH]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(0, before)]


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_to_a_forked_child_does_not_reach_the_run(number: signal.Signals) -> None:
    """The processes that load images are forked from the run."""
    with deferred_signals() as signals:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), number)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        time.sleep(0.05)
        assert signals.received == 0


@pytest.mark.parametrize(
    ("first", "second", "after", "ends"),
    [
        (signal.SIGINT, signal.SIGINT, 0.0, 130),
        (signal.SIGINT, signal.SIGTERM, 0.0, None),
        (signal.SIGINT, signal.SIGTERM, 2.0, 143),
        (signal.SIGTERM, signal.SIGTERM, 0.5, None),
        (signal.SIGTERM, signal.SIGTERM, 1.5, 143),
        (signal.SIGTERM, signal.SIGINT, 0.1, 130),
    ],
)
def test_which_second_signal_ends_the_process(
    first: int, second: int, after: float, ends: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    clock = [100.0]
    monkeypatch.setattr(module.os, "_exit", ended.append)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    signals = SignalState()
    signals.receive(first)
    assert (signals.received, ended) == (first, [])
    clock[0] += after
    signals.receive(second)
    assert ended == ([] if ends is None else [ends])
    assert signals.received == first


PROGRAM = """
import os, signal, time
from allmlp.training.preemption import deferred_signals
with deferred_signals() as signals:
    print("ready", flush=True)
    while not signals.received:
        time.sleep(0.001)
    print("received", flush=True)
    time.sleep(60)
"""


def test_ctrl_c_twice_ends_the_process_at_once() -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in ("ready\n", "received\n"):
        assert process.stdout.readline() == line
        process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


# Requests of a run


def preemption_in(folder: Path, signals: SignalState, save_seconds: float = 1e9) -> Preemption:
    checkpoints = CheckpointManager(folder, SINGLE_PROCESS, keep=2)
    return Preemption(SINGLE_PROCESS, signals, checkpoints, save_seconds, "mixer train --resume it")


def test_without_signals_there_are_no_requests(tmp_path: Path) -> None:
    preemption = preemption_in(tmp_path, SignalState())
    assert [*preemption.requests()] == [0, 0, 0, 0]
    assert not preemption.wants_checkpoint([*preemption.requests()])
    preemption.raise_if_requested([*preemption.requests()])
    preemption.check()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint_and_stops_the_run(number: signal.Signals, status: int, tmp_path: Path) -> None:
    signals = SignalState()
    preemption = preemption_in(tmp_path, signals)
    signals.receive(number)
    assert preemption.wants_checkpoint([*preemption.requests()])
    preemption.save(5, {}, {"step": 5}, None)
    with pytest.raises(
        Stopped, match=f"^stopped by {number.name} after step 5: resume with mixer train --resume it$"
    ) as caught:
        preemption.raise_if_requested([*preemption.requests()])
    assert caught.value.status == status
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]  # complete


def test_sigterm_takes_precedence_over_sigint(tmp_path: Path) -> None:
    """When two processes received different signals."""
    with pytest.raises(Stopped, match="SIGTERM"):
        preemption_in(tmp_path, SignalState()).raise_if_requested([1, 1, 0, 0])


def test_a_checkpoint_is_due_after_save_seconds_and_restarts_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    preemption = preemption_in(tmp_path, SignalState(), save_seconds=60)
    for elapsed, due in ((59, 0), (2, 1), (100, 1)):
        clock[0] += elapsed
        assert [*preemption.requests()] == [0, 0, due, 0]
        assert preemption.wants_checkpoint([*preemption.requests()]) == bool(due)
    preemption.save(1, {}, {"step": 1}, None)
    preemption.checkpoints.wait()
    assert [*preemption.requests()] == [0, 0, 0, 0]


def test_a_failed_checkpoint_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file where a folder should be")
    preemption = preemption_in(tmp_path / "c", SignalState())
    preemption.save(1, {}, {"step": 1}, None)
    wait_until(lambda: preemption.checkpoints.failed)
    assert [*preemption.requests()] == [0, 0, 0, 1]
    assert not preemption.wants_checkpoint([*preemption.requests()])
    with pytest.raises(RuntimeError, match="cannot be written"):
        preemption.raise_if_requested([*preemption.requests()])
