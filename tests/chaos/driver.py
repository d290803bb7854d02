"""``mixer`` with one fault: the unchanged command, except for what the environment variable CHAOS describes.

CHAOS is a JSON object:

- ``place``: where the fault happens, one of PLACES; or "start": some time after the process has started.
- ``call``: at which call of that function, from 1.
- ``action``: kill, stop, term, int, raise, hang, slow, nan, fill or readonly.
- ``rank``: the rank it happens on; absent: on every rank.
- ``delay``: seconds between the call and the action, which a thread then performs.
- ``target``: "launcher" sends the signal of term or int to the launcher instead of this process.
- ``path``: what to fill or to make read-only.

NOTES is a folder for what the tests need to know, and NOTE says what: the digests of "pixels" or "tensors". The
checkpoints of a complete run are kept, to be compared, unless NOTE is "removal". The ranks that the command starts run
this file too.
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
    "step": "allmlp.training.optimizer_step:OptimizerStep.__call__",
    "evaluation": "allmlp.evaluation.forward:normalize",
    "compile": "allmlp.training.compilation:warm_up",
    "save": "allmlp.checkpointing.manager:write_checkpoint",
    "copy": "allmlp.checkpointing.manager:CheckpointManager.copy_to_cpu",
    "write": "allmlp.checkpointing.tensors:save_distributed",
    "fsync": "os:fsync",
    "rename": "pathlib:Path.rename",
    "remove old": "allmlp.checkpointing.manager:remove_old",
    "remove all": "allmlp.runs.folder:remove",
    "rmtree": "allmlp.checkpointing.manager:shutil.rmtree",
}


def note(name: str, line: str) -> None:
    with (Path(os.environ["NOTES"]) / name).open("a") as file:
        file.write(line + "\n")


class Fault:
    """Counts the calls of a function, and acts at one of them."""

    def __init__(self, fault: dict[str, Any]) -> None:
        self.fault, self.calls = fault, 0

    def install(self) -> None:
        if self.fault["place"] == "start":
            self.act_after(self.fault["delay"])
            return
        module, _, path = PLACES[self.fault["place"]].partition(":")
        *owners, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for attribute in owners:
            owner = getattr(owner, attribute)
        original = getattr(owner, name)
        if self.fault["place"] == "rmtree":  # not for all users of shutil, only for this module
            manager: Any = importlib.import_module(module)
            manager.shutil = SimpleNamespace(rmtree=self.wrap(original))
        else:
            setattr(owner, name, self.wrap(original))

    def wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **keywords: Any) -> Any:
            self.calls += 1
            if self.calls == self.fault["call"]:
                if self.fault.get("delay"):
                    self.act_after(self.fault["delay"])
                else:
                    self.act()
            result = original(*args, **keywords)
            if self.calls == self.fault["call"] and self.fault["action"] == "slow":
                note("slow", "now")
                time.sleep(4)
            return result

        return wrapped

    def act_after(self, seconds: float) -> None:
        threading.Thread(target=lambda: (time.sleep(seconds), self.act()), daemon=True).start()

    def act(self) -> None:
        note("fault", str(time.time()))
        action = self.fault["action"]
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif action in ("term", "int"):
            to_launcher = self.fault.get("target") == "launcher"
            number = signal.SIGTERM if action == "term" else signal.SIGINT
            os.kill(os.getppid() if to_launcher else os.getpid(), number)
        elif action == "raise":
            raise ArithmeticError("an unexpected error")
        elif action == "hang":
            time.sleep(3600)
        elif action == "fill":
            with Path(self.fault["path"]).open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
        elif action == "readonly":
            path = self.fault["path"]
            subprocess.run(["mount", "--bind", path, path], check=True)
            subprocess.run(["mount", "-o", "remount,ro,bind", path], check=True)


def make_loss_nan(call: int) -> None:
    """Makes one call of the loss function return NaN."""
    losses: Any = importlib.import_module("allmlp.training.losses")
    original, calls = losses.LOSSES["softmax"], [0]

    def loss(*args: Any, **keywords: Any) -> Any:
        calls[0] += 1
        return original(*args, **keywords) * (float("nan") if calls[0] == call else 1.0)

    losses.LOSSES["softmax"] = loss


def note_pixels() -> None:
    """Notes the SHA-256 of the pixels of each training batch."""
    step: Any = importlib.import_module("allmlp.training.step")
    original = step.normalize

    def normalize(images: Any, *rest: Any) -> Any:
        note("pixels", hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest())
        return original(images, *rest)

    step.normalize = normalize


def note_tensors() -> None:
    """Notes the SHA-256 of each full tensor after a checkpoint was loaded."""
    from torch.distributed.tensor import DTensor

    state: Any = importlib.import_module("allmlp.training.state").TrainingState
    original = state.load

    def load(self: Any, *args: Any) -> Any:
        result = original(self, *args)
        digests = {}
        for name, tensor in sorted(self.tensors().items()):
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            digests[name] = hashlib.sha256(full.contiguous().numpy().tobytes()).hexdigest()
        if os.environ.get("RANK", "0") == "0":
            note("tensors", json.dumps(digests))
        return result

    state.load = load


def start_ranks_with_this_file() -> None:
    launcher: Any = importlib.import_module("allmlp.distributed.launcher")

    def popen(command: list[str], **keywords: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen([command[0], __file__, *command[3:]], **keywords)

    launcher.subprocess = SimpleNamespace(Popen=popen)


def main() -> int:
    fault = json.loads(os.environ.get("CHAOS", "{}"))
    rank = os.environ.get("RANK")
    is_launcher = rank is None and "--processes" in sys.argv
    if fault and not is_launcher and fault.get("rank") in (None, int(rank or 0)):
        if fault["action"] == "nan":
            make_loss_nan(fault["call"])
        else:
            Fault(fault).install()
    if os.environ.get("NOTE") == "pixels":
        note_pixels()
    if os.environ.get("NOTE") == "tensors" and not is_launcher:
        note_tensors()
    if os.environ.get("NOTE") != "removal":
        folder: Any = importlib.import_module("allmlp.runs.folder")
        folder.remove_checkpoints = lambda *words: None
    start_ranks_with_this_file()
    from allmlp.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
