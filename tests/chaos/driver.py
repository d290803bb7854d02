"""``mixer`` with one fault in it: the command as it is, but for what the environment variable CHAOS says.

CHAOS is a JSON object: ``at`` (a place, below), ``nth`` (which call of it, from 1), ``do`` (kill, stop, term, int,
raise, hang, slow, nan, fill, readonly), ``rank`` (of several processes; none: each), ``delay`` (seconds after the
call, by a timer) and ``target`` ("launcher", for term). NOTES is a folder for what the tests want to know. The
processes that the command starts are started by this file too.
"""

import contextlib
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PLACES = {
    "step": "allmlp.training.optimizer_step:Update.__call__",
    "evaluation": "allmlp.evaluation.classification:normalise",
    "compile": "allmlp.training.compilation:warm_up",
    "save": "allmlp.checkpointing.manager:write",
    "copy": "torch.distributed.checkpoint.staging:DefaultStager.stage",
    "write": "allmlp.checkpointing.checkpoint:save_distributed",
    "fsync": "os:fsync",
    "rename": "pathlib:Path.rename",
    "retention": "allmlp.checkpointing.manager:retain",
    "removal": "allmlp.checkpointing.manager:shutil.rmtree",
}


def note(name: str, line: str) -> None:
    with (Path(os.environ["NOTES"]) / name).open("a") as file:
        file.write(line + "\n")


class Fault:
    """Counts the calls of a place, and strikes at one of them."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.told, self.calls = told, 0

    def install(self) -> None:
        if self.told["at"] == "start":
            self.after(self.told["delay"])
            return
        module, _, path = PLACES[self.told["at"]].partition(":")
        *owners, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        original = getattr(owner, name)
        if self.told["at"] == "removal":  # shutil is everybody's: only the saver's own
            module_of: Any = importlib.import_module(module)
            module_of.shutil = SimpleNamespace(rmtree=self.around(original))
        else:
            setattr(owner, name, self.around(original))

    def around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def replaced(*args: Any, **keywords: Any) -> Any:
            self.calls += 1
            if self.calls == self.told["nth"]:
                if self.told.get("delay"):
                    self.after(self.told["delay"])
                else:
                    self.strike()
            result = original(*args, **keywords)
            if self.calls == self.told["nth"] and self.told["do"] == "slow":
                note("slow", "now")
                time.sleep(4)
            return result

        return replaced

    def after(self, seconds: float) -> None:
        threading.Thread(target=lambda: (time.sleep(seconds), self.strike()), daemon=True).start()

    def strike(self) -> None:
        note("struck", str(time.time()))
        do = self.told["do"]
        if do == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif do == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif do in ("term", "int"):
            launcher = self.told.get("target") == "launcher"
            os.kill(os.getppid() if launcher else os.getpid(), signal.SIGTERM if do == "term" else signal.SIGINT)
        elif do == "raise":
            raise ArithmeticError("a fault that nobody expected")
        elif do == "hang":
            time.sleep(3600)
        elif do == "fill":
            with Path(self.told["path"]).open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
        elif do == "readonly":
            where = self.told["path"]
            subprocess.run(["mount", "--bind", where, where], check=True)
            subprocess.run(["mount", "-o", "remount,ro,bind", where], check=True)


def spoil_losses(nth: int) -> None:
    """The loss of one call is no number."""
    losses: Any = importlib.import_module("allmlp.training.losses")
    original, calls = losses.LOSSES["softmax"], [0]

    def spoilt(*args: Any, **keywords: Any) -> Any:
        calls[0] += 1
        return original(*args, **keywords) * (float("nan") if calls[0] == nth else 1.0)

    losses.LOSSES["softmax"] = spoilt


def note_pixels() -> None:
    """SHA-256 of the pixels of each batch that training computes."""
    loop: Any = importlib.import_module("allmlp.training.loop")
    original = loop.normalise

    def noted(images: Any, *rest: Any) -> Any:
        note("pixels", hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest())
        return original(images, *rest)

    loop.normalise = noted


def note_tensors() -> None:
    """SHA-256 of each whole tensor after a checkpoint was loaded."""
    from torch.distributed.tensor import DTensor

    state: Any = importlib.import_module("allmlp.training.state").TrainingState
    original = state.load

    def noted(self: Any, *args: Any) -> Any:
        result = original(self, *args)
        digests = {}
        for name, tensor in sorted(self.tensors().items()):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            digests[name] = hashlib.sha256(whole.contiguous().numpy().tobytes()).hexdigest()
        if os.environ.get("RANK", "0") == "0":
            note("tensors", json.dumps(digests))
        return result

    state.load = noted


def start_ranks_here() -> None:
    launch: Any = importlib.import_module("allmlp.distributed.launcher")

    def popen(command: list[str], **keywords: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen([command[0], __file__, *command[3:]], **keywords)

    launch.subprocess = SimpleNamespace(Popen=popen)


def main() -> int:
    told = json.loads(os.environ.get("CHAOS", "{}"))
    rank = os.environ.get("RANK")
    launches = rank is None and "--processes" in sys.argv
    if told and not launches and told.get("rank") in (None, int(rank or 0)):
        if told["do"] == "nan":
            spoil_losses(told["nth"])
        else:
            Fault(told).install()
    if os.environ.get("NOTE") == "pixels":
        note_pixels()
    if os.environ.get("NOTE") == "tensors" and not launches:
        note_tensors()
    start_ranks_here()
    from allmlp.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
