"""Large arrays that the processes of a machine share instead of copying: names, labels, pixels.

Any value is pickled with its arrays left out (pickle's protocol 5). They go into a temporary file, which every process
maps, and the value that is loaded there has views of the file as its arrays. They are read-only.

The file is not in /dev/shm: containers often allow only 64 MB there, and the loader's batches need them. It is removed
as soon as all processes have opened it, and exists as long as they do: nothing is left behind, even by a killed run.
Windows has named memory for this, which disappears with the last process that uses it.
"""

import mmap
import os
import pickle
import sys
import tempfile
import uuid
import weakref
from collections.abc import Sequence
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from allmlp.errors import UserError

T = TypeVar("T")
MIN_BYTES = 1 << 20  # arrays that take less, all together, are copied
ALIGNMENT = 64


class SharedMap(mmap.mmap):
    """Read-only memory that other processes can map: by its name at first, later only by inheritance."""

    name: str
    descriptor: int

    @classmethod
    def create(cls, arrays: Sequence[memoryview], size: int) -> "SharedMap":
        """Holds the arrays, one after another, each aligned. ``unlink`` it when all processes have opened it.

        Raises:
            UserError: the temporary folder has too little space.
        """
        padded = (piece for array in arrays for piece in (array, bytes(-array.nbytes % ALIGNMENT)))
        if sys.platform == "win32":
            name = f"allmlp-{uuid.uuid4().hex}"
            writable = mmap.mmap(-1, size, tagname=name)
            for piece in padded:
                writable.write(piece)
            opened = cls.open(name, size)
            writable.close()
            return opened
        descriptor, name = tempfile.mkstemp(prefix="allmlp-")
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                for piece in padded:
                    view = memoryview(piece)
                    while view:
                        view = view[file.write(view) or 0 :]
            return cls.open(name, size)
        except OSError as error:
            Path(name).unlink()
            raise UserError(
                f"{size:,} bytes for the list of images do not fit into {tempfile.gettempdir()} ({error.strerror}): "
                "free space there, or set TMPDIR to another folder"
            ) from None

    @classmethod
    def open(cls, name: str, size: int) -> "SharedMap":
        if sys.platform == "win32":
            opened = cls(-1, size, tagname=name, access=mmap.ACCESS_READ)
            opened.name = name
            return opened
        opened = cls.inherit(os.open(name, os.O_RDONLY), size)
        opened.name = name
        return opened

    @classmethod
    def inherit(cls, descriptor: int, size: int) -> "SharedMap":
        opened = cls(descriptor, size, access=mmap.ACCESS_READ)
        opened.descriptor = descriptor
        weakref.finalize(opened, os.close, descriptor)
        return opened

    def unlink(self) -> None:
        """From here on, only processes that inherit the map can open it."""
        if sys.platform != "win32":
            Path(self.name).unlink()

    def __reduce__(self) -> tuple[Any, ...]:
        """Only for a process that is being spawned."""
        if sys.platform == "win32":
            return SharedMap.open, (self.name, len(self))
        return inherited, (reduction.DupFd(self.descriptor), len(self))


def inherited(duplicate: Any, size: int) -> SharedMap:
    return SharedMap.inherit(duplicate.detach(), size)


class Span(NamedTuple):
    """Where an array lies in a map."""

    start: int
    size: int

    def of(self, shared: SharedMap) -> memoryview:
        return memoryview(shared)[self.start : self.start + self.size]


class Published(NamedTuple):
    """What another process of this machine needs in order to open a value."""

    pickled: bytes
    spans: list[Span]  # of its arrays; empty if they are in ``pickled``
    name: str = ""
    size: int = 0

    def open(self) -> Any:
        if not self.spans:
            return pickle.loads(self.pickled)
        shared = SharedMap.open(self.name, self.size)
        return pickle.loads(self.pickled, buffers=[span.of(shared) for span in self.spans])


def publish(value: Any) -> tuple[Published, SharedMap | None]:
    """Lets other processes of this machine open the value, until the map is unlinked. None: it is small, and a copy."""
    pickled, arrays = pickle_without_arrays(value)
    if not arrays:
        return Published(pickled, []), None
    spans, size = lay_out(arrays)
    shared = SharedMap.create(arrays, size)
    return Published(pickled, spans, shared.name, size), shared


class Shared(Generic[T]):
    """A value whose arrays are not copied when it is pickled for a process that is being spawned."""

    def __init__(self, value: T) -> None:
        self.value = value
        self.spawnable: tuple[bytes, list[tuple[SharedMap, Span]]] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is None:
            return Shared, (self.value,)
        if self.spawnable is None:
            pickled, arrays = pickle_without_arrays(self.value)
            self.spawnable = pickled, locate(arrays)
        return load_spawned, self.spawnable


def load_spawned(pickled: bytes, places: list[tuple[SharedMap, Span]]) -> Shared:
    return Shared(pickle.loads(pickled, buffers=[span.of(shared) for shared, span in places]))


def locate(arrays: list[memoryview]) -> list[tuple[SharedMap, Span]]:
    """Where each array lies: in the map that it is a view of, or in a new one."""
    places = [find_map(array) for array in arrays]
    new = [array for array, place in zip(arrays, places, strict=True) if place is None]
    if new:
        spans, size = lay_out(new)
        shared = SharedMap.create(new, size)
        shared.unlink()
        rest = iter(spans)
        return [(shared, next(rest)) if place is None else place for place in places]
    return [place for place in places if place is not None]


def find_map(array: memoryview) -> tuple[SharedMap, Span] | None:
    owner = array.obj  # an array, which is a view of an array, …, of a buffer of the map
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    if not isinstance(owner, SharedMap):
        return None
    start = address(array) - address(memoryview(owner))
    return owner, Span(start, array.nbytes)


def address(memory: memoryview) -> int:
    return np.frombuffer(memory, dtype=np.uint8).ctypes.data


def pickle_without_arrays(value: Any) -> tuple[bytes, list[memoryview]]:
    """The pickled value, and the bytes of its arrays; if these are few, they are in the pickle."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    arrays = [buffer.raw() for buffer in buffers]
    if sum(array.nbytes for array in arrays) < MIN_BYTES:
        return pickle.dumps(value, protocol=5), []
    return pickled, arrays


def lay_out(arrays: Sequence[memoryview]) -> tuple[list[Span], int]:
    """The place of each array in a map, and the size of the map."""
    spans, end = [], 0
    for array in arrays:
        spans.append(Span(end, array.nbytes))
        end += array.nbytes + -array.nbytes % ALIGNMENT
    return spans, end
