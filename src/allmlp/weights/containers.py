"""Tensors in files that anybody may have made: what is in them is known, and held to limits, before any is read.

Nothing here executes what a file says: ``.npz`` without pickle, ``.pt`` by torch's restricted unpickler, safetensors.
"""

import lzma
import math
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from allmlp.errors import UserError, printable

MAX_HEADER = 4 * 2**20  # bytes, of a safetensors file; a Mixer's takes some 30 kB, the names of 21,843 classes 1 MB
MAX_TENSORS = 4096  # a Mixer-H/14 has 390, its training checkpoint three times as many
MAX_INFLATION = 20  # times its size that a compressed file may grow; weights hardly shrink
UNSUSPICIOUS = 64 * 2**20  # bytes, whatever they were compressed to
MAX_WRAPPERS = 5  # dictionaries around a state dict

FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "<f8": torch.float64, "<f4": torch.float32, "<f2": torch.float16,
    "|V2": torch.bfloat16, "<V2": torch.bfloat16,  # what NumPy makes of a bfloat16 array that it stores
}  # fmt: skip
UNSOUND = (  # what the readers below raise on files that are damaged, or made to break them
    zipfile.BadZipFile, OSError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError, AssertionError,
    NotImplementedError, RuntimeError, OverflowError, MemoryError, struct.error, zlib.error, lzma.LZMAError,
    SafetensorError,
)  # fmt: skip


class Info(NamedTuple):
    """Of a tensor that has not been read yet; of ``dtype`` None if it is no float, and ``kind`` says what."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    kind: str


@dataclass
class Container:
    """An open file: the tensors it holds, each read when it is asked for."""

    kind: Literal["safetensors", "npz", "torch"]
    path: Path
    infos: dict[str, Info]
    read: Callable[[str], Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()  # what else is there that is no tensor of the model
    stack: ExitStack = field(default_factory=ExitStack)

    @property
    def name(self) -> str:
        """The path, as it may stand in a message."""
        return printable(str(self.path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stack.close()


def open_container(path: Path) -> Container:
    """Opens a safetensors, ``.npz`` or torch file, told apart by their first bytes, never by their names.

    Raises:
        UserError: no such file, a folder, another kind of file, a broken or a dangerous one.
    """
    what = printable(str(path))
    if path.is_dir():
        raise UserError(f"{what} is a folder, not a weights file: name the file in it")
    if not path.is_file():
        raise UserError(
            f"{what} does not exist: give a weights file (.safetensors, .npz, .pth) or hf-hub:OWNER/NAME for one on "
            "the Hugging Face hub"
        )
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise UserError(f"{what} cannot be read ({error.strerror}): give a file that may be") from None
    if not start:
        raise UserError(f"{what} is empty: copy or download it again")
    if start.startswith(b"PK\x03\x04"):
        kind, opener = (".npz", open_npz) if not holds_a_pickle(path, what) else ("torch", open_torch)
    elif start[8:9] == b"{":
        kind, opener = "safetensors", open_safetensors
    elif start[:1] == b"\x80" or start.startswith(b"(dp"):
        kind, opener = "torch", open_torch
    else:
        raise UserError(
            f"{what} is no weights file that is known here: safetensors, .npz and torch's .pt and .pth are read by "
            f"content, and this one begins with {printable(start[:8].decode('latin1'))!r}: give one of those, or "
            "download it again"
        )
    with ExitStack() as stack:
        try:
            container = opener(path, what, stack)
            refuse_empty(container.infos, what)
        except UserError:
            raise
        except UNSOUND as error:
            raise unsound(what, kind, error) from None
        container.stack = stack.pop_all()
    return container


def refuse_empty(infos: Mapping[str, Info], what: str) -> None:
    for name, info in infos.items():
        if any(size < 1 for size in info.shape):
            raise UserError(
                f"{what}: {printable(name)!r} has the shape {info.shape}, which holds no numbers: save or download it "
                "again"
            )


def check_number(tensors: int, what: str) -> None:
    if tensors > MAX_TENSORS:
        raise UserError(f"{what} names {tensors:,} tensors, no Mixer has {MAX_TENSORS:,}: give a Mixer's weights")


def require_floats(infos: Mapping[str, Info], what: str) -> None:
    for name, info in infos.items():
        if info.dtype is None:
            raise UserError(
                f"{what}: {printable(name)!r} is of type {printable(info.kind)}: save it again as float32 (float64, "
                "float16 and bfloat16 are read too)"
            )


def unsound(what: str, kind: str, error: Exception) -> UserError:
    reason = printable(" ".join(str(error).split())[:200]) or type(error).__name__
    return UserError(f"{what} is not a sound {kind} file ({reason}): copy or download it again")


# safetensors


def open_safetensors(path: Path, what: str, stack: ExitStack) -> Container:
    with path.open("rb") as raw:
        (length,) = struct.unpack("<Q", raw.read(8))
        if length > MAX_HEADER:
            raise UserError(
                f"{what}: a safetensors header of {length:,} bytes, where {MAX_HEADER:,} is the limit: not a Mixer's "
                "weights, or a damaged file; download it again"
            )
        header = raw.read(length)
    if header.rstrip(b" ")[-1:] != b"}":  # it is padded by spaces alone
        raise ValueError("its header does not end as it should")
    file: Any = stack.enter_context(safe_open(path, framework="pt"))
    names = list(file.keys())
    check_number(len(names), what)
    infos = {}
    for name in names:
        part = file.get_slice(name)
        kind = part.get_dtype()
        infos[name] = Info(tuple(part.get_shape()), FLOATS.get(kind), kind)
    return Container("safetensors", path, infos, file.get_tensor, file.metadata() or {})


# NumPy's .npz


def members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    return [member for member in archive.infolist() if not member.is_dir()]


def holds_a_pickle(path: Path, what: str) -> bool:
    """Whether a zip is torch's, not NumPy's; a UserError for one that would inflate beyond measure, or is broken."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = members(archive)
    except UNSOUND as error:
        raise unsound(what, "weights", error) from None
    total, size = sum(member.file_size for member in inside), path.stat().st_size
    if total > max(MAX_INFLATION * size, UNSUSPICIOUS):
        raise UserError(
            f"{what}: {size:,} bytes that would inflate to {total:,}: weights do not shrink like that, so this is "
            "refused; get the file from its authors"
        )
    return any(member.filename.rpartition("/")[2] == "data.pkl" for member in inside)


def open_npz(path: Path, what: str, stack: ExitStack) -> Container:
    archive = stack.enter_context(zipfile.ZipFile(path))
    inside = members(archive)
    check_number(len(inside), what)
    infos: dict[str, Info] = {}
    for member in inside:
        name = member.filename.removesuffix(".npy")
        if name == member.filename:
            raise UserError(f"{what} is a zip with {printable(name)!r} in it, no weights: give a Mixer's .npz or .pth")
        if name in infos:
            raise UserError(f"{what} holds {printable(name)!r} twice: save or download it again")
        with archive.open(member) as file:
            infos[name] = npy_info(file, member.file_size, what, name)

    def read(name: str) -> Tensor:
        try:
            with archive.open(f"{name}.npy") as file:
                return read_npy(file, infos[name])
        except UNSOUND as error:
            raise unsound(what, ".npz", error) from None

    return Container("npz", path, infos, read)


def npy_info(file: Any, size: int, what: str, name: str) -> Info:
    """Shape and type from the header of a .npy member, held against the bytes that the zip's directory promises."""
    try:
        shape, fortran_order, dtype = npy_header(file)
    except UNSOUND as error:
        raise ValueError(f"{name!r} has no sound header: {error}") from None
    if dtype.hasobject:
        raise UserError(
            f"{what}: {printable(name)!r} holds pickled Python objects, which can run code, so it is refused: save its "
            "numbers again as plain arrays, where you trust its author"
        )
    if fortran_order and len(shape) > 1:
        raise UserError(f"{what}: {printable(name)!r} is in Fortran order: save it again with numpy.ascontiguousarray")
    promised = math.prod(shape) * dtype.itemsize
    if promised != size - file.tell():
        raise UserError(
            f"{what}: {printable(name)!r} is said to have shape {shape}, {promised:,} bytes, but {size - file.tell():,}"
            " are there: a damaged file; download it again"
        )
    key = "|V2" if dtype.kind == "V" and dtype.itemsize == 2 else dtype.str
    return Info(shape, FLOATS.get(key), key)


def npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return readers[version](file, max_header_size=10_000)


def read_npy(file: Any, info: Info) -> Tensor:
    """Reads a .npy member, whose header was checked, into one new tensor."""
    npy_header(file)
    tensor = torch.empty(info.shape, dtype=info.dtype)
    target = tensor.view(-1).view(torch.uint8).numpy().data
    done = 0
    while done < len(target):
        count = file.readinto(target[done : done + 2**20])
        if not count:
            raise EOFError(f"ends after {done:,} of {len(target):,} bytes")
        done += count
    return tensor


# torch's .pt and .pth


def open_torch(path: Path, what: str, stack: ExitStack) -> Container:
    """By the restricted unpickler alone, which knows tensors and plain containers and calls nothing."""
    by_name = path.suffix == ".safetensors"  # torch.load would take such a name's word for it
    source: Any = stack.enter_context(path.open("rb")) if by_name else path
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on old types of storage
            mapped = not by_name and zipfile.is_zipfile(path)
            stored = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if "operand" in str(error):  # not a pickle at all, or a damaged one
            raise ValueError("its pickle is broken") from None
        asked = re.search(r"global:? (?:GLOBAL )?(\S+)", str(error), re.IGNORECASE)
        named = f" ({printable(asked[1])})" if asked else ""
        raise UserError(
            f"{what} holds Python objects beside tensors{named}, which can run code, so it is refused: where you trust "
            "its author, load it with torch and save its state_dict() alone"
        ) from None
    tensors, left_out = state_dict(stored, what)
    check_number(len(tensors), what)
    infos = {}
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.device.type == "meta":
            raise UserError(f"{what}: {printable(name)!r} is no plain tensor (sparse, nested or meta): save it dense")
        known = str(tensor.dtype).removeprefix("torch.")
        infos[name] = Info(tuple(tensor.shape), tensor.dtype if tensor.dtype in FLOATS.values() else None, known)
    claimed = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    if claimed > path.stat().st_size:
        raise UserError(f"{what} claims {claimed:,} bytes of numbers, more than are stored: save each tensor by itself")
    return Container("torch", path, infos, tensors.__getitem__, left_out=left_out)


def state_dict(stored: Any, what: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a state dict, bare or inside a training checkpoint, and the names of what else lies there.

    Of a checkpoint with averaged and plain weights the averaged ones are taken, as timm does.
    """
    left_out: list[str] = []
    wrappers = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "module")
    for _ in range(MAX_WRAPPERS):
        inner = next((key for key in wrappers if isinstance(stored, dict) and isinstance(stored.get(key), dict)), None)
        if inner is None:
            break
        left_out += [str(key) for key in stored if key != inner]
        stored = stored[inner]
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise UserError(
            f"{what} holds no state dict of tensors (but {type(stored).__name__}): save model.state_dict() alone"
        )
    tensors: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        name = str(key)
        name = re.sub(r"^(?:module\.|_orig_mod\.)+", "", name)  # of DistributedDataParallel and torch.compile
        if name in tensors:
            raise UserError(f"{what} holds {printable(name)!r} twice, with and without a prefix: save one of them")
        tensors[name] = tensor.detach()
    return tensors, tuple(left_out)
