"""The folder of a run: made, filled, and taken away again where nothing in it is of use."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from allmlp.errors import RunError, Stopped, UserError

LOCK = ".lock"
HELD: set[Path] = set()  # folders that this process has locked


class InUse(UserError):
    """Another process is training the run."""


@contextlib.contextmanager
def run_folder(out: Path, owner: bool = True, worth_keeping: str = "checkpoints/*") -> Iterator[None]:
    """Makes the folder, if it is not there; removes it, and those made on the way to it, where the run ends on an error
    before there is any file worth keeping (a pattern below the folder: its first checkpoint).

    A run that a signal stopped is kept in any case. Of several processes, one is the folder's owner.
    """
    if not owner:
        yield
        return
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    was_empty = out.is_dir() and not any(out.iterdir())
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except (Stopped, InUse):
        raise
    except BaseException as error:
        if (made or was_empty) and not any(out.glob(worth_keeping)):
            shutil.rmtree(out, ignore_errors=True)
            if was_empty:
                out.mkdir()
            for folder in made[1:]:
                with contextlib.suppress(OSError):  # another run has come to live there
                    folder.rmdir()
        if isinstance(error, OSError):
            raise disk_error(out, error) from error
        raise


def disk_error(out: Path, error: OSError) -> RunError:
    return RunError(f"{out} cannot be written ({error.strerror or error}): free some space, or name another --out")


@contextlib.contextmanager
def locked(out: Path, owner: bool = True) -> Iterator[None]:
    """Within the block nobody else can go on with the run; the lock goes with the process that holds it.

    Raises:
        UserError: another process has it.
    """
    if not owner or os.name != "posix":
        yield
        return
    import fcntl

    with (out / LOCK).open("a") as file:
        for patience in (0.1, 0.4, None):  # somebody may just have asked for the run's status
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which, unlike flock, forked workers do not inherit
                break
            except (BlockingIOError, PermissionError):
                if patience is None:
                    raise InUse(f"{out} is being trained by another process: wait for it, or end it") from None
                time.sleep(patience)
        HELD.add(out.resolve())
        try:
            yield
        finally:
            HELD.discard(out.resolve())


def is_locked(out: Path) -> bool:
    """Whether a process is training this run. Nothing is written."""
    if out.resolve() in HELD:  # by this process, which would lose it by opening the file again
        return True
    if os.name != "posix":
        return False
    import fcntl

    with contextlib.suppress(FileNotFoundError), (out / LOCK).open() as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
    return False
