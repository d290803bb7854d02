"""Signals during a run: the first is noted, a second ends the process, and everything is as it was afterwards."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from allmlp.training.signals import SignalState, deferred_signals

from allmlp.checkpointing.manager import CheckpointManager
from allmlp.distributed.context import SINGLE_PROCESS
from allmlp.errors import Stopped
from allmlp.training import signals as module
from allmlp.training.preemption import Control

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
BOTH = [signal.SIGTERM, signal.SIGINT]


def wait_until(true: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("number", BOTH)
def test_the_first_signal_is_noted_and_nothing_else_happens(number: signal.Signals) -> None:
    with deferred_signals() as signals:
        assert signals.received == 0
        os.kill(os.getpid(), number)
        wait_until(lambda: signals.received)
        assert signals.received == number


def test_a_signal_is_noted_while_the_main_thread_computes() -> None:
    """A handler of Python's would have to wait for the main thread to come back to it."""
    with deferred_signals() as signals:
        timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGTERM))
        timer.start()
        seen = []
        watcher = threading.Thread(target=lambda: (wait_until(lambda: signals.received), seen.append(time.monotonic())))
        watcher.start()
        b"x".join([b"y"] * 3)
        sorted(range(2_000_000, 0, -1))
        watcher.join(10)
        timer.join()
        assert seen


def test_a_second_sigterm_at_once_is_the_same_request() -> None:
    with deferred_signals() as signals:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: signals.received)
        time.sleep(0.05)
        assert signals.received == signal.SIGTERM


def test_everything_is_as_it_was_afterwards() -> None:
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


def test_one_within_another() -> None:
    with deferred_signals() as outer:
        with deferred_signals() as inner:
            os.kill(os.getpid(), signal.SIGINT)
            wait_until(lambda: inner.received)
        assert outer.received == 0
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: outer.received)
        assert (inner.received, outer.received) == (signal.SIGINT, signal.SIGTERM)


def test_other_signals_are_none_of_its_business() -> None:
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


def test_in_another_thread_nothing_is_changed() -> None:
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
def test_a_forked_child_has_signals_of_its_own(number: signal.Signals) -> None:
    """What is sent to a process that loads images is not the run's."""
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
    signals.hear(first)
    assert (signals.received, ended) == (first, [])
    clock[0] += after
    signals.hear(second)
    assert ended == ([] if ends is None else [ends])
    assert signals.received == first


PROGRAM = """
import os, signal, time
from allmlp.training.signals import deferred
with deferred() as signals:
    print("ready", flush=True)
    while not signals.received:
        time.sleep(0.001)
    print("noted", flush=True)
    time.sleep(60)
"""


def test_ctrl_c_twice_ends_it_at_once() -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in ("ready\n", "noted\n"):
        assert process.stdout.readline() == line
        process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


# what a run makes of them


def control(tmp_path: Path, signals: SignalState, save_seconds: float = 1e9) -> Control:
    checkpoints = CheckpointManager(tmp_path, SINGLE_PROCESS, keep=2)
    return Control(SINGLE_PROCESS, signals, checkpoints, save_seconds, "mixer train --resume it")


def test_nothing_is_asked_for(tmp_path: Path) -> None:
    asks = control(tmp_path, SignalState())
    assert [*asks.requests()] == [0, 0, 0, 0]
    assert not asks.saves([*asks.requests()])
    asks.heed([*asks.requests()])
    asks.poll()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(number: signal.Signals, status: int, tmp_path: Path) -> None:
    signals = SignalState()
    asks = control(tmp_path, signals)
    signals.hear(number)
    assert asks.saves([*asks.requests()])
    asks.save(5, {}, {"step": 5}, None)
    with pytest.raises(
        Stopped, match=f"^stopped by {number.name} after step 5: resume with mixer train --resume it$"
    ) as caught:
        asks.heed([*asks.requests()])
    assert caught.value.status == status
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]  # written to its end


def test_of_two_signals_the_scheduler_s_counts(tmp_path: Path) -> None:
    """Of two processes that heard different ones."""
    with pytest.raises(Stopped, match="SIGTERM"):
        control(tmp_path, SignalState()).heed([1, 1, 0, 0])


def test_time_makes_a_checkpoint_due_and_a_checkpoint_begins_a_new_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("allmlp.training.preemption.time.monotonic", lambda: clock[0])
    asks = control(tmp_path, SignalState(), save_seconds=60)
    for passed, due in ((59, 0), (2, 1), (100, 1)):
        clock[0] += passed
        assert [*asks.requests()] == [0, 0, due, 0]
        assert asks.saves([*asks.requests()]) == bool(due)
    asks.save(1, {}, {"step": 1}, None)
    asks.checkpoints.wait()
    assert [*asks.requests()] == [0, 0, 0, 0]


def test_a_checkpoint_that_could_not_be_written_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file where a folder should be")
    asks = control(tmp_path / "c", SignalState())
    asks.save(1, {}, {"step": 1}, None)
    wait_until(lambda: asks.checkpoints.failed)
    assert [*asks.requests()] == [0, 0, 0, 1]
    assert not asks.saves([*asks.requests()])
    with pytest.raises(RuntimeError, match="cannot be written"):
        asks.heed([*asks.requests()])
