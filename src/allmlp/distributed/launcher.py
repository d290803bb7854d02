"""Starts the processes of a run on this machine, and ends them together.

It gives them the environment variables that torchrun gives. What torchrun does not do: the exit status is the run's
own, 143 or 130 after a signal, so that a scheduler knows that it can be gone on with.
"""

import ctypes
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

LINUX = sys.platform == "linux"
PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h: the signal that a process gets when the one that started it is killed
GRACE = 15.0  # seconds that the others have to end by themselves after one has failed
LAST_SAVE = 3600.0  # seconds that they have after one was stopped by a signal: they all save, and end at the same step
MEETING = timedelta(minutes=10)  # that machines wait for each other
SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOPPED = tuple(128 + number for number in SIGNALS)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """``processes`` on each of ``machines``, of which this is number ``machine``; they meet at ``meet``.

    ``meet`` is HOST:PORT of machine 0; None, on one machine, takes a free port.
    """

    processes: int
    machines: int = 1
    machine: int = 0
    meet: str | None = None


def launch(plan: Plan, words: Sequence[str]) -> int:
    """Runs ``mixer WORDS`` in each process; the exit status is that of the first that ended otherwise than well."""
    host, _, port = (plan.meet or "127.0.0.1:0").rpartition(":")
    store = None
    if plan.machine == 0:  # which holds it outside the ranks, so that it outlives any of them
        store = TCPStore(host, int(port), is_master=True, wait_for_workers=False, timeout=MEETING)
        port = store.port
    children: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        for local_rank in range(plan.processes):
            children.append(start(plan, local_rank, host, int(port), words))
        return wait_for(children, plan.machine * plan.processes)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
        del store


def start(plan: Plan, local_rank: int, host: str, port: int, words: Sequence[str]) -> subprocess.Popen[bytes]:
    place = {
        "RANK": plan.machine * plan.processes + local_rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": plan.machines * plan.processes,
        "LOCAL_WORLD_SIZE": plan.processes,
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,  # the store is there: no rank is to make one
    }
    threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // plan.processes, 1))}
    environment = threads | os.environ | {key: str(value) for key, value in place.items()}
    command = [sys.executable, "-m", "allmlp.cli", *words]
    die_too = functools.partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGTERM) if LINUX else None
    return subprocess.Popen(  # in a session of its own: a terminal's Ctrl-C comes to us alone
        command, env=environment, start_new_session=True, preexec_fn=die_too
    )


def wait_for(children: Sequence[subprocess.Popen[bytes]], first_rank: int = 0) -> int:
    status, deadline = 0, float("inf")
    running = dict(enumerate(children, start=first_rank))
    while running and time.monotonic() < deadline:
        time.sleep(0.05)
        for rank, child in list(running.items()):
            code = child.poll()
            if code is None:
                continue
            del running[rank]
            if code < 0 and -code not in SIGNALS:
                tell(f"rank {rank} was ended by signal {-code} ({signal.Signals(-code).name})")
            if code and not status:
                status = code if code > 0 else 128 - code if -code in SIGNALS else 1
                deadline = time.monotonic() + (LAST_SAVE if status in STOPPED else GRACE)
    for rank in running:
        tell(f"rank {rank} did not end with the others: killed")
    return status


def tell(what: str) -> None:
    print(f"mixer: {what}", file=sys.stderr, flush=True)
