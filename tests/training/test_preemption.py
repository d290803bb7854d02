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
from allmlp.errors import RunError, Stopped
from allmlp.training import preemption as module
from allmlp.training.preemption import Preemption, SignalState, deferred_signals

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
ALL = TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


def wait_until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir()) if sys.platform == "linux" else 0


def test_the_first_signal_is_only_recorded_and_all_handlers_are_restored() -> None:
    def mine(number: int, frame: object) -> None:
        seen.append(number)

    seen: list[int] = []
    numbers = [*ALL, signal.SIGUSR1]
    before = [signal.signal(number, mine) for number in numbers]
    threads, files = threading.active_count(), open_files()
    try:
        for number in ALL:
            with deferred_signals() as outer:
                with deferred_signals() as inner:
                    os.kill(os.getpid(), signal.SIGUSR1)  # another signal is left alone
                    os.kill(os.getpid(), number)
                    wait_until(lambda: inner.received)
                assert (outer.received, inner.received) == (0, number)
                child = os.fork()  # as the processes that load images are: its signal is not the run's
                if child == 0:
                    os.kill(os.getpid(), number)
                    os._exit(7)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
                time.sleep(0.05)
                assert outer.received == 0
        assert seen == [signal.SIGUSR1] * 3
        assert [signal.getsignal(number) for number in numbers] == [mine] * 4
        assert signal.set_wakeup_fd(-1) == -1
        assert (threading.active_count(), open_files()) == (threads, files)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As nohup asks for."""
    before = signal.signal(HUP, signal.SIG_IGN)
    try:
        with deferred_signals() as signals:
            os.kill(os.getpid(), HUP)
            os.kill(os.getpid(), TERM)
            wait_until(lambda: signals.received)
        assert signals.received == TERM
        assert signal.getsignal(HUP) is signal.SIG_IGN
    finally:
        signal.signal(HUP, before)


def test_a_signal_is_recorded_while_the_main_thread_computes() -> None:
    """A Python signal handler would wait until the main thread returns to the interpreter."""
    recorded = threading.Event()
    with deferred_signals() as signals:
        threading.Timer(0.05, lambda: os.kill(os.getpid(), TERM)).start()
        threading.Thread(target=lambda: (wait_until(lambda: signals.received), recorded.set())).start()
        sorted(range(3_000_000, 0, -1))
        assert recorded.wait(10)


def test_outside_the_main_thread_no_handler_is_changed() -> None:
    seen, before = [], [signal.getsignal(number) for number in ALL]

    def work() -> None:
        with deferred_signals() as signals:
            seen.append((signals.received, [signal.getsignal(number) for number in ALL]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(0, before)]


@pytest.mark.parametrize(
    ("first", "second", "after", "ends"),
    [
        *((INT, INT, 0.0, 130), (INT, TERM, 0.0, None), (INT, TERM, 2.0, 143)),
        *((TERM, TERM, 0.5, None), (TERM, TERM, 1.5, 143), (TERM, INT, 0.1, 130)),
        *((HUP, HUP, 0.1, None), (HUP, HUP, 2.0, None), (HUP, TERM, 2.0, 143), (TERM, HUP, 2.0, None)),
    ],
)
def test_which_second_signal_ends_the_process(
    first: int, second: int, after: float, ends: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler and a launcher may both send SIGTERM, so that two within a second are the same request."""
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
        process.send_signal(INT)
    assert process.wait(20) == 130


# Requests of a run


def preemption_in(folder: Path, signals: SignalState | None = None, save_seconds: float = 1e9) -> Preemption:
    checkpoints = CheckpointManager(folder, SINGLE_PROCESS, keep=2)
    return Preemption(SINGLE_PROCESS, signals or SignalState(), checkpoints, save_seconds, "mixer train --resume it")


def test_a_signal_requests_a_checkpoint_and_the_end_of_the_run(tmp_path: Path) -> None:
    """test_interrupted_runs.py shows the rest."""
    signals = SignalState()
    preemption = preemption_in(tmp_path, signals)
    assert [*preemption.requests()] == [0, 0, 0, 0, 0]
    preemption.check()
    signals.receive(INT)
    assert [*preemption.requests()] == [0, 1, 0, 0, 0]
    assert preemption.wants_checkpoint([0, 1, 0, 0, 0])
    for requests, number in (  # of all processes
        ([1, 0, 0, 0, 0], TERM),
        ([0, 1, 0, 0, 0], INT),
        ([1, 1, 0, 0, 1], TERM),
        ([0, 0, 0, 0, 2], HUP),
    ):
        with pytest.raises(Stopped, match=rf"{number.name} after step .* --resume it") as caught:
            preemption.raise_if_requested(requests)
        assert caught.value.status == 128 + number


def test_a_checkpoint_is_due_after_save_seconds_and_restarts_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    preemption = preemption_in(tmp_path, save_seconds=60)
    for elapsed, due in ((59, 0), (2, 1), (100, 1)):
        clock[0] += elapsed
        assert [*preemption.requests()] == [0, 0, due, 0, 0]
        assert preemption.wants_checkpoint([*preemption.requests()]) == bool(due)
    preemption.save(1, {}, {"step": 1}, None)
    preemption.checkpoints.wait()
    assert [*preemption.requests()] == [0, 0, 0, 0, 0]


def test_a_failed_checkpoint_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file where a folder should be")
    preemption = preemption_in(tmp_path / "c")
    preemption.save(1, {}, {"step": 1}, None)
    wait_until(lambda: preemption.checkpoints.failed)
    requests = [*preemption.requests()]
    assert requests == [0, 0, 0, 1, 0]
    assert not preemption.wants_checkpoint(requests)
    with pytest.raises(RunError, match="cannot be written"):
        preemption.raise_if_requested(requests)
