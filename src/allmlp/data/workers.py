"""Worker processes that load batches: no more than there is room for, and ended whatever happens.

PyTorch's DataLoader is used with one difference: what fails in a worker, or the death of one, is raised where the next
batch is taken, as one line, and never leaves a process behind that the exit of this one would wait for.
"""

import copy
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable
from multiprocessing import queues, util
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from allmlp.errors import RunError, UserError, printable

log = logging.getLogger(__name__)

K = TypeVar("K")
T = TypeVar("T")
SHARED_MEMORY = Path("/dev/shm")  # where PyTorch puts the batches of workers on Linux
MAX_BYTES_AHEAD = 1 << 30  # of batches that are ready or being made
MAX_BATCHES_AHEAD = 4  # for each worker
MAX_SHARE_OF_ROOM = 0.4  # of the shared memory: training and evaluation may load at the same time
MAX_SOCKET_PATH, SOCKET_NAME = 107, len("/pymp-12345678/listener-12345678")  # bytes of a Unix socket's path
FILES_PER_WORKER, OTHER_FILES = 8, 24  # descriptors: pipes of a worker; what else a run opens at a time
GRACE_SECONDS = 5  # for workers to finish what they do, before they are killed
STUCK_SECONDS = 600  # without any batch, after which the workers count as stuck
REMEDY = "--workers 0 loads images in the main process"


class Failure(NamedTuple):
    """What a worker could not do, in place of a batch."""

    kind: type[UserError] | type[RunError]
    message: str


class Plan(NamedTuple):
    """How many worker processes load batches, and how many each makes ahead."""

    workers: int
    ahead: int


def plan_workers(workers: int, batch_bytes: int, processes: int) -> Plan:
    """As many of the requested workers as there is room for; says in one line if these are fewer.

    Args:
        workers: number of processes requested.
        batch_bytes: size of what a worker delivers at a time.
        processes: number of training processes on this machine, which share its memory.
    """
    if not workers:
        return Plan(0, 0)
    room = shared_memory_room() * MAX_SHARE_OF_ROOM / processes
    limits = {
        f"{SHARED_MEMORY} has little room ({room:,.0f} bytes of it may be used, a batch takes {batch_bytes:,})": int(
            min(room / batch_bytes, workers)
        ),
        f"few files may be opened (ulimit -n {open_files_limit()})": workers_with_files(workers),
        f"the path of {tempfile.gettempdir()} is too long for sockets (set TMPDIR)": 0 if long_paths() else workers,
    }
    reason, possible = min(limits.items(), key=lambda item: item[1])
    if possible < workers:
        instead = f"with --workers {possible} instead of {workers}" if possible else "in the main process (--workers 0)"
        log.warning("images are loaded %s: %s", instead, reason)
    ahead = min(room, MAX_BYTES_AHEAD) // (batch_bytes * max(possible, 1))
    return Plan(possible, int(min(max(ahead, 1), MAX_BATCHES_AHEAD)))


def shared_memory_room() -> float:
    """Bytes that are free where batches are shared; infinite where the system sets no such limit."""
    if not SHARED_MEMORY.is_dir():
        return float("inf")
    status = os.statvfs(SHARED_MEMORY)
    return status.f_bavail * status.f_frsize


def open_files_limit() -> int:
    """How many files this process may have open; where they would not be enough, the limit is raised if possible."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return 1 << 20
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024 and (hard == resource.RLIM_INFINITY or hard > soft):
        soft = 1024 if hard == resource.RLIM_INFINITY else min(1024, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


def workers_with_files(workers: int) -> int:
    """How many workers there are descriptors for."""
    listed = Path("/proc/self/fd")
    open_now = sum(1 for _ in listed.iterdir()) if listed.is_dir() else 32
    free = open_files_limit() - open_now - OTHER_FILES
    return max(0, min(workers, free // (FILES_PER_WORKER + MAX_BATCHES_AHEAD)))


def long_paths() -> bool:
    """Whether the sockets through which workers pass their batches would have paths that the system does not take."""
    return os.name == "posix" and len(os.fsencode(tempfile.gettempdir())) + SOCKET_NAME > MAX_SOCKET_PATH


class Tasks(TorchDataset, Generic[K, T]):
    """What the workers do: the batch of each key, or why it failed."""

    def __init__(self, load: Callable[[K], T]) -> None:
        self.load = load

    def __getitem__(self, key: K) -> T | Failure:
        try:
            return self.load(key)
        except (UserError, RunError) as error:
            return Failure(UserError if isinstance(error, UserError) else RunError, str(error))
        except Exception as error:  # whatever it is, the main process reports it in one line
            return Failure(RunError, describe(error))


def describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    what = lines[-1] if "Original Traceback" in str(error) else f"{type(error).__name__}: {lines[0]}"
    return printable(f"a process that loads images failed ({what[:300]}): {REMEDY}")


def load_in_workers(load: Callable[[K], T], keys: Iterable[K], plan: Plan, pin_memory: bool) -> Generator[T]:
    """Yields ``load(key)`` of each key in order, from worker processes.

    Raises:
        UserError, RunError: ``load`` raised it.
        RunError: ``load`` raised something else, a worker died, or none has delivered anything for ten minutes.
    """
    processes = Processes()
    iterator: LoaderIterator | None = None
    try:
        iterator = processes.start(Tasks(load), keys, plan, pin_memory)
        while (batch := processes.receive(iterator)) is not None:
            if isinstance(batch, Failure):
                raise batch.kind(batch.message)
            yield batch
    finally:
        processes.end(iterator)


class LoaderIterator(_MultiProcessingDataLoaderIter):
    """PyTorch's, without the end that it makes of its workers by itself, which fails where some were not started."""

    def __del__(self) -> None:
        pass


class Processes:
    """The worker processes of one iteration."""

    def __init__(self) -> None:
        self.all: list[BaseProcess] = []
        self.waiting_since: float | None = None
        self.stuck, self.ended = False, threading.Event()
        # before multiprocessing's own exit, which would wait for a worker that ignores its signal
        self.at_exit = util.Finalize(None, kill, args=(self.all,), exitpriority=100)

    def start(self, tasks: Tasks, keys: Iterable[Any], plan: Plan, pin_memory: bool) -> LoaderIterator:
        on_main_thread = threading.current_thread() is threading.main_thread()
        child_signal = getattr(signal, "SIGCHLD", None) if on_main_thread else None
        handler = None if child_signal is None else signal.getsignal(child_signal)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores, as asked
                loader = DataLoader(
                    tasks,
                    batch_size=None,
                    sampler=keys,
                    collate_fn=unchanged,
                    num_workers=plan.workers,
                    prefetch_factor=plan.ahead,
                    pin_memory=pin_memory,
                    worker_init_fn=prepare_worker,
                    multiprocessing_context=recording_context(self.all),
                )
                return LoaderIterator(loader)
        except (OSError, RuntimeError, EOFError) as error:
            raise RunError(f"the processes that load images cannot be started ({error}): {REMEDY}") from None
        finally:
            if child_signal is not None and handler is not None:
                signal.signal(child_signal, handler)  # PyTorch's raises the death of a worker anywhere in this process
            threading.Thread(target=self.watch, daemon=True, name="loader-watch").start()

    def receive(self, iterator: LoaderIterator) -> Any:
        """The next batch, or None after the last.

        Raises:
            RunError: a worker has died, or none delivers anything.
        """
        self.waiting_since = time.monotonic()
        try:
            return next(iterator, None)
        except Exception as error:  # PyTorch raises errors of many types when a worker has died
            if self.stuck:
                raise RunError(
                    f"the processes that load images have delivered nothing for {STUCK_SECONDS} s: check the disk or "
                    f"network that holds the data; {REMEDY}"
                ) from None
            raise RunError(self.describe_death() or describe(error)) from None
        finally:
            self.waiting_since = None

    def describe_death(self) -> str | None:
        codes = [process.exitcode for process in self.all if process.exitcode]
        if not codes:
            return None
        how = f"was killed by signal {-codes[0]}" if codes[0] < 0 else f"ended with status {codes[0]}"
        return (
            f"a process that loads images {how}, perhaps for lack of memory: give fewer with --workers N, or {REMEDY}"
        )

    def watch(self) -> None:
        """Kills the workers when nothing arrives: ``receive`` then ends."""
        while not self.ended.wait(min(1.0, STUCK_SECONDS / 4)):
            since = self.waiting_since
            if since is not None and time.monotonic() - since > STUCK_SECONDS:
                self.stuck = True
                kill(self.all)
                return

    def end(self, iterator: LoaderIterator | None) -> None:
        """Ends all workers: they may finish what they do for some seconds."""
        self.ended.set()
        if not self.at_exit.still_active():  # this process is exiting: no worker is left, and no thread can be started
            return
        timer = threading.Timer(GRACE_SECONDS if not self.stuck else 0, kill, args=(self.all,))
        timer.daemon = True
        timer.start()
        try:
            if iterator is not None:
                iterator._shutdown_workers()
        finally:
            timer.cancel()
            kill(self.all)
            self.at_exit.cancel()


def recording_context(processes: list[BaseProcess]) -> BaseContext:
    """The context of multiprocessing, with its new processes added to a list."""
    context: Any = copy.copy(multiprocessing.get_context())
    create = context.Process

    def create_recorded(*args: Any, **kwargs: Any) -> BaseProcess:
        process = create(*args, **kwargs)
        processes.append(process)
        return process

    context.Process = create_recorded
    return context


def kill(processes: list[BaseProcess]) -> None:
    started = [process for process in processes if process.pid is not None]
    for process in started:
        process.kill()
    for process in started:
        process.join(GRACE_SECONDS)


def unchanged(batch: T) -> T:
    return batch


def prepare_worker(worker: int) -> None:
    """Initializes a worker process, so that the main process handles signals sent to the whole process group.

    SIGINT, SIGHUP and the first SIGTERM are ignored. A second SIGTERM, which the loader sends to a worker that does not
    exit, terminates it as usual.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "win32":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL) and None)
    # a batch that cannot be sent would be dropped, and the main process would wait for it
    queues.Queue._on_queue_feeder_error = staticmethod(end_worker)  # pyright: ignore[reportAttributeAccessIssue]


def end_worker(error: Exception, batch: object) -> None:
    os._exit(1)
