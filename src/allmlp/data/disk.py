"""Files and folders as the operating system has them: read, listed, and found in any form of Unicode."""

import errno
import os
import stat
from pathlib import Path

from allmlp.data.decode import UnreadableImage
from allmlp.data.names import normal_form
from allmlp.errors import printable

MAX_BYTES = 1 << 30  # larger image files are rejected before they are read
READ_ONLY = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # opening a pipe must not block


def read_regular(path: str, limit: int) -> bytes:
    """The bytes of a regular file, up to a limit.

    Uses system calls: Python's file objects cost as much as decoding a small image.
    """
    descriptor = os.open(path, READ_ONLY)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage(printable(f"{path} cannot be read: it is not a regular file; remove it"))
        size = min(status.st_size, limit)
        check_bytes(size, path)
        data = os.read(descriptor, size)
        while len(data) < size and (more := os.read(descriptor, size - len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


def scan(location: str) -> tuple[list[str], dict[str, str], int]:
    """The files of a folder, in order, its folders with their paths, and how many of these are links.

    Names have the normal form, unless another name in the folder has it already.
    """
    files: list[str] = []
    folders: dict[str, str] = {}
    other_forms: list[os.DirEntry[str]] = []
    links = 0

    def add(entry: os.DirEntry[str], name: str) -> None:
        nonlocal links
        if entry.is_dir():
            folders[name] = entry.path
            links += entry.is_symlink()
        else:
            files.append(name)

    with os.scandir(location) as entries:
        for entry in entries:
            if normal_form(entry.name) == entry.name:
                add(entry, entry.name)
            else:
                other_forms.append(entry)
    if other_forms:
        taken = {*files, *folders}
        for entry in other_forms:
            name = normal_form(entry.name)
            add(entry, entry.name if name in taken else name)
            taken.add(name)
    files.sort()
    return files, folders, links


def identity(path: Path) -> tuple[int, int] | None:
    """The device and number of a folder; None: it is not there. An unmounted disk leaves another, empty folder."""
    try:
        status = path.stat()
    except PermissionError:  # a mistake from the start, not a loss
        return 0, 0
    except OSError:
        return None
    return status.st_dev, status.st_ino


def find_in_any_form(root: Path, name: str) -> str:
    """The path of a file whose name, or that of a folder above it, has another form of Unicode on disk.

    Raises:
        FileNotFoundError: there is none.
    """
    path = str(root)
    for piece in name.split("/"):
        exact = os.path.join(path, piece)  # noqa: PTH118
        if os.path.lexists(exact):
            path = exact
            continue
        with os.scandir(path) as entries:
            same = next((entry.path for entry in entries if normal_form(entry.name) == normal_form(piece)), None)
        if same is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), exact)
        path = same
    return path


def check_bytes(size: int, name: str) -> None:
    if size > MAX_BYTES:
        raise UnreadableImage(
            f"{name} cannot be read: it has {size:,} bytes, above the limit of {MAX_BYTES:,}; make it smaller"
        )
