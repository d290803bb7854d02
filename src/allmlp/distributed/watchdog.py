"""Ends a run of several processes of which one is dead, stuck or at fault, and says which."""

import json
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from allmlp.errors import Stopped

PERIOD = 0.5  # seconds between two signs of life
GRACE = 5.0  # seconds that the main thread has to end by itself once another rank has failed
INNERMOST = 4  # frames of the main thread that tell whether it communicates
COMMUNICATION = (f"torch{os.sep}distributed", f"torch{os.sep}autograd")  # in the backward pass gradients are exchanged
CONNECTING = timedelta(seconds=60)
PATIENCE = 3600.0  # for what has no steps of its own to show: compiling, reading a large folder


def connect_store(timeout: timedelta, opens: bool = False) -> Store:
    """A connection to the store where the processes meet, which one of them ``opens`` unless whoever started them has.

    torchrun may keep a store when it starts the processes again, so each attempt has names of its own in it.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_open = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(host, port, is_master=opens and not is_open, wait_for_workers=False, timeout=timeout)
    return PrefixStore(f"mixer/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class Watchdog:
    """A thread in each process that shows signs of life, and looks at those of the others.

    The main thread calls ``beat`` whenever it gets on. Without one for ``timeout`` seconds (more for what is slow) all
    signs are compared: a process that shows none any more is stopped or dead; else those are stuck whose main thread is
    not in PyTorch's communication, where the others wait for them; else the one that has been there the longest.

    Leaving the ``with`` block by an error tells the other ranks, which then end too; the first error is the one shown.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout: float) -> None:
        self.store, self.rank, self.world_size, self.timeout = store, rank, world_size, timeout
        self.doing, self.since, self.deadline = "starting", time.monotonic(), time.monotonic() + PATIENCE
        self.done = threading.Event()
        self.signs = 0
        self.thread = threading.Thread(target=self.watch, name="watchdog", daemon=True)

    def heartbeat(self, doing: str, slow: bool = False) -> None:
        """Called by the main thread at each piece of progress."""
        self.doing, self.since = doing, time.monotonic()
        self.deadline = self.since + (max(self.timeout, PATIENCE) if slow else self.timeout)

    def __enter__(self) -> "Watchdog":
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Stopped):  # which all are, each when it is ready
            first = self.claim(f"{type(error).__name__}: {error}", getattr(error, "status", 1))
            if first["rank"] == self.rank:
                record(error)
            else:
                error.__dict__["failed_first"] = first
        self.done.set()

    def claim(self, what: str, status: int = 1) -> dict[str, Any]:
        """Tells a failure to all; the first that was told, which may be another's."""
        mine = json.dumps({"rank": self.rank, "what": what, "status": status})
        try:
            return json.loads(self.store.compare_set("failure", "", mine))
        except RuntimeError:  # the store went with whoever held it
            return json.loads(mine)

    def watch(self) -> None:
        try:
            while not self.done.wait(PERIOD):
                self.show()
                if self.store.check(["failure"]):
                    self.follow(json.loads(self.store.get("failure")))
                elif time.monotonic() > self.deadline:
                    self.diagnose_hang()
        except RuntimeError as error:
            if not self.done.wait(GRACE):
                self.die(f"the store of the run is gone ({str(error).splitlines()[0]}): so is whoever started it")

    def show(self) -> None:
        self.signs += 1
        sign = {"signs": self.signs, "doing": self.doing, "age": time.monotonic() - self.since, **main_thread()}
        self.store.set(f"alive/{self.rank}", json.dumps(sign))

    def signs_of(self, rank: int) -> dict[str, Any]:
        key = f"alive/{rank}"
        if not self.store.check([key]):
            return {"signs": 0, "doing": "none", "age": 0.0, "where": "nowhere", "waits": False}
        return json.loads(self.store.get(key))

    def follow(self, failure: dict[str, Any]) -> None:
        """Another rank has failed: this one ends too, if its main thread does not by itself."""
        if failure["rank"] != self.rank and not self.done.wait(GRACE):
            self.die(f"ended because rank {failure['rank']} failed: {failure['what']}", failure["status"])

    def diagnose_hang(self) -> None:
        before = [self.signs_of(rank)["signs"] for rank in range(self.world_size)]
        end = time.monotonic() + 4 * PERIOD + 1
        while time.monotonic() < end:
            self.show()
            time.sleep(PERIOD)
        now = [self.signs_of(rank) for rank in range(self.world_size)]
        silent = [rank for rank in range(self.world_size) if now[rank]["signs"] == before[rank]]
        busy = [rank for rank in range(self.world_size) if not now[rank]["waits"]]
        slowest = max(range(self.world_size), key=lambda rank: now[rank]["age"])
        stuck = silent or (busy if len(busy) < self.world_size else [slowest])
        state = "is stopped or dead" if silent else "is stuck"
        names = ", ".join(f"rank {r} {state} ({now[r]['doing']}, in {now[r]['where']})" for r in stuck)
        what = f"no progress for {self.timeout:g} s: {names}"
        if self.claim(what)["what"] == what:
            self.die(what)
        self.die("ended with the others")

    def die(self, why: str, status: int = 1) -> None:
        print(f"mixer: rank {self.rank}: {why}", file=sys.stderr, flush=True)
        os._exit(status)


def main_thread() -> dict[str, Any]:
    """Where the main thread is, and whether it waits there for other ranks."""
    ident = threading.main_thread().ident
    frame = sys._current_frames().get(ident or 0)
    if frame is None:
        return {"where": "nowhere", "waits": False}
    where, waits = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}, {frame.f_code.co_name}", False
    for _ in range(INNERMOST):
        if frame is not None:
            waits |= any(part in frame.f_code.co_filename for part in COMMUNICATION)
            frame = frame.f_back
    return {"where": where, "waits": waits}


def record(error: BaseException) -> None:
    """Where torchrun looks for what to print of the first failure, if it was torchrun that started this."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    handler.record_exception(error)
