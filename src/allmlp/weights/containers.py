"""Weights files that may come from anyone: names, shapes and types are checked against limits before data is read.

No code in a file is executed: ``.npz`` is read without pickle, ``.pt`` by torch's restricted unpickler; safetensors
holds no code.
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
from allmlp.weights.foreign_files import FIRST_BYTES, HARMLESS, TORCHSCRIPT, other_kind

MAX_HEADER = 4 * 2**20  # bytes, of a safetensors file; a Mixer's has some 30 kB, the names of 21,843 classes 1 MB
MAX_TENSORS = 4096  # a Mixer-H/14 has 390, its training checkpoint three times as many
MAX_EXPANSION = 20  # largest ratio of a zip's uncompressed size to its file size; weights compress far less
ALWAYS_ALLOWED_SIZE = 64 * 2**20  # bytes, uncompressed, at any ratio
MAX_WRAPPERS = 5  # nested dictionaries around a state dict

FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "<f8": torch.float64, "<f4": torch.float32, "<f2": torch.float16,
    "|V2": torch.bfloat16, "<V2": torch.bfloat16,  # NumPy stores bfloat16 arrays as two-byte voids
}  # fmt: skip
READ_ERRORS = (  # what the libraries below raise on damaged or malicious files
    zipfile.BadZipFile, OSError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError, AssertionError,
    NotImplementedError, RuntimeError, OverflowError, MemoryError, struct.error, zlib.error, lzma.LZMAError,
    SafetensorError,
)  # fmt: skip


class TensorInfo(NamedTuple):
    """A tensor that has not been read yet. ``dtype`` is None if it is not floating-point; ``kind`` is what the file
    calls its type."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    kind: str


@dataclass
class Container:
    """An open file and its tensors; ``read`` reads one of them by name."""

    kind: Literal["safetensors", "npz", "torch"]
    path: Path
    infos: dict[str, TensorInfo]
    read: Callable[[str], Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()  # names of other entries next to the state dict
    stack: ExitStack = field(default_factory=ExitStack)

    @property
    def name(self) -> str:
        """The path, escaped for a message."""
        return printable(str(self.path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stack.close()


def open_container(path: Path) -> Container:
    """Opens a safetensors, ``.npz`` or torch file, recognized by its first bytes; its name does not matter.

    Raises:
        UserError: the file is missing, a folder, of another kind, damaged or dangerous.
    """
    file_name = printable(str(path))
    if path.is_dir():
        raise UserError(f"{file_name} is a folder, not a weights file: name the file in it")
    if not path.is_file():
        raise UserError(
            f"{file_name} does not exist: give a weights file (.safetensors, .npz, .pth) or hf-hub:OWNER/NAME for one "
            "on the Hugging Face hub"
        )
    try:
        with path.open("rb") as file:
            start = file.read(FIRST_BYTES)
    except OSError as error:
        raise UserError(f"{file_name} cannot be read ({error.strerror}): give a readable file") from None
    if not start:
        raise UserError(f"{file_name} is empty: copy or download it again")
    if start.startswith(b"PK\x03\x04"):
        kind, opener = (".npz", open_npz) if not is_torch_zip(path, file_name) else ("torch", open_torch)
    elif start[8:9] == b"{":
        kind, opener = "safetensors", open_safetensors
    elif start[:1] == b"\x80" or start.startswith(b"(dp"):
        kind, opener = "torch", open_torch
    elif what := other_kind(start):
        raise UserError(f"{file_name} is {what}")
    else:
        raise UserError(
            f"{file_name} is not a weights file: it begins with {printable(start[:8].decode('latin1'))!r}, unlike "
            "safetensors, .npz and torch's .pt and .pth files: give one of those, or download it again"
        )
    with ExitStack() as stack:
        try:
            container = opener(path, file_name, stack)
            check_not_empty(container.infos, file_name)
        except UserError:
            raise
        except READ_ERRORS as error:
            raise damaged(file_name, kind, error) from None
        container.stack = stack.pop_all()
    return container


def check_not_empty(infos: Mapping[str, TensorInfo], file_name: str) -> None:
    for name, info in infos.items():
        if any(size < 1 for size in info.shape):
            raise UserError(
                f"{file_name}: {printable(name)!r} has the shape {info.shape}, which holds no numbers: save or "
                "download it again"
            )


def check_count(tensors: int, file_name: str) -> None:
    if tensors > MAX_TENSORS:
        raise UserError(
            f"{file_name} has {tensors:,} tensors, the limit is {MAX_TENSORS:,} and no Mixer has as many: give a "
            "Mixer's weights"
        )


def require_floats(infos: Mapping[str, TensorInfo], file_name: str) -> None:
    """Raises a UserError if a tensor is not floating-point."""
    for name, info in infos.items():
        if info.dtype is None:
            raise UserError(
                f"{file_name}: {printable(name)!r} is of type {printable(info.kind)}: save it again as float32 "
                "(float64, float16 and bfloat16 can be read too)"
            )


def damaged(file_name: str, kind: str, error: Exception) -> UserError:
    reason = printable(" ".join(str(error).split())[:200]) or type(error).__name__
    return UserError(f"{file_name} is damaged, not a valid {kind} file ({reason}): copy or download it again")


# safetensors


def open_safetensors(path: Path, file_name: str, stack: ExitStack) -> Container:
    with path.open("rb") as raw:
        (length,) = struct.unpack("<Q", raw.read(8))
        if length > MAX_HEADER:
            raise UserError(
                f"{file_name}: a safetensors header of {length:,} bytes, where {MAX_HEADER:,} is the limit: not a "
                "Mixer's weights, or a damaged file; download it again"
            )
        header = raw.read(length)
    if header.rstrip(b" ")[-1:] != b"}":  # only spaces may pad it
        raise ValueError("its header does not end with a brace")
    file: Any = stack.enter_context(safe_open(path, framework="pt"))
    names = list(file.keys())
    check_count(len(names), file_name)
    infos = {}
    for name in names:
        tensor = file.get_slice(name)
        kind = tensor.get_dtype()
        infos[name] = TensorInfo(tuple(tensor.get_shape()), FLOATS.get(kind), kind)
    return Container("safetensors", path, infos, file.get_tensor, file.metadata() or {})


# NumPy's .npz


def members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    return [member for member in archive.infolist() if not member.is_dir()]


def is_torch_zip(path: Path, file_name: str) -> bool:
    """Whether a zip was written by torch, not by NumPy; a UserError if it is broken or would expand too much."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = members(archive)
    except READ_ERRORS as error:
        raise damaged(file_name, "weights", error) from None
    total, size = sum(member.file_size for member in inside), path.stat().st_size
    if total > max(MAX_EXPANSION * size, ALWAYS_ALLOWED_SIZE):
        raise UserError(
            f"{file_name}: {size:,} bytes that would inflate to {total:,}: weights do not compress that well, so this "
            "is refused; get the file from its authors"
        )
    names = {member.filename.rpartition("/")[2] for member in inside}
    if TORCHSCRIPT in names:
        raise UserError(f"{file_name} is a TorchScript archive, which holds a program: save model.state_dict() instead")
    return "data.pkl" in names


def open_npz(path: Path, file_name: str, stack: ExitStack) -> Container:
    archive = stack.enter_context(zipfile.ZipFile(path))
    inside = members(archive)
    check_count(len(inside), file_name)
    infos: dict[str, TensorInfo] = {}
    for member in inside:
        name = member.filename.removesuffix(".npy")
        if name == member.filename:
            raise UserError(
                f"{file_name} is a zip that contains {printable(name)!r}, which is not an array: give a Mixer's .npz "
                "or .pth"
            )
        if name in infos:
            raise UserError(f"{file_name} contains {printable(name)!r} twice: save or download it again")
        with archive.open(member) as file:
            infos[name] = npy_info(file, member.file_size, file_name, name)

    def read(name: str) -> Tensor:
        try:
            with archive.open(f"{name}.npy") as file:
                return read_npy(file, infos[name])
        except READ_ERRORS as error:
            raise damaged(file_name, ".npz", error) from None

    return Container("npz", path, infos, read)


def npy_info(file: Any, size: int, file_name: str, name: str) -> TensorInfo:
    """Shape and type from the header of a .npy member, checked against its size in the zip's directory."""
    try:
        shape, fortran_order, dtype = npy_header(file)
    except READ_ERRORS as error:
        raise ValueError(f"{name!r} has no valid header: {error}") from None
    if dtype.hasobject:
        raise UserError(
            f"{file_name}: {printable(name)!r} holds pickled Python objects, which can run code, so it is refused: "
            "where you trust its author, save its numbers again as plain arrays"
        )
    if fortran_order and len(shape) > 1:
        raise UserError(
            f"{file_name}: {printable(name)!r} is in Fortran order: save it again with numpy.ascontiguousarray"
        )
    expected, actual = math.prod(shape) * dtype.itemsize, size - file.tell()
    if expected != actual:
        raise UserError(
            f"{file_name}: {printable(name)!r} has the shape {shape}, which takes {expected:,} bytes, but {actual:,} "
            "are stored: a damaged file; download it again"
        )
    kind = "|V2" if dtype.kind == "V" and dtype.itemsize == 2 else dtype.str
    return TensorInfo(shape, FLOATS.get(kind), kind)


def npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return readers[version](file, max_header_size=10_000)


def read_npy(file: Any, info: TensorInfo) -> Tensor:
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


def open_torch(path: Path, file_name: str, stack: ExitStack) -> Container:
    """Uses the restricted unpickler only, which builds tensors, plain containers and what is listed as harmless."""
    misnamed = path.suffix == ".safetensors"  # given the path, torch.load would read it as safetensors
    source: Any = stack.enter_context(path.open("rb")) if misnamed else path
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of deprecated storage types
            mapped = not misnamed and zipfile.is_zipfile(path)
            with torch.serialization.safe_globals(HARMLESS):
                stored = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if "operand" in str(error):  # not a pickle, or a damaged one
            raise ValueError("its pickle is broken") from None
        match = re.search(r"global:? (?:GLOBAL )?(\S+)", str(error), re.IGNORECASE)
        refused = f" ({printable(match[1])})" if match else ""
        raise UserError(
            f"{file_name} contains Python objects other than tensors{refused}, which can run code, so it is refused: "
            "where you trust its author, load it with torch and save its state_dict() alone"
        ) from None
    tensors, ignored = extract_state_dict(stored, file_name)
    check_count(len(tensors), file_name)
    infos = {}
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.device.type == "meta":
            raise UserError(
                f"{file_name}: {printable(name)!r} is sparse, nested or on the meta device: save it as a dense tensor"
            )
        kind = str(tensor.dtype).removeprefix("torch.")
        infos[name] = TensorInfo(tuple(tensor.shape), tensor.dtype if tensor.dtype in FLOATS.values() else None, kind)
    expected, actual = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()), path.stat().st_size
    if expected > actual:  # strides of zero, or one storage for several tensors
        raise UserError(
            f"{file_name}: its tensors take {expected:,} bytes, but only {actual:,} are stored: save each tensor with "
            "its own storage (tensor.clone())"
        )
    return Container("torch", path, infos, tensors.__getitem__, ignored=ignored)


def extract_state_dict(stored: Any, file_name: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a state dict, bare or inside a training checkpoint, and the names of the checkpoint's other parts.

    If a checkpoint has averaged weights (EMA) as well, those are taken, as timm does.
    """
    ignored: list[str] = []
    wrappers = (
        *("state_dict_ema", "ema_state_dict", "model_ema", "params_ema", "ema"),
        *("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params"),
    )
    for _ in range(MAX_WRAPPERS):
        inner = next((key for key in wrappers if isinstance(stored, dict) and isinstance(stored.get(key), dict)), None)
        if inner is None:
            break
        ignored += [str(key) for key in stored if key != inner]
        stored = stored[inner]
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise UserError(
            f"{file_name} contains an object of type {type(stored).__name__}, not a state dict of tensors: save "
            "model.state_dict() alone"
        )
    return {str(key): tensor.detach() for key, tensor in stored.items()}, tuple(ignored)
