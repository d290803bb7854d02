"""Tensors in files that anybody may have made: what is in them is known, and held to limits, before any is read.

Nothing here executes what a file says: ``.npz`` without pickle, ``.pt`` by torch's restricted unpickler, safetensors.
"""

import math
import pickle
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

from mlp_mixer.errors import UserError, printable

MAX_HEADER = 16 * 2**20  # of a safetensors file; a Mixer's takes some 30 kB, the names of 21,843 classes 1 MB
MAX_INFLATION = 20  # times its size that a compressed file may grow; weights hardly shrink
UNSUSPICIOUS = 64 * 2**20  # bytes, whatever they were compressed to

FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "<f8": torch.float64, "<f4": torch.float32, "<f2": torch.float16,
    "|V2": torch.bfloat16, "<V2": torch.bfloat16,  # what NumPy makes of a bfloat16 array that it stores
}  # fmt: skip


class Info(NamedTuple):
    """Of a tensor that has not been read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype


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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stack.close()


def open_container(path: Path) -> Container:
    """Opens a safetensors, ``.npz`` or torch file, told apart by their first bytes, never by their names.

    Raises:
        UserError: no such file, a folder, another kind of file, a broken or a dangerous one.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a weights file: name the file in it")
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: give a weights file (.safetensors, .npz, .pth) or hf-hub:OWNER/NAME for one on "
            "the Hugging Face hub"
        )
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not start:
        raise UserError(f"{path} is empty: copy or download it again")
    if start.startswith(b"PK\x03\x04"):
        return open_zip(path)
    if start[8:9] == b"{":
        return open_safetensors(path, start)
    if start[:1] == b"\x80" or start.startswith(b"(dp"):
        return open_pickle(path)
    raise UserError(
        f"{path} is no weights file that is known here: safetensors, .npz and torch's .pt and .pth are read by "
        f"content, and this one begins with {printable(start[:8].decode('latin1'))!r}"
    )


def open_safetensors(path: Path, start: bytes) -> Container:
    (length,) = struct.unpack("<Q", start[:8])
    if length > MAX_HEADER:
        raise UserError(
            f"{path}: a safetensors header of {length:,} bytes, where {MAX_HEADER:,} is the limit: not a Mixer's "
            "weights, or a damaged file; download it again"
        )
    stack = ExitStack()
    try:
        file: Any = stack.enter_context(safe_open(path, framework="pt"))
        infos = {}
        for name in file.keys():  # noqa: SIM118 (not a dict)
            part = file.get_slice(name)
            info = Info(tuple(part.get_shape()), known_float(part.get_dtype(), path, name))
            infos[name] = checked(info, path, name)
    except (SafetensorError, OSError) as error:
        stack.close()
        raise unsound(path, "safetensors file", error) from None
    except BaseException:
        stack.close()
        raise
    return Container("safetensors", path, infos, file.get_tensor, file.metadata() or {}, stack=stack)


def open_zip(path: Path) -> Container:
    """NumPy's .npz and torch's .pt are both zips; the names inside tell which."""
    stack = ExitStack()
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
        members = [member for member in archive.infolist() if not member.is_dir()]
        total, size = sum(member.file_size for member in members), path.stat().st_size
        if total > max(MAX_INFLATION * size, UNSUSPICIOUS):
            raise UserError(
                f"{path}: {size:,} bytes that would inflate to {total:,}: weights do not shrink like that, so this is "
                "refused; get the file from its authors"
            )
        if any(member.filename.rpartition("/")[2] == "data.pkl" for member in members):
            stack.close()
            return open_pickle(path)
        infos = {}
        for member in members:
            if not member.filename.endswith(".npy"):
                raise UserError(f"{path} is a zip with {printable(member.filename)!r} in it: no weights of a Mixer")
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as file:
                infos[name] = npy_info(file, member.file_size, path, name)
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, zlib.error) as error:
        stack.close()
        raise unsound(path, ".npz file", error) from None
    except BaseException:
        stack.close()
        raise

    def read(name: str) -> Tensor:
        try:
            with archive.open(f"{name}.npy") as file:
                return read_npy(file, infos[name])
        except (zipfile.BadZipFile, OSError, EOFError, ValueError, zlib.error) as error:
            raise unsound(path, ".npz file", error) from None

    return Container("npz", path, infos, read, stack=stack)


def npy_info(file: Any, size: int, path: Path, name: str) -> Info:
    """Shape and type from the header of a .npy member, held against the bytes that the zip's directory promises."""
    shape, fortran_order, dtype = npy_header(file, path, name)
    if dtype.hasobject:
        raise UserError(f"{path}: {printable(name)!r} holds pickled Python objects, which can run code: refused")
    if fortran_order and len(shape) > 1:
        raise UserError(f"{path}: {printable(name)!r} is in Fortran order: save it again with numpy.ascontiguousarray")
    key = "|V2" if dtype.kind == "V" and dtype.itemsize == 2 else dtype.str
    info = checked(Info(shape, known_float(key, path, name)), path, name)
    promised = math.prod(shape) * dtype.itemsize
    if promised != size - file.tell():
        raise UserError(
            f"{path}: {printable(name)!r} is said to have shape {shape}, {promised:,} bytes, but {size - file.tell():,}"
            " are there: a damaged file; download it again"
        )
    return info


def npy_header(file: Any, path: Path, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        return readers[version](file, max_header_size=10_000)
    except (ValueError, KeyError, TypeError, SyntaxError, EOFError) as error:
        raise unsound(path, f".npz file: {printable(name)!r} has no sound header", error) from None


def read_npy(file: Any, info: Info) -> Tensor:
    """Reads a .npy member, whose header was checked, into one new tensor."""
    shape, _, _ = npy_header(file, Path(), "")
    tensor = torch.empty(shape, dtype=info.dtype)
    target = tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
    done = 0
    while done < len(target):
        count = file.readinto(target[done : done + 2**20])
        if not count:
            raise EOFError(f"ends after {done:,} of {len(target):,} bytes")
        done += count
    return tensor


def open_pickle(path: Path) -> Container:
    """A torch file, by the restricted unpickler alone, which knows tensors and plain containers and calls nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on old types of storage
            mapped = zipfile.is_zipfile(path)
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} holds Python objects beside tensors, which can run code, so it is refused ({printable(reason)}): "
            "where you trust its author, load it with torch and save its state_dict() alone"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise unsound(path, "torch file", error) from None
    tensors, left_out = state_dict(stored, path)
    infos = {}
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise UserError(f"{path}: {printable(name)!r} is of type {tensor.dtype}: a Mixer's tensors are all floats")
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: {printable(name)!r} claims more numbers than are stored: refused")
        infos[name] = checked(Info(tuple(tensor.shape), tensor.dtype), path, name)
    return Container("torch", path, infos, tensors.__getitem__, left_out=left_out)


def state_dict(stored: Any, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a state dict, bare or inside a training checkpoint, and the names of what else lies there.

    Of a checkpoint with averaged and plain weights the averaged ones are taken, as timm does.
    """
    left_out: list[str] = []
    wrappers = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "module")
    while isinstance(stored, dict):
        inner = next((key for key in wrappers if isinstance(stored.get(key), dict)), None)
        if inner is None:
            break
        left_out += [str(key) for key in stored if key != inner]
        stored = stored[inner]
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise UserError(
            f"{path} holds {type(stored).__name__}, not a state dict of tensors: save model.state_dict() alone"
        )
    tensors = {}
    for key, tensor in stored.items():
        name = str(key)
        for prefix in ("module.", "_orig_mod."):  # of DistributedDataParallel and torch.compile
            name = name.removeprefix(prefix)
        tensors[name] = tensor
    return tensors, tuple(left_out)


def known_float(kind: str, path: Path, name: str) -> torch.dtype:
    if kind not in FLOATS:
        raise UserError(
            f"{path}: {printable(name)!r} is of type {kind}: a Mixer has float64, float32, float16 or bfloat16 alone"
        )
    return FLOATS[kind]


def checked(info: Info, path: Path, name: str) -> Info:
    if 0 in info.shape:
        raise UserError(f"{path}: {printable(name)!r} has the shape {info.shape}, no numbers at all: not a Mixer's")
    return info


def unsound(path: Path, kind: str, error: Exception) -> UserError:
    reason = printable(" ".join(str(error).split())[:200]) or type(error).__name__
    return UserError(f"{path} is not a sound {kind} ({reason}): copy or download it again")
