"""Where image data is stored: a folder, a zip, or an array in memory. A store opens one image by its name.

A store can be pickled and sent to a worker process, which opens a zip again.
"""

import contextlib
import hashlib
import logging
import lzma
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from allmlp.data.decode import UnreadableImage, decode
from allmlp.data.disk import MAX_BYTES, check_bytes, find_in_any_form, identity, read_regular, scan
from allmlp.data.zip_names import renamed_entries
from allmlp.errors import ELSEWHERE, RunError, UserError, describe_os_error, printable, remedy

log = logging.getLogger(__name__)

MANY_ENTRIES, BYTES_PER_ENTRY = 1_000_000, 700  # of a zip; ``zipfile`` keeps all of them, as objects
MAX_LINKED_FOLDERS = 100_000  # folders that are reached through links to folders


UNPACK_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, RuntimeError, EOFError)


class Store(Protocol):
    @property
    def in_memory(self) -> bool:
        """Whether opening an image needs neither a file nor a decoder."""
        ...

    def open(self, name: str, max_pixels: int, min_side: int | None = None) -> Image.Image:
        """The upright RGB image of that name (see ``decode``).

        Raises:
            UnreadableImage: the image is missing or cannot be decoded.
            RunError: the folder or zip is gone.
        """
        ...

    def missing(self, name: str) -> bool:
        """Whether the file of an image, which was there when it was listed, is gone."""
        ...


class DatasetStore(Store, Protocol):
    """The store of a dataset, whose images are still there after they have been read."""

    def raw(self, name: str) -> bytes | None:
        """The bytes of the image's file; None if it is no file. Errors as in ``open``."""
        ...

    def content(self, name: str) -> bytes:
        """What changes when the content of an image changes: a digest, or a checksum and a size; b"" if it is gone."""
        ...

    def outline(self, name: str) -> bytes:
        """What is cheap to read and the same for images of the same content, perhaps for others too; b"" if gone."""
        ...


class Listing(NamedTuple):
    """What a walk finds in one folder."""

    path: str  # "" (the root) or "some/folder/"
    files: list[str]  # in order; names have the normal form of Unicode, so that they are the same on all systems
    problem: str | None = None  # why the folder could not be read


class FolderStore:
    in_memory = False

    def __init__(self, root: Path) -> None:
        self.root, self.identity = root, identity(root)

    def open(self, name: str, max_pixels: int, min_side: int | None = None) -> Image.Image:
        return decode(self.raw(name), self.path_of(name), max_pixels, min_side)

    def path_of(self, name: str) -> str:
        return os.path.join(self.root, name)  # noqa: PTH118 (pathlib is slower than reading a small file)

    def raw(self, name: str) -> bytes:
        try:
            return self.read(name)
        except OSError as error:
            if error.errno in ELSEWHERE:
                raise RunError(describe_os_error(error)) from None
            self.check_still_there(self.path_of(name))
            message = f"{self.path_of(name)} cannot be read: {error.strerror}; {remedy(error)}"
            raise UnreadableImage(printable(message)) from None

    def content(self, name: str) -> bytes:
        with contextlib.suppress(OSError, UnreadableImage):
            return hashlib.sha256(self.read(name)).digest()
        return b""

    def outline(self, name: str) -> bytes:
        with contextlib.suppress(OSError):
            return self.head(name, 4096) + os.stat(self.path_of(name)).st_size.to_bytes(8, "little")  # noqa: PTH116
        return self.content(name)

    def head(self, name: str, size: int) -> bytes:
        """The first bytes of a file; none if it cannot be read."""
        with contextlib.suppress(OSError, UnreadableImage):
            return self.read(name, size)
        return b""

    def read(self, name: str, limit: int = MAX_BYTES + 1) -> bytes:
        try:
            return read_regular(os.path.join(self.root, name), limit)  # noqa: PTH118
        except FileNotFoundError:
            if name.isascii():
                raise
            return read_regular(find_in_any_form(self.root, name), limit)

    def check_still_there(self, path: str) -> None:
        """Raises a RunError if not one file but its folder is gone: deleted, renamed, or its disk unmounted."""
        for folder, before in ((self.root, self.identity), (Path(path).parent, None)):
            now = identity(folder)
            if now is None or (before is not None and now != before):
                raise RunError(f"{printable(str(folder))} is gone: put it back, and repeat or resume")

    def missing(self, name: str) -> bool:
        try:
            return not os.path.lexists(find_in_any_form(self.root, name))
        except OSError:
            return True

    def walk(self) -> Iterator[Listing]:
        """Every folder, parents first and empty ones included.

        Links to folders are followed, except to a folder that holds the link: that would never end.

        Raises:
            UserError: so many folders are reached through links that they seem to link to one another.
        """
        linked = 0
        waiting: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [(str(self.root), "", ())]
        while waiting:
            location, path, parents = waiting.pop()
            try:
                status = os.stat(location)  # noqa: PTH116
                identity = status.st_dev, status.st_ino
                if identity in parents:
                    continue
                files, folders, links = scan(location)
            except OSError as error:
                yield Listing(path, [], error.strerror or type(error).__name__)
                continue
            linked += links
            if linked > MAX_LINKED_FOLDERS:
                raise UserError(
                    f"{printable(str(self.root))} has more than {MAX_LINKED_FOLDERS:,} links to folders, the last in "
                    f"{printable(path)}: remove those between its folders"
                )
            yield Listing(path, files)
            below = (*parents, identity)
            waiting += [(location, f"{path}{name}/", below) for name, location in sorted(folders.items(), reverse=True)]

    def replaced_entries(self) -> int:
        """None: a folder holds a name once."""
        return 0

    def subfolder(self, folder: str) -> "FolderStore":
        """The store of a folder below the root, with names relative to that folder."""
        return FolderStore(Path(find_in_any_form(self.root, folder)))


class OpenZip(NamedTuple):
    """A zip that a process has opened, and the entries whose names differ from those in the folder it was made of."""

    process: int
    archive: zipfile.ZipFile
    renamed: dict[str, str]


class ZipStore:
    in_memory = False

    def __init__(self, path: Path, prefix: str = "") -> None:
        self.path, self.prefix = path, prefix  # "" or "folder/": only entries with this prefix belong to the store
        self.opened: OpenZip | None = None

    def archive(self) -> "OpenZip":
        """The zip, opened by this process: processes cannot share a position in a file."""
        if self.opened is None or self.opened.process != os.getpid():
            try:
                archive = zipfile.ZipFile(self.path)
            except FileNotFoundError:  # it was there when the source was found
                raise RunError(f"{printable(str(self.path))} is gone: put it back, and repeat or resume") from None
            except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
                raise UserError(f"{self.path} is not a valid zip file ({error}): pack or copy it again") from None
            self.opened = OpenZip(os.getpid(), archive, renamed_entries(archive))
        return self.opened

    def open(self, name: str, max_pixels: int, min_side: int | None = None) -> Image.Image:
        return decode(self.raw(name), f"{self.path}/{self.prefix}{name}", max_pixels, min_side)

    def raw(self, name: str) -> bytes:
        label = f"{self.path}/{self.prefix}{name}"
        _, archive, renamed = self.archive()
        try:
            entry = archive.getinfo(renamed.get(self.prefix + name, self.prefix + name))
        except KeyError:  # another zip took its place
            raise UnreadableImage(printable(f"{label} is no longer in the zip; put it back")) from None
        check_bytes(entry.file_size, label)
        try:
            return archive.read(entry)
        except UNPACK_ERRORS as error:
            raise UnreadableImage(printable(f"{label} cannot be unpacked: {error}; create the zip again")) from None

    def content(self, name: str) -> bytes:
        _, archive, renamed = self.archive()
        with contextlib.suppress(KeyError):
            entry = archive.getinfo(renamed.get(self.prefix + name, self.prefix + name))
            return entry.CRC.to_bytes(4, "little") + entry.file_size.to_bytes(8, "little")
        return b""

    def outline(self, name: str) -> bytes:
        return self.content(name)

    def head(self, name: str, size: int) -> bytes:
        """As of a ``FolderStore``."""
        _, archive, renamed = self.archive()
        with (
            contextlib.suppress(*UNPACK_ERRORS),
            archive.open(renamed.get(self.prefix + name, self.prefix + name)) as file,
        ):
            return file.read(size)
        return b""

    def missing(self, name: str) -> bool:
        return not self.path.is_file()

    def walk(self) -> Iterator[Listing]:
        """As the walk of a ``FolderStore``."""
        files: dict[str, list[str]] = {"": []}
        for name in self.entries():
            pieces = name.split("/")
            for depth in range(1, len(pieces)):
                files.setdefault("/".join(pieces[:depth]) + "/", [])
            if pieces[-1]:
                files[name[: len(name) - len(pieces[-1])]].append(pieces[-1])
        for folder in sorted(files, key=lambda folder: folder.split("/")):
            yield Listing(folder, files[folder])

    def entries(self) -> list[str]:
        _, archive, renamed = self.archive()
        found = archive.namelist()
        if len(found) > MANY_ENTRIES:
            log.warning(
                "%s has %s entries: each process that reads it keeps about %.1f GB of them in memory; unpack it to "
                "a folder to save that",
                self.path,
                f"{len(found):,}",
                len(found) * BYTES_PER_ENTRY / 1e9,
            )
        names = set(found) - set(renamed.values()) | renamed.keys()  # a name that is there twice: the last is read
        entries = (name.removeprefix(self.prefix) for name in names if name.startswith(self.prefix))
        return sorted(name for name in entries if name)

    def replaced_entries(self) -> int:
        """How many entries have the name of a later one, which is read in their place."""
        archive = self.archive().archive
        return len(archive.infolist()) - len(archive.NameToInfo)

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

    def raw(self, name: str) -> None:
        return None

    def content(self, name: str) -> bytes:
        index = self.index.get(name)
        return b"" if index is None else hashlib.sha256(self.pixels[index].tobytes()).digest()

    def outline(self, name: str) -> bytes:
        return self.content(name)

    def missing(self, name: str) -> bool:
        return False
