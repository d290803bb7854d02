"""Ends a run of several processes when one of them is dead, stuck or failed, and names that rank."""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from allmlp.device import first_line
from allmlp.errors import RunError, Stopped

PERIOD = 0.5  # seconds between two heartbeats
GRACE = 5.0  # seconds for the main thread to end by itself after another rank failed
INNERMOST = 4  # frames of the main thread that show whether it is communicating
COMMUNICATION = (f"torch{os.sep}distributed", f"torch{os.sep}autograd")  # the backward pass exchanges gradients
CONNECT_TIMEOUT = timedelta(seconds=60)
SLOW_TIMEOUT = 3600.0  # seconds for an activity that reports no progress: compiling, reading a large folder


def connect_store(timeout: timedelta, is_server: bool = False) -> Store:
    """A connection to the key-value store of the run; ``is_server`` starts the store, unless the launcher has one.

    torchrun may keep its store when it restarts the processes, so each attempt uses its own prefix for keys.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    launcher_has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = is_server and not launcher_has_store
    with connection_errors():
        store = TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=timeout)
    return PrefixStore(f"mixer/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@contextlib.contextmanager
def connection_errors() -> Iterator[None]:
    """Turns PyTorch's errors about connecting the processes into a RunError that names where they were to meet."""
    try:
        yield
    except RuntimeError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunError(
            f"cannot join the other processes at {place} ({first_line(error)}): check the address (--rdzv-endpoint), "
            "the firewall, and that all processes have started"
        ) from error


class Watchdog:
    """A thread in each process that publishes heartbeats and reads those of the other ranks.

    The main thread calls ``heartbeat`` whenever it makes progress. After ``timeout`` seconds without progress (more
    for slow activities) the heartbeats of all ranks are compared. A rank without heartbeats is stopped or dead.
    Otherwise the stuck ranks are those whose main thread is not inside PyTorch's communication, because the others
    wait for them there; if all are communicating, it is the one that has been there longest.

    Leaving the ``with`` block with an error reports it to the other ranks, which then end too. The first error
    reported is the one shown.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout: float) -> None:
        self.store, self.rank, self.world_size, self.timeout = store, rank, world_size, timeout
        self.activity, self.since, self.deadline = "starting", time.monotonic(), time.monotonic() + SLOW_TIMEOUT
        self.done = threading.Event()
        self.beats = 0
        self.thread = threading.Thread(target=self.watch, name="watchdog", daemon=True)

    def heartbeat(self, activity: str, slow: bool = False) -> None:
        """Records that the main thread has made progress, and what it does next."""
        self.activity, self.since = activity, time.monotonic()
        self.deadline = self.since + (max(self.timeout, SLOW_TIMEOUT) if slow else self.timeout)

    def __enter__(self) -> "Watchdog":
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Stopped):  # all ranks stop, each when it is ready
            first = self.report_failure(f"{type(error).__name__}: {error}", getattr(error, "status", 1))
            if first["rank"] == self.rank:
                record_for_torchrun(error)
            else:
                error.__dict__["failed_first"] = first
        self.done.set()

    def report_failure(self, what: str, status: int = 1) -> dict[str, Any]:
        """Publishes a failure; returns the first one published, which may be another rank's."""
        mine = json.dumps({"rank": self.rank, "what": what, "status": status})
        try:
            return json.loads(self.store.compare_set("failure", "", mine))
        except RuntimeError:  # the process that held the store has ended
            return json.loads(mine)

    def watch(self) -> None:
        try:
            while not self.done.wait(PERIOD):
                self.publish_heartbeat()
                if self.store.check(["failure"]):
                    self.end_after(json.loads(self.store.get("failure")))
                elif time.monotonic() > self.deadline:
                    self.diagnose_hang()
        except RuntimeError as error:
            if not self.done.wait(GRACE):
                reason = str(error).splitlines()[0]
                self.exit_process(f"lost the connection to the run's store ({reason}): its launcher has ended")

    def publish_heartbeat(self) -> None:
        self.beats += 1
        age = time.monotonic() - self.since
        heartbeat = {"beats": self.beats, "activity": self.activity, "age": age, **locate_main_thread()}
        self.store.set(f"alive/{self.rank}", json.dumps(heartbeat))

    def last_heartbeat(self, rank: int) -> dict[str, Any]:
        key = f"alive/{rank}"
        if not self.store.check([key]):
            return {"beats": 0, "activity": "none", "age": 0.0, "where": "nowhere", "communicates": False}
        return json.loads(self.store.get(key))

    def end_after(self, failure: dict[str, Any]) -> None:
        """Ends this process if its main thread does not end by itself after another rank's failure."""
        if failure["rank"] != self.rank and not self.done.wait(GRACE):
            self.exit_process(f"ended because rank {failure['rank']} failed: {failure['what']}", failure["status"])

    def diagnose_hang(self) -> None:
        """Ends this process with a message that names the stuck ranks, or lets another rank's message stand."""
        before = [self.last_heartbeat(rank)["beats"] for rank in range(self.world_size)]
        end = time.monotonic() + 4 * PERIOD + 1
        while time.monotonic() < end:
            self.publish_heartbeat()
            time.sleep(PERIOD)
        now = [self.last_heartbeat(rank) for rank in range(self.world_size)]
        silent = [rank for rank in range(self.world_size) if now[rank]["beats"] == before[rank]]
        busy = [rank for rank in range(self.world_size) if not now[rank]["communicates"]]
        slowest = max(range(self.world_size), key=lambda rank: now[rank]["age"])
        stuck = silent or (busy if 0 < len(busy) < self.world_size else [slowest])
        state = "is stopped or dead" if silent else "is stuck"
        names = ", ".join(f"rank {r} {state} ({now[r]['activity']}, in {now[r]['where']})" for r in stuck)
        what = f"no progress for {self.timeout:g} s: {names}"
        if self.report_failure(what)["what"] == what:
            self.exit_process(what)
        self.exit_process("ended because another rank reported a failure")

    def exit_process(self, why: str, status: int = 1) -> None:
        print(f"mixer: rank {self.rank}: {why}", file=sys.stderr, flush=True)
        os._exit(status)


def locate_main_thread() -> dict[str, Any]:
    """Where the main thread is, and whether it is communicating with other ranks there."""
    ident = threading.main_thread().ident
    frame = sys._current_frames().get(ident or 0)
    if frame is None:
        return {"where": "nowhere", "communicates": False}
    where, communicates = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}, {frame.f_code.co_name}", False
    for _ in range(INNERMOST):
        if frame is not None:
            communicates |= any(part in frame.f_code.co_filename for part in COMMUNICATION)
            frame = frame.f_back
    return {"where": where, "communicates": communicates}


def record_for_torchrun(error: BaseException) -> None:
    """Writes the error where torchrun, if it started this process, looks for the first failure to print."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    handler.record_exception(error)
