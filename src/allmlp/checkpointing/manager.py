"""The checkpoints of a run: writes them while training continues, finds the newest intact one, removes old ones."""

import logging
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from allmlp.checkpointing.checkpoint import DamagedCheckpoint, verify_checkpoint, write_checkpoint
from allmlp.distributed.context import DistributedContext
from allmlp.distributed.parallelize import local_shard
from allmlp.errors import RunError, reason, remedy

log = logging.getLogger(__name__)

MAX_WAIT_AFTER_ERROR = 60.0  # seconds


class CheckpointManager:
    """Writes the checkpoints of one run, one at a time. All ranks save together.

    Args:
        folder: holds the checkpoints.
        context: the ranks.
        keep: number of newest checkpoints to keep, in addition to the best one.
        background: copy the state and let a thread write it; otherwise ``save`` returns when it is written.
    """

    def __init__(self, folder: Path, context: DistributedContext, keep: int, background: bool = True) -> None:
        self.folder, self.context, self.keep, self.background = folder, context, keep, background
        self.thread: threading.Thread | None = None
        self.failure: BaseException | None = None
        self.last_step = 0  # of the newest checkpoint, which may still be being written

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Waits for the checkpoint being written; after an error for a limited time and without raising another."""
        if kind is None:
            self.wait()
        elif self.thread is not None:
            self.thread.join(MAX_WAIT_AFTER_ERROR)

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], best: int | None = None) -> None:
        """Copies the tensors and starts writing the checkpoint of a step. Collective.

        Args:
            step: number of the step; an existing checkpoint of it is replaced.
            tensors: copied before this returns.
            state: JSON values.
            best: a step whose checkpoint is kept even if it is old.

        Raises:
            RunError: the previous checkpoint could not be written; or this one, when not in the background.
        """
        self.wait()
        copies = self.copy_to_cpu(tensors) if self.background else tensors
        self.last_step = step
        self.thread = threading.Thread(target=self.write, args=(step, copies, state, best), name="checkpoint")
        self.thread.daemon = True
        self.thread.start()
        if not self.background:
            self.wait()

    def copy_to_cpu(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the tensors. Waits for the tensors' own device."""
        devices = {local_shard(tensor).device for tensor in tensors.values()}
        gpu = next((device for device in devices if device.type == "cuda"), None)
        options = StagingOptions(
            use_pinned_memory=gpu is not None,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=gpu is not None,
        )
        # A new stager each time: PyTorch 2.11's cannot be used twice. It pins memory for the current device and waits
        # for that one, whichever the tensors are on
        with torch.accelerator.device_index(None if gpu is None else gpu.index):
            copies: Any = DefaultStager(options).stage(tensors)
        return copies

    def write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], best: int | None) -> None:
        try:
            write_checkpoint(self.folder / checkpoint_name(step), tensors, state, self.context)
            if self.context.is_rank0:
                remove_old(self.folder, self.keep, {step, best})
        except BaseException as error:
            self.failure = error

    @property
    def failed(self) -> bool:
        return self.failure is not None

    def wait(self) -> None:
        """Waits until the checkpoint is written; a failure on any rank is raised once, on all. Collective."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        failure, self.failure = self.failure, None
        if isinstance(failure, OSError):
            what = f"old checkpoints in {self.folder} cannot be removed"
            failure = RunError(f"{what} ({reason(failure)}): {remedy(failure, 'remove them')}")
        failures = [text for text in self.context.all_gather(None if failure is None else str(failure)) if text]
        if failures:
            raise RunError(failures[0]) from failure


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints_by_step(folder: Path) -> dict[int, Path]:
    """Step → checkpoint, newest first."""
    found = {int(m[1]): p for p in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name)) and p.is_dir()}
    return dict(sorted(found.items(), reverse=True))


def remove_old(folder: Path, keep: int, others: set[int | None]) -> None:
    """Removes all but the newest checkpoints and the given other steps.

    Each is renamed before it is deleted, so that a checkpoint's name never refers to an incomplete one.
    """
    for step, path in list(checkpoints_by_step(folder).items())[keep:]:
        if step not in others:
            removed = path.with_name(f".{path.name}.removed")
            shutil.rmtree(removed, ignore_errors=True)
            path.rename(removed)
            remove(removed)


def remove(path: Path) -> None:
    """Removes a checkpoint, or a link to one that is stored elsewhere."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)


def clean_up(folder: Path) -> None:
    """Removes what a killed run left half-written or half-removed, and finishes an interrupted replacement."""
    for pattern in (".step-*.partial", ".step-*.removed", ".best.safetensors.*", ".last.safetensors.*"):
        for leftover in folder.glob(pattern):
            remove(leftover)
    for replaced in folder.glob(".step-*.replaced"):  # killed between the two renames of a replacement
        path = folder / replaced.name[1:].removesuffix(".replaced")
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(path)


def newest_intact(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest intact checkpoint and its state; None without checkpoints. Damaged ones are logged.

    Raises:
        RunError: there are checkpoints, but all are damaged.
        UserError: the newest intact one was written by another version, in a format that is not read.
    """
    damaged = []
    for step, path in checkpoints_by_step(folder).items():
        try:
            state = verify_checkpoint(path)
            if state["step"] != step:
                raise DamagedCheckpoint(f"{path} is a copy of step {state['step']}")
            return path, state
        except DamagedCheckpoint as error:
            damaged.append(str(error))
            log.warning("%s: falling back to an older checkpoint", error)
    if damaged:
        raise RunError(f"no checkpoint in {folder} is intact ({len(damaged)} damaged: {damaged[0]}): train again")
    return None


def set_aside_damaged(folder: Path, step: int) -> None:
    """Renames the (damaged) checkpoints after a step, so that they are neither counted nor read again."""
    for later, path in checkpoints_by_step(folder).items():
        if later > step:
            shutil.rmtree(aside := path.with_name(f"damaged-{path.name}"), ignore_errors=True)
            path.rename(aside)
