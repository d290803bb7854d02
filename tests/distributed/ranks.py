"""Runs functions of a test on several ranks, cheaply: a helper process imports everything once and forks the ranks.

``run_ranks(function, world_size, *arguments)`` calls ``function(*arguments)`` in as many processes, which have
torchrun's environment variables and a store to connect to, and returns each rank's outcome. Function and arguments are
pickled, so the function must be one of a test module's top level. ``rank_values`` calls a function with the
DistributedContext of its rank as the first argument.
"""

import atexit
import contextlib
import functools
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

TIMEOUT = 60.0  # seconds for one call
PRELOADED = (
    "torch", "torch._decomp.decompositions_for_rng", "torch._dynamo", "torch.distributed.fsdp",
    "torch.distributed.tensor", "torch.utils.tensorboard", "allmlp.cli.commands.train", "allmlp.cli.display",
    "allmlp.evaluation.pages.run_report", "allmlp.training.run",
)  # fmt: skip


class Outcome(NamedTuple):
    """How the process of one rank ended."""

    status: int  # exit status; negative: the signal that ended it
    value: Any  # returned by the function
    error: str | None  # the traceback, if the function raised an error
    out: str
    err: str


@functools.cache
def helper() -> "subprocess.Popen[bytes]":
    """Started at the first call; ends with this process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    here = Path(__file__).resolve().parent
    start = f"import sys; sys.path[:0] = {[str(here), str(here.parent)]}; import ranks; ranks.main()"
    command = [sys.executable, "-c", start]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    atexit.register(stop, process)
    return process


def stop(process: "subprocess.Popen[bytes]") -> None:
    if process.stdin is not None:
        process.stdin.close()
    process.wait(10)


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = TIMEOUT
) -> list[Outcome]:
    """The outcome of each rank, in the order of the ranks; those that have not ended after ``timeout`` are killed."""
    process = helper()
    assert process.stdin is not None
    assert process.stdout is not None
    of_the_test = arguments[0] if function is call_with_context else function
    module = sys.modules[of_the_test.__module__]
    location = str(Path(module.__file__ or "").parent), module.__name__
    pickle.dump((location, pickle.dumps((function, arguments)), world_size, timeout), process.stdin)
    process.stdin.flush()
    return pickle.load(process.stdout)


def rank_values(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
    """What ``function(context, *arguments)`` returns on each rank; fails with the first traceback if it raises."""
    outcomes = run_ranks(call_with_context, world_size, function, *arguments, timeout=timeout)
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None, f"rank {rank} of {world_size}: {outcome.error}"
    for rank, outcome in enumerate(outcomes):
        assert outcome.status == 0, f"rank {rank} of {world_size} ended with {outcome.status}: {outcome.err[-2000:]}"
    return [outcome.value for outcome in outcomes]


def call_with_context(function: Callable[..., Any], *arguments: Any) -> Any:
    from allmlp.distributed.context import init_distributed

    with init_distributed(30) as context:
        return function(context, *arguments)


# In the helper process


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that nothing else is printed among the answers
    serve(sys.stdin.buffer, answers)


def serve(calls: BinaryIO, answers: BinaryIO) -> None:
    for module in PRELOADED:
        importlib.import_module(module)
    while True:
        try:
            (folder, module), call, world_size, timeout = pickle.load(calls)
        except EOFError:
            return
        if folder not in sys.path:
            sys.path.insert(0, folder)
        importlib.import_module(module)  # once, before the ranks are forked
        pickle.dump(fork_ranks(call, world_size, timeout), answers)
        answers.flush()


def fork_ranks(call: bytes, world_size: int, timeout: float) -> list[Outcome]:
    """The ranks are forked before the store starts: its thread could hold a lock then, for which they would wait."""
    from torch.distributed import TCPStore

    variables = {
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.flush()
        children, (reader, writer) = [], os.pipe()
        for rank in range(world_size):
            of_rank = {name: str(value) for name, value in (variables | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            children.append(os.fork() or run_rank(call, of_rank, reader, Path(folder) / str(rank)))
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writer, f"{store.port:05}".encode() * world_size)
        statuses = wait_for(children, time.monotonic() + timeout)
        os.close(reader)
        os.close(writer)
        del store
        return [read_outcome(status, Path(folder) / str(rank)) for rank, status in enumerate(statuses)]


def wait_for(children: list[int], deadline: float) -> list[int]:
    """The exit statuses of the processes; those that still run at the deadline are killed."""
    statuses: dict[int, int] = {}
    while len(statuses) < len(children):
        for child in children:
            if child in statuses:
                continue
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [statuses[child] for child in children]


def run_rank(call: bytes, variables: dict[str, str], port: int, path: Path) -> int:
    """All that a forked process does; it does not return. ``port``: a pipe from which to read the store's port."""
    status = 70
    with contextlib.suppress(BaseException):
        os.environ.update(variables, MASTER_PORT=str(int(os.read(port, 5))))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(path.with_suffix(f".{name}"), os.O_CREAT | os.O_WRONLY), number)
        outcome: tuple[Any, str | None] = None, None
        try:
            function, arguments = pickle.loads(call)
            outcome = function(*arguments), None
        except BaseException:
            outcome = None, traceback.format_exc()
        path.with_suffix(".outcome").write_bytes(pickle.dumps(outcome))
        sys.stdout.flush()
        sys.stderr.flush()
        status = 0
    os._exit(status)


def read_outcome(status: int, path: Path) -> Outcome:
    texts = [path.with_suffix(f".{name}") for name in ("out", "err")]
    out, err = (text.read_text(errors="replace") if text.exists() else "" for text in texts)
    pickled = path.with_suffix(".outcome")
    value, error = pickle.loads(pickled.read_bytes()) if pickled.exists() else (None, None)
    return Outcome(status, value, error, out, err)
