"""Starts the processes of a run on this machine, and ends them together.

They get the same environment variables as from torchrun. Unlike with torchrun, the exit status is that of the run: 143,
130 or 129 after a signal, which tells a scheduler that the run can be resumed.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from allmlp.device import available_cores, first_line
from allmlp.distributed.signals import STOPPING_SIGNALS, not_ignored
from allmlp.errors import UserError

PIPE = "ALLMLP_LAUNCHER_PIPE"  # environment variable: a file descriptor that is at its end once the launcher has ended
GRACE = 15.0  # seconds for the other processes to exit after one has failed
LAST_SAVE = 3600.0  # seconds for the others to exit after a signal stopped one: they save a checkpoint first
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)  # how long machines wait for one another
STOPPED = tuple(128 + number for number in STOPPING_SIGNALS)


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """``nproc_per_node`` processes on each of ``nnodes`` machines, of which this one is ``node_rank``, as in torchrun.

    They meet at ``rdzv_endpoint``, HOST:PORT of machine 0; None, allowed on one machine, chooses a free port.
    """

    nproc_per_node: int
    nnodes: int = 1
    node_rank: int = 0
    rdzv_endpoint: str | None = None


def launch(config: LaunchConfig, words: Sequence[str]) -> int:
    """Runs ``mixer WORDS`` in each process; returns the exit status of the first that failed, or 0.

    Raises:
        UserError: the port of ``rdzv_endpoint`` cannot be used; Windows.
    """
    if sys.platform == "win32":
        raise UserError("several processes (--processes, --nnodes) need Linux or macOS: train in one process")
    host, _, port = (config.rdzv_endpoint or "127.0.0.1:0").rpartition(":")
    store = None
    if config.node_rank == 0:  # outside the ranks, so that the store outlives them
        store = start_store(host, int(port))
        port = store.port
    children: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in not_ignored(STOPPING_SIGNALS)}
    reader, writer = os.pipe()  # the children inherit the reader; the writer is closed when this process ends
    try:
        for local_rank in range(config.nproc_per_node):
            children.append(start_process(config, local_rank, (host, int(port)), reader, words))
        return wait_for(children, config.node_rank * config.nproc_per_node)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)
        del store


def start_store(host: str, port: int) -> TCPStore:
    """The key-value store of the run, which listens on this machine."""
    try:
        return TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=RENDEZVOUS_TIMEOUT)
    except RuntimeError as error:
        raise UserError(
            f"the processes cannot meet at {host}:{port} ({first_line(error)}): give an address of this machine and a "
            "free port with --rdzv-endpoint"
        ) from error


def start_process(
    config: LaunchConfig, local_rank: int, endpoint: tuple[str, int], pipe: int, words: Sequence[str]
) -> subprocess.Popen[bytes]:
    variables = {
        "RANK": config.node_rank * config.nproc_per_node + local_rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": config.nnodes * config.nproc_per_node,
        "LOCAL_WORLD_SIZE": config.nproc_per_node,
        "MASTER_ADDR": endpoint[0],
        "MASTER_PORT": endpoint[1],
        PIPE: pipe,
        "TORCHELASTIC_USE_AGENT_STORE": True,  # the store exists: no rank creates one
    }
    threads = {"OMP_NUM_THREADS": str(max(available_cores() // config.nproc_per_node, 1))}
    environment = threads | os.environ | {key: str(value) for key, value in variables.items()}
    command = [sys.executable, "-m", "allmlp.cli", *words]
    # in a separate session, so that Ctrl-C in a terminal reaches only this process
    return subprocess.Popen(command, env=environment, start_new_session=True, pass_fds=(pipe,))


def end_with_launcher() -> None:
    """Sends this process SIGTERM once the launcher that started it has ended, however that was."""
    if (pipe := os.environ.pop(PIPE, None)) is None:  # popped: processes that this one starts do not have the pipe
        return

    def wait() -> None:
        with contextlib.suppress(OSError):
            os.read(int(pipe), 1)  # nothing is ever written
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="launcher", daemon=True).start()


def wait_for(children: Sequence[subprocess.Popen[bytes]], first_rank: int = 0) -> int:
    """Waits until all have ended; returns the exit status of the first that failed, or 0.

    After a failure, the others have a limited time to exit; then they are reported, and ``launch`` kills them.
    """
    status, deadline = 0, float("inf")
    running = dict(enumerate(children, start=first_rank))
    while running and time.monotonic() < deadline:
        time.sleep(0.05)
        for rank, child in list(running.items()):
            code = child.poll()
            if code is None:
                continue
            del running[rank]
            if code < 0 and -code not in STOPPING_SIGNALS:
                report(f"rank {rank} was ended by signal {-code} ({signal.Signals(-code).name})")
            if code and not status:
                status = code if code > 0 else 128 - code if -code in STOPPING_SIGNALS else 1
                deadline = time.monotonic() + (LAST_SAVE if status in STOPPED else GRACE)
    for rank in running:
        report(f"rank {rank} did not end with the others: killed")
    return status


def report(message: str) -> None:
    print(f"mixer: {message}", file=sys.stderr, flush=True)
