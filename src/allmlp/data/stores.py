"""Where image data is stored: a folder, a zip, or an array in memory. A store opens one image by its name.

A store can be pickled and sent to a worker process, which opens a zip again.
"""

import logging
import lzma
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from allmlp.data.decode import UnreadableImage, decode
from allmlp.errors import UserError, printable

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 30  # larger image files are rejected before they are read
MANY_ENTRIES, BYTES_PER_ENTRY = 1_000_000, 700  # of a zip; ``zipfile`` keeps all of them, as objects


class Store(Protocol):
    @property
    def in_memory(self) -> bool:
        """Whether opening an image needs neither a file nor a decoder."""
        ...

    def open(self, name: str, max_pixels: int, min_side: int | None = None) -> Image.Image:
        """The upright RGB image of that name (see ``decode``).

        Raises:
            UnreadableImage: the image is missing or cannot be decoded.
        """
        ...


class FolderStore:
    in_memory = False

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self, name: str, max_pixels: int, min_side: int | None = None) -> Image.Image:
        path = os.path.join(self.root, name)  # noqa: PTH118 (pathlib is slower than reading a small file)
        try:
            data = read_regular(path)
        except OSError as error:
            message = f"{path} cannot be read: {error.strerror}; check the file and its permissions"
            raise UnreadableImage(printable(message)) from None
        return decode(data, path, max_pixels, min_side)

    def names(self) -> Iterator[str]:
        """Every file below the root, as a relative path with forward slashes, in the same order on every machine."""
        for folder, files in self.walk():
            for file in files:
                yield folder + file

    def walk(self) -> Iterator[tuple[str, list[str]]]:
        """Every folder, parents first and empty ones included, with its files in order.

        A folder is "" (the root) or "some/folder/". Links to folders are followed, but no folder is visited twice.
        """
        visited = {self.root.resolve()}
        for folder, folders, files in os.walk(self.root, followlinks=True):
            new = {name: (Path(folder) / name).resolve() for name in sorted(folders)}
            folders[:] = [name for name, target in new.items() if target not in visited]
            visited |= set(new.values())
            relative = Path(folder).relative_to(self.root).as_posix()
            yield "" if relative == "." else f"{relative}/", sorted(files)

    def subfolder(self, folder: str) -> "FolderStore":
        """The store of a folder below the root, with names relative to that folder."""
        return FolderStore(self.root / folder)


class ZipStore:
    in_memory = False

    def __init__(self, path: Path, prefix: str = "") -> None:
        self.path, self.prefix = path, prefix  # "" or "folder/": only entries with this prefix belong to the store
        self.opened: tuple[int, zipfile.ZipFile] | None = None  # with its process: a file position cannot be shared

    def archive(self) -> zipfile.ZipFile:
        """The zip, opened by this process."""
        if self.opened is None or self.opened[0] != os.getpid():
            try:
                self.opened = (os.getpid(), zipfile.ZipFile(self.path))
            except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
                raise UserError(f"{self.path} is not a valid zip file ({error}): pack or copy it again") from None
        return self.opened[1]

    def open(self, name: str, max_pixels: int, min_side: int | None = None) -> Image.Image:
        label = f"{self.path}/{self.prefix}{name}"
        check_bytes(self.archive().getinfo(self.prefix + name).file_size, label)
        try:
            data = self.archive().read(self.prefix + name)
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, RuntimeError, EOFError) as error:
            raise UnreadableImage(printable(f"{label} cannot be unpacked: {error}; create the zip again")) from None
        return decode(data, label, max_pixels, min_side)

    def names(self) -> Iterator[str]:
        yield from (name for name in self.entries() if not name.endswith("/"))

    def walk(self) -> Iterator[tuple[str, list[str]]]:
        """As the walk of a ``FolderStore``."""
        files: dict[str, list[str]] = {"": []}
        for name in self.entries():
            pieces = name.split("/")
            for depth in range(1, len(pieces)):
                files.setdefault("/".join(pieces[:depth]) + "/", [])
            if pieces[-1]:
                files[name[: len(name) - len(pieces[-1])]].append(pieces[-1])
        for folder in sorted(files, key=lambda folder: folder.split("/")):
            yield folder, files[folder]

    def entries(self) -> list[str]:
        found = self.archive().namelist()
        if len(found) > MANY_ENTRIES:
            log.warning(
                "%s has %s entries: each process that reads it keeps about %.1f GB of them in memory; unpack it to "
                "a folder to save that",
                self.path,
                f"{len(found):,}",
                len(found) * BYTES_PER_ENTRY / 1e9,
            )
        entries = (name.removeprefix(self.prefix) for name in found if name.startswith(self.prefix))
        return sorted({name for name in entries if name})  # a zip may hold a name twice: the last entry is read

    def subfolder(self, folder: str) -> "ZipStore":
        """The store of a folder in the zip, with names relative to that folder."""
        return ZipStore(self.path, f"{self.prefix}{folder}/")

    def __getstate__(self) -> dict:
        return {"path": self.path, "prefix": self.prefix, "opened": None}


class ArrayStore:
    """Images in memory: (N, H, W, 3) uint8, and N names in the same order."""

    in_memory = True

    def __init__(self, pixels: np.ndarray, names: Sequence[str]) -> None:
        self.pixels = pixels
        self.index = {name: i for i, name in enumerate(names)}

    def open(self, name: str, max_pixels: int, min_side: int | None = None) -> Image.Image:
        return Image.fromarray(self.pixels[self.index[name]])


READ_ONLY = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # opening a pipe must not block


def read_regular(path: str) -> bytes:
    """The bytes of a regular file. Uses system calls: Python's file objects cost as much as decoding a small image."""
    descriptor = os.open(path, READ_ONLY)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage(printable(f"{path} cannot be read: it is not a regular file; remove it"))
        check_bytes(status.st_size, path)
        data = os.read(descriptor, status.st_size)
        while len(data) < status.st_size and (more := os.read(descriptor, status.st_size - len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


def check_bytes(size: int, name: str) -> None:
    if size > MAX_BYTES:
        raise UnreadableImage(
            f"{name} cannot be read: it has {size:,} bytes, above the limit of {MAX_BYTES:,}; make it smaller"
        )
