"""The command in processes forked from one that has imported PyTorch: as from a shell, without its two seconds."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = r"""
import json, multiprocessing, os, signal, sys, time
import allmlp.api.evaluate, allmlp.inference.predict, allmlp.training.run  # and not matplotlib, which asks for HOME
import torch.utils.data, torch._dynamo, torch.utils.tensorboard
from allmlp.cli import main

def become(job):
    os.setsid()
    os.chdir(job["cwd"])
    for name, value in job["env"].items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    for descriptor, target in ((1, job["out"]), (2, job["err"])):
        os.close(descriptor)
        if target == "broken pipe":
            reader, writer = os.pipe()
            os.close(reader)
        elif target is not None:
            writer = os.open(target, os.O_RDWR | os.O_CREAT, 0o666)  # a terminal becomes that of the session
        if target is not None and writer != descriptor:
            os.dup2(writer, descriptor)
            os.close(writer)
    sys.stdout = sys.__stdout__ = None if job["out"] is None else open(1, "w", encoding="utf-8")
    sys.stderr = sys.__stderr__ = None if job["err"] is None else open(2, "w", encoding="utf-8", buffering=1)
    if job["ignore_hang_up"]:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if job["start_method"]:
        multiprocessing.set_start_method(job["start_method"])
    if job["clock_runs_back"]:
        later = time.time()
        time.time = lambda: later - 1000 * time.monotonic()

answers = os.fdopen(os.dup(1), "w", buffering=1)
for line in iter(sys.stdin.readline, ""):
    job = json.loads(line)
    children = []
    for copy in range(job["copies"]):
        child = os.fork()
        if child == 0:
            answers.close()
            become(job)
            sys.exit(main(job["words"]))
        children.append(child)
    print(*children, file=answers)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), file=answers)
"""


TIMEOUT = 90.0  # seconds after which a command that has not ended is killed


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it left."""

    status: int
    out: str
    err: str


class Started:
    """A command that runs, or several of them; they share the files of their output."""

    def __init__(self, server: subprocess.Popen[str], files: dict[str, Path]) -> None:
        assert server.stdout is not None
        self.server, self.files = server, files
        self.pids = [int(pid) for pid in server.stdout.readline().split()]

    def signal(self, number: int) -> None:
        """Sends a signal to the command and to all that it has started, as a terminal does."""
        os.killpg(self.pids[0], number)

    def wait(self) -> list[Ended]:
        assert self.server.stdout is not None
        watchdog = threading.Timer(TIMEOUT, lambda: [os.killpg(pid, signal.SIGKILL) for pid in self.pids])
        watchdog.start()
        statuses = [int(status) for status in self.server.stdout.readline().split()]
        watchdog.cancel()
        texts = {name: path.read_text("utf-8") if path.is_file() else "" for name, path in self.files.items()}
        return [Ended(status, **texts) for status in statuses]


class Server:
    """Runs ``mixer WORDS`` in given surroundings.

    ``out`` and ``err``: "file", a path, "broken pipe", or None: closed. ``env``: None removes a variable.
    """

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process, self.folder = process, folder
        self.count = 0

    def start(
        self,
        words: Sequence[object],
        out: str | None = "file",
        err: str | None = "file",
        env: dict[str, str | None] | None = None,
        copies: int = 1,
        **how: Any,
    ) -> Started:
        self.count += 1
        files = {name: self.folder / f"{name}{self.count}" for name in ("out", "err")}
        targets = {"out": out, "err": err}
        given = {name: str(files[name]) if target == "file" else target for name, target in targets.items()}
        job = {"ignore_hang_up": False, "start_method": None, "clock_runs_back": False, "cwd": str(self.folder)} | how
        job |= given | {"words": list(map(str, words)), "env": env or {}, "copies": copies}
        assert self.process.stdin is not None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return Started(self.process, files)

    def run(self, words: Sequence[object], **how: Any) -> Ended:
        return self.start(words, **how).wait()[0]


@contextmanager
def command_server(folder: Path) -> Iterator[Server]:
    """Within the block, commands can be run with ``folder`` as their working folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield Server(process, folder)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
