"""SIGTERM, SIGHUP and SIGINT during training, and how all ranks save, stop or give up at the same step.

A signal is only recorded; the run then finishes its step, saves and stops. A second signal ends the process at once,
or, where the process belongs to the caller, raises KeyboardInterrupt in the main thread. But a second SIGHUP does
nothing: shells repeat it when their terminal is closed.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from allmlp.checkpointing.manager import CheckpointManager
from allmlp.distributed.context import DistributedContext
from allmlp.distributed.signals import HANG_UP, STOPPING_SIGNALS, not_ignored
from allmlp.errors import Stopped

SAME_REQUEST = 1.0  # seconds: a scheduler and a launcher may both send SIGTERM


class SignalState:
    """``received`` is the first signal that arrived, 0 before. ``may_exit``: a second one ends the process."""

    def __init__(self, may_exit: bool = True) -> None:
        self.may_exit = may_exit
        self.received = 0
        self.received_at = 0.0
        self.handled = 0

    def receive(self, number: int) -> None:
        if not self.received:
            self.received, self.received_at = number, time.monotonic()
        elif self.may_exit and self.is_second(number):
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(128 + number)

    def is_second(self, number: int) -> bool:
        """Whether a signal repeats the first one's request."""
        if number == signal.SIGTERM:
            return time.monotonic() - self.received_at > SAME_REQUEST
        return number != HANG_UP

    def handle(self, number: int, frame: object) -> None:
        """The handler, which Python calls in the main thread, after the thread that records signals or before it."""
        self.handled += 1
        if not self.may_exit and self.handled > 1 and self.is_second(number):
            raise KeyboardInterrupt


@functools.cache
def detach_children() -> None:
    """Keeps forked processes from writing their signals to this process's socket, which they inherit."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


@contextlib.contextmanager
def deferred_signals(may_exit: bool = True) -> Iterator[SignalState]:
    """Within the block, a thread records signals, even while the main thread is inside a long computation.

    Outside the main thread, where Python cannot set handlers, nothing changes.
    """
    state, handled = SignalState(may_exit), not_ignored(STOPPING_SIGNALS)
    if threading.current_thread() is not threading.main_thread():
        yield state
        return
    reader, writer = socket.socketpair()  # not a pipe: on Windows it cannot be made non-blocking
    writer.setblocking(False)

    def listen() -> None:
        while (data := reader.recv(1)) not in (b"", b"\0"):
            if data[0] in handled:
                state.receive(data[0])

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    detach_children()
    before = [signal.signal(number, state.handle) for number in handled]
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield state
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in zip(handled, before, strict=True):
            signal.signal(number, handler)
        writer.send(b"\0")
        thread.join()
        reader.close()
        writer.close()


class Requests(NamedTuple):
    """What one process requests of all, exchanged at each step; or the sums over all processes."""

    terminate: int  # SIGTERM was received
    interrupt: int  # SIGINT was received
    save: int  # a checkpoint is due by the clock
    failed: int  # a checkpoint could not be written
    hang_up: int  # SIGHUP was received

    @property
    def signal(self) -> signal.Signals | None:
        """The signal that stops the run, if there is one."""
        if self.hang_up and not self.terminate and not self.interrupt:
            assert HANG_UP is not None
            return signal.Signals(HANG_UP)
        return signal.SIGTERM if self.terminate else signal.SIGINT if self.interrupt else None


class Preemption:
    """The requests of this process, and what all ranks do about the requests of any.

    Args:
        context: all ranks.
        signals: received by this process.
        checkpoints: saved when requested; a failure to write one is a request too.
        save_seconds: a checkpoint is due after so long without one, by the clock of rank 0.
        resume_command: shown in the message when the run stops.
    """

    def __init__(
        self,
        context: DistributedContext,
        signals: SignalState,
        checkpoints: CheckpointManager,
        save_seconds: float,
        resume_command: str,
    ) -> None:
        self.context, self.signals, self.checkpoints = context, signals, checkpoints
        self.save_seconds, self.resume_command = save_seconds, resume_command
        self.saved_at = time.monotonic()

    def requests(self) -> Requests:
        """The requests of this process."""
        return Requests(
            terminate=int(self.signals.received == signal.SIGTERM),
            interrupt=int(self.signals.received == signal.SIGINT),
            save=int(self.context.is_rank0 and time.monotonic() - self.saved_at > self.save_seconds),
            failed=int(self.checkpoints.failed),
            hang_up=int(self.signals.received not in (0, signal.SIGTERM, signal.SIGINT)),
        )

    def wants_checkpoint(self, requests: list[int]) -> bool:
        """Whether all ranks are to save now: a checkpoint is due, or the run is about to stop."""
        total = Requests(*requests)
        return bool(total.save or total.signal)

    def save(
        self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], best: tuple[int, float] | None
    ) -> None:
        """Starts a checkpoint, and the clock until the next one is due."""
        self.context.heartbeat(f"saving step {step}")
        self.checkpoints.save(step, tensors, state, None if best is None else best[0])
        self.saved_at = time.monotonic()

    def raise_if_requested(self, requests: list[int]) -> None:
        """Ends the run on all ranks if one of them requests it, after its checkpoint is written.

        Raises:
            Stopped: by a signal.
            RunError: a checkpoint could not be written.
        """
        total = Requests(*requests)
        if total.failed or total.signal:
            self.checkpoints.wait()
        if total.signal:
            name, status, last = total.signal.name, 128 + total.signal, self.checkpoints.last_step
            raise Stopped(f"stopped by {name} after step {last}: resume with {self.resume_command}", status)

    def check(self) -> None:
        """Exchanges requests outside a step, for instance during an evaluation, and acts on them. Collective."""
        self.raise_if_requested(self.context.sum([*self.requests()]))
