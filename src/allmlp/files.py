"""Paths as given, atomic file writes, locks, and JSON without NaN."""

import contextlib
import errno
import json
import math
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from allmlp.errors import UserError, brief

NOT_OFFERED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
"""Errors by which a file system says that it has no locks, or no way to sync: some network drives, FUSE."""


def as_path(name: str, value: object) -> Path:
    """A path given as text or ``os.PathLike``; raises a UserError that names the argument for anything else."""
    if not isinstance(value, str | os.PathLike) or not isinstance(text := os.fspath(value), str) or not text:
        raise UserError(f"{name} = {brief(value)}: give a path")
    return Path(text)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; when the block succeeds, that file is synced and replaces ``path``.

    After any failure (a full disk, an exception, an interrupt) the temporary file is removed and ``path`` is unchanged.

    Raises:
        UserError: ``path`` is a folder.
        OSError: it cannot be written; ``filename`` is the path, not the temporary file.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the name of a file")
    temporary = path
    try:
        temporary = create_beside(path)
        yield temporary
        with temporary.open("rb+") as file:
            sync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        if temporary is not path:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(temporary)):
            error.filename, error.filename2 = str(path), None
        raise


def create_beside(path: Path) -> Path:
    """A new, empty file in the folder of ``path``, with the permissions that any new file of this process gets.

    ``tempfile`` would give it mode 0600, and the umask can be read only by changing it, for all threads at once.
    """
    while True:
        temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}")  # a name has a limit
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            return temporary
        except FileExistsError:
            continue
        except OSError as error:
            error.filename = str(path)
            raise


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync_folder(folder: Path) -> None:
    """Makes files that were created or renamed in a folder survive a power failure.

    Windows has no such call; its file system keeps a journal of names.
    """
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        sync(handle)
    finally:
        os.close(handle)


def sync(descriptor: int) -> None:
    """``os.fsync``, where the file system has it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise


def try_lock(file: IO[str], shared: bool = False) -> bool | None:
    """Locks an open file for this process; False: another process has it, None: its file system has no locks.

    Closing the file, or the end of the process, releases the lock. ``shared``: for a file opened to read.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.lockf(file, kind | fcntl.LOCK_NB)  # unlike flock, not inherited by forked workers
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
        return None
    return True


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON of dicts, lists, strings and numbers; NaN and infinities, which JSON does not have, become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    try:
        return json.dumps(finite(value), indent=indent, allow_nan=False)
    except TypeError as error:
        raise UserError(f"{brief(value)} is not JSON ({error}): give numbers, strings, lists and dicts") from None
