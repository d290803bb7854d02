"""The folder of a run: created, locked, and removed again when a failed run leaves nothing of use in it."""

import contextlib
import itertools
import logging
import os
import shutil
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from allmlp.checkpointing.manager import clean_up, remove
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.errors import RunError, Stopped, UserError, describe_os_error, reason, remedy
from allmlp.files import sync_folder, try_lock

log = logging.getLogger(__name__)

LOCK = ".lock"
LOCKED_HERE: set[Path] = set()  # folders that this process has locked


class RunInUse(UserError):
    """Another process is training the run."""


@contextlib.contextmanager
def claimed_folder(out: Path | None, name: str, context: DistributedContext = SINGLE_PROCESS) -> Iterator[Path]:
    """The folder of a run: as given, or runs/NAME-DATE-TIME, which no other process takes even if it starts now.

    Collective. If nothing has been written to a new folder by the end of the block, it is removed again.
    """
    if out is not None:
        yield out
        return
    folder = context.broadcast_from_rank0(lambda: create_new_folder(f"{name}-{datetime.now():%Y%m%d-%H%M%S}"))
    try:
        yield folder
    finally:
        if context.is_rank0:
            with contextlib.suppress(OSError):  # not empty, or not there any more
                if [path.name for path in folder.iterdir()] == [LOCK]:
                    (folder / LOCK).unlink()
                folder.rmdir()
                folder.parent.rmdir()


def create_new_folder(name: str) -> Path:
    """Creates runs/NAME, or NAME-2 and so on where that exists."""
    for number in itertools.count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            (folder / LOCK).touch()  # tells a folder of a run from an empty class, should the data lie around it
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise disk_error(folder, error) from error
    raise AssertionError


@contextlib.contextmanager
def run_folder(out: Path, owner: bool = True, worth_keeping: str = "checkpoints/*") -> Iterator[None]:
    """Creates the folder; removes it, and the parents created for it, when the block fails with nothing worth keeping.

    A run stopped by a signal is always kept.

    Args:
        out: the folder; it may exist.
        owner: false on all processes but one, which neither create nor remove it.
        worth_keeping: a glob pattern below the folder; by default, any checkpoint.
    """
    if not owner:
        yield
        return
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    was_empty = out.is_dir() and is_empty(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except (Stopped, RunInUse):
        raise
    except BaseException as error:
        if (created or was_empty) and not any(out.glob(worth_keeping)):
            shutil.rmtree(out, ignore_errors=True)
            if was_empty:
                out.mkdir()
            for folder in created[1:]:
                with contextlib.suppress(OSError):  # another run uses it by now
                    folder.rmdir()
        if isinstance(error, OSError):
            raise disk_error(out, error) from error
        raise


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but hidden files, such as the lock."""
    return all(path.name.startswith(".") for path in folder.iterdir())


def disk_error(out: Path, error: OSError) -> RunError:
    """The failure to write a run's folder, or to use what else it needs, in one line with its remedy."""
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else out
    if path != out and out not in path.parents:
        return RunError(describe_os_error(error))
    return RunError(f"{out} cannot be written ({reason(error)}): {remedy(error, 'name another folder with --out')}")


def remove_checkpoints(out: Path, summary: dict[str, Any]) -> None:
    """Removes what a complete run no longer needs: called when all the rest is written, or when it is resumed.

    These are the checkpoints to resume from, and last.safetensors and best.safetensors where they hold the weights of
    model.safetensors. A failure is only logged: the run is complete.
    """
    folder = out / "checkpoints"
    steps = {"last.safetensors": summary["steps"], "best.safetensors": summary["best_step"]}
    try:
        sync_folder(out)  # a power failure must not leave the removal alone
        clean_up(folder)
        for path in (*folder.glob("step-*"), *folder.glob("damaged-step-*")):
            remove(path)
        for name, step in steps.items():
            if step == summary["kept_step"]:
                (folder / name).unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        log.warning("%s, which is no longer needed, cannot be removed (%s)", folder, error.strerror or error)


@contextlib.contextmanager
def locked(out: Path, owner: bool = True) -> Iterator[None]:
    """Keeps other processes from training the same run; the operating system releases the lock with the process.

    Raises:
        RunInUse: another process has the lock.
    """
    if not owner:
        yield
        return
    with (out / LOCK).open("a") as file:
        for delay in (0.1, 0.4, None):  # `mixer status` takes the lock for a moment
            if locked_now := try_lock(file):
                break
            if locked_now is None:
                log.warning("the disk of %s has no file locks: start no other run in this folder meanwhile", out)
                break
            if delay is None:
                raise RunInUse(f"{out} is being trained by another process: wait for it, or end it")
            time.sleep(delay)
        LOCKED_HERE.add(out.resolve())
        try:
            yield
        finally:
            LOCKED_HERE.discard(out.resolve())


def is_locked(out: Path) -> bool:
    """Whether a process is training this run, as far as the file system has locks. Nothing is written."""
    if out.resolve() in LOCKED_HERE:  # opening and closing the file again would release this process's lock
        return True
    with contextlib.suppress(FileNotFoundError), (out / LOCK).open() as file:
        return try_lock(file, shared=True) is False
    return False
