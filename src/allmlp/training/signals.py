"""SIGTERM and SIGINT during a training run: noted, so that it can save and end; a second one ends it at once."""

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator

HEEDED = (signal.SIGTERM, signal.SIGINT)
ONE_REQUEST = 1.0  # second: SIGTERM comes twice where a scheduler and a launcher both send it


class SignalState:
    """``received`` is the first signal that came, 0 before."""

    def __init__(self) -> None:
        self.received = 0
        self.when = 0.0

    def hear(self, number: int) -> None:
        if not self.received:
            self.received, self.when = number, time.monotonic()
        elif number != signal.SIGTERM or time.monotonic() - self.when > ONE_REQUEST:
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(128 + number)


@functools.cache
def leave_children_alone() -> None:
    """What a forked process is told is not this one's: it does not inherit the pipe that signals are noted by."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


@contextlib.contextmanager
def deferred_signals() -> Iterator[SignalState]:
    """Within the block signals are noted by a thread: even while the main one is deep in a computation.

    Outside the main thread, where Python cannot set handlers, nothing is changed.
    """
    signals = SignalState()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while (data := os.read(reader, 1)) not in (b"", b"\0"):
            if data[0] in HEEDED:
                signals.hear(data[0])

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    leave_children_alone()
    before = [signal.signal(number, lambda number, frame: None) for number in HEEDED]
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield signals
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in zip(HEEDED, before, strict=True):
            signal.signal(number, handler)
        os.write(writer, b"\0")
        thread.join()
        os.close(reader)
        os.close(writer)
