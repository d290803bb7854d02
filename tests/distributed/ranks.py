"""Ranks for a test at the price of a fork: one helper process imports all there is, and is forked for each question.

``run(function, ranks, *words)`` calls ``function(*words)`` in so many processes that have torchrun's environment
variables and a store to meet at, and returns what each has left. Function and words are sent by pickling, so the
function is one of a test module's own. ``together`` gives a function the world of its ranks.
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

LIMIT = 60.0  # seconds for one question
PRELOADED = (
    *("torch", "torch.distributed.tensor", "torch.utils.tensorboard", "allmlp.cli.train", "allmlp.cli.display"),
    *("allmlp.training.run", "allmlp.evaluation.run_report", "torch.distributed.fsdp", "torch._dynamo"),
    "torch._decomp.decompositions_for_rng",
)


class Left(NamedTuple):
    """What one rank leaves."""

    status: int  # of its process; negative: the signal that ended it
    value: Any  # what the function returned
    error: str | None  # the traceback, where it raised
    out: str
    err: str


@functools.cache
def helper() -> "subprocess.Popen[bytes]":
    """Started once, when it is first needed; it ends with this process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    start = f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parent)!r}); import ranks; ranks.main()"
    command = [sys.executable, "-c", start]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    atexit.register(end, process)
    return process


def end(process: "subprocess.Popen[bytes]") -> None:
    if process.stdin is not None:
        process.stdin.close()
    process.wait(10)


def run(function: Callable[..., Any], world_size: int, *words: Any, limit: float = LIMIT) -> list[Left]:
    """What each rank leaves, in the order of the ranks; one that has not ended in time is killed."""
    process = helper()
    assert process.stdin is not None
    assert process.stdout is not None
    named = words[0] if function is in_world else function
    module = sys.modules[named.__module__]
    where = str(Path(module.__file__ or "").parent), module.__name__
    asked = (where, pickle.dumps((function, words)), world_size, limit)
    pickle.dump(asked, process.stdin)
    process.stdin.flush()
    return pickle.load(process.stdout)


def values(function: Callable[..., Any], world_size: int, *words: Any, limit: float = LIMIT) -> list[Any]:
    """What the function returns on each rank; the first traceback, where it raises."""
    left = run(in_world, world_size, function, *words, limit=limit)
    for rank, one in enumerate(left):
        assert one.error is None, f"rank {rank} of {world_size}: {one.error}"
    for rank, one in enumerate(left):
        assert one.status == 0, f"rank {rank} of {world_size} ended with {one.status}: {one.err[-2000:]}"
    return [one.value for one in left]


def in_world(function: Callable[..., Any], *words: Any) -> Any:
    from allmlp.distributed.context import init_distributed

    with init_distributed(30) as context:
        return function(context, *words)


def serve(questions: BinaryIO, answers: BinaryIO) -> None:
    for module in PRELOADED:
        importlib.import_module(module)
    while True:
        try:
            (folder, module), question, world_size, limit = pickle.load(questions)
        except EOFError:
            return
        if folder not in sys.path:
            sys.path.insert(0, folder)
        importlib.import_module(module)  # once, for all that are forked
        pickle.dump(answer(question, world_size, limit), answers)
        answers.flush()


def answer(question: bytes, world_size: int, limit: float) -> list[Left]:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
    }
    place["TORCHELASTIC_USE_AGENT_STORE"] = True
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.flush()
        children = []
        for rank in range(world_size):
            here = {name: str(value) for name, value in (place | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            children.append(os.fork() or work(question, here, Path(folder) / str(rank)))
        statuses = wait_for(children, time.monotonic() + limit)
        del store
        return [read(status, Path(folder) / str(rank)) for rank, status in enumerate(statuses)]


def wait_for(children: list[int], deadline: float) -> list[int]:
    """The exit statuses of processes, of which those that are there too long are killed."""
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


def work(question: bytes, place: dict[str, str], path: Path) -> int:
    """All that a forked process does; it does not return."""
    status = 70
    with contextlib.suppress(BaseException):
        os.environ.update(place)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(path.with_suffix(f".{name}"), os.O_CREAT | os.O_WRONLY), number)
        left: tuple[Any, str | None] = None, None
        try:
            function, words = pickle.loads(question)
            left = function(*words), None
        except BaseException:
            left = None, traceback.format_exc()
        path.with_suffix(".left").write_bytes(pickle.dumps(left))
        sys.stdout.flush()
        sys.stderr.flush()
        status = 0
    os._exit(status)


def read(status: int, path: Path) -> Left:
    texts = [path.with_suffix(f".{name}") for name in ("out", "err")]
    out, err = (text.read_text(errors="replace") if text.exists() else "" for text in texts)
    kept = path.with_suffix(".left")
    value, error = pickle.loads(kept.read_bytes()) if kept.exists() else (None, None)
    return Left(status, value, error, out, err)


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else is to be printed among them
    serve(sys.stdin.buffer, answers)
