"""The checkpoints of a run: written while the training goes on, the newest sound one found again, old ones removed."""

import logging
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from allmlp.checkpointing.checkpoint import Damaged, verify, write
from allmlp.distributed.context import DistributedContext
from allmlp.errors import RunError

log = logging.getLogger(__name__)

LAST_WAIT = 60.0  # seconds


class CheckpointManager:
    """Writes checkpoints of one run, one at a time.

    Args:
        folder: of the checkpoints.
        world: all ranks save together.
        keep: how many of the newest are kept, beside the best.
        background: the state is copied, and written by a thread; else the caller waits.
    """

    def __init__(self, folder: Path, context: DistributedContext, keep: int, background: bool = True) -> None:
        self.folder, self.context, self.keep, self.background = folder, context, keep, background
        cuda = torch.cuda.is_available()
        options = StagingOptions(
            use_pinned_memory=cuda,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=cuda,
        )
        self.stager = DefaultStager(options)
        self.thread: threading.Thread | None = None
        self.failure: BaseException | None = None
        self.last = 0  # step of the newest checkpoint, perhaps not yet written to its end

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Waits for what is being written; after an error not for ever, and without another."""
        if kind is None:
            self.wait()
        elif self.thread is not None:
            self.thread.join(LAST_WAIT)

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], best: int | None = None) -> None:
        """Copies the tensors, and starts to write them and the state as the checkpoint of a step.

        Args:
            step: of the run; its checkpoint is replaced if there is one.
            tensors: of which a copy is taken before this returns.
            state: JSON values.
            best: a step whose checkpoint is kept, however old.

        Raises:
            RunError: the checkpoint before this one could not be written; or this one, when not in the background.
        """
        self.wait()
        copies: Any = self.stager.stage(tensors) if self.background else tensors
        self.last = step
        self.thread = threading.Thread(target=self.work, args=(step, copies, state, best), name="saver", daemon=True)
        self.thread.start()
        if not self.background:
            self.wait()

    def work(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], best: int | None) -> None:
        try:
            write(self.folder / name(step), tensors, state, self.context)
            if self.context.is_rank0:
                retain(self.folder, self.keep, {step, best})
        except BaseException as error:
            self.failure = error

    @property
    def failed(self) -> bool:
        return self.failure is not None

    def wait(self) -> None:
        """Until the checkpoint that is being written is there; a failure of any rank is raised on all, once."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        failure, self.failure = self.failure, None
        if isinstance(failure, OSError):
            failure = RunError(f"old checkpoints in {self.folder} cannot be removed ({failure.strerror or failure})")
        told = [other for other in self.context.all_gather(None if failure is None else str(failure)) if other]
        if told:
            raise RunError(told[0]) from failure


def name(step: int) -> str:
    return f"step-{step:08d}"


def steps_in(folder: Path) -> dict[int, Path]:
    """Step → checkpoint, the newest first."""
    found = {int(m[1]): p for p in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name)) and p.is_dir()}
    return dict(sorted(found.items(), reverse=True))


def retain(folder: Path, keep: int, others: set[int | None]) -> None:
    """Removes all but the newest checkpoints and the other steps named; each is renamed first, so that none is ever
    there in part."""
    for step, path in list(steps_in(folder).items())[keep:]:
        if step not in others:
            going = path.with_name(f".{path.name}.removed")
            shutil.rmtree(going, ignore_errors=True)
            path.rename(going)
            remove(going)


def remove(path: Path) -> None:
    """A checkpoint, or a link to one that lies elsewhere."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)


def tidy(folder: Path) -> None:
    """Removes what a killed run left half-written or half-removed, and finishes what it had almost done."""
    for pattern in (".step-*.partial", ".step-*.removed", ".best.safetensors.*", ".last.safetensors.*"):
        for rest in folder.glob(pattern):
            remove(rest)
    for replaced in folder.glob(".step-*.replaced"):  # killed between two renames
        place = folder / replaced.name[1:].removesuffix(".replaced")
        if place.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(place)


def newest(folder: Path, trusted: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """The newest sound checkpoint and its state; None where there is no checkpoint. Damaged ones are named in the log.

    Raises:
        RunError: there are checkpoints, and none is sound.
        UserError: the newest sound one is not of this user's own.
    """
    damaged = []
    for step, path in steps_in(folder).items():
        try:
            state = verify(path, trusted)
            if state["step"] != step:
                raise Damaged(f"{path} is a copy of step {state['step']}")
            return path, state
        except Damaged as error:
            damaged.append(str(error))
            log.warning("%s: an older checkpoint is used", error)
    if damaged:
        raise RunError(f"none of the {len(damaged)} checkpoints in {folder} is sound ({damaged[0]}): train again")
    return None


def set_aside(folder: Path, step: int) -> None:
    """Renames the (damaged) checkpoints after a step, so that they are neither counted nor taken again."""
    for later, path in steps_in(folder).items():
        if later > step:
            shutil.rmtree(aside := path.with_name(f"damaged-{path.name}"), ignore_errors=True)
            path.rename(aside)
