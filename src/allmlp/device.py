"""The device and precision to compute with, from the names that a user gives; and a device's failures, in one line."""

import contextlib
import math
import os
import re
import threading
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from allmlp.errors import RunError, UserError, brief

Precision = Literal["auto", "float32", "bfloat16", "float16"]

OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|ALLOC_FAILED|bad_alloc", re.IGNORECASE
)
DEVICE_FAILURE = re.compile(
    r"\b(CUDA|cuDNN|CUDNN|cuBLAS|CUBLAS|NCCL|HIP|MPS|Triton)\b.*\b(error|failed|failure)\b|_STATUS_"
)


def available_cores() -> int:
    """CPU cores that this process may use: of the machine, by its affinity, and by the quota of its container."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(math.ceil(min(cores, cpu_quota(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")))), 1)


def cpu_quota(root: Path, membership: Path) -> float:
    """The smallest number of cores that a control group of this process, or one around it, may use; inf without."""
    quota = math.inf
    try:
        groups = [line.split(":", 2)[2].strip("/") for line in membership.read_text().splitlines()]
    except (OSError, IndexError):
        return quota
    paths = {path for group in groups for path in (Path(group), *Path(group).parents)} | {Path()}
    for folder in (base / path for base in (root, root / "cpu", root / "cpu,cpuacct") for path in paths):
        with contextlib.suppress(OSError, ValueError):  # version 2: "200000 100000" or "max 100000"
            allowed, period = (folder / "cpu.max").read_text().split()
            quota = min(quota, int(allowed) / int(period))
        with contextlib.suppress(OSError, ValueError):  # version 1: -1 is no limit
            allowed, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            quota = min(quota, int(allowed) / int(period) if int(allowed) > 0 else math.inf)
    return quota


def select_device(name: str | torch.device, local_rank: int = 0, processes: int = 1) -> torch.device:
    """The device for a name, after a first computation on it: see ``choose_device``.

    Raises:
        UserError: an unknown name, or a device that this machine does not have.
        RunError: the device does not work (a driver that does not fit, memory that other processes fill).
    """
    device = choose_device(name, local_rank, processes)
    if device.type == "cpu":
        return device
    try:
        torch.zeros(1, device=device).add_(1).tolist()
    except (RuntimeError, AssertionError) as error:
        message = f"device {str(name)!r} does not work ({first_line(error)}): use --device cpu, or repair or free it"
        raise RunError(message) from error
    return device


def choose_device(name: str | torch.device, local_rank: int = 0, processes: int = 1) -> torch.device:
    """The device for a name such as "cpu", "cuda", "cuda:1" or "mps"; "auto" takes CUDA, else MPS, else the CPU.

    A GPU has its number, so that nothing depends on the current device. Several processes have one GPU each.

    Args:
        name: of the device.
        local_rank: number of this process among those of its machine.
        processes: that train together, on all machines.

    Raises:
        UserError: an unknown name, a device that this machine does not have, or too few GPUs for the processes.
    """
    if not isinstance(name, str | torch.device):
        raise UserError(f"unknown device {brief(name)}: use auto, cpu, cuda, cuda:1 or mps")
    name = str(name)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        mps = processes == 1 and torch.backends.mps.is_available()
        name = "cuda" if gpus else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}: use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and not gpus:
        raise UserError(f"device {name!r} is not available ({why_no_gpu()}): use --device auto")
    if processes > 1:
        return device_of_rank(device, local_rank, gpus)
    available = {"cpu": 1, "cuda": gpus, "mps": int(torch.backends.mps.is_available())}.get(device.type, 0)
    if (device.index or 0) >= available:
        raise UserError(
            f"device {name!r} is not available, this machine has {available} of type {device.type}: use --device auto"
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0)
    return device


def device_of_rank(device: torch.device, local_rank: int, gpus: int) -> torch.device:
    """The device of one of several processes: the CPU, or the GPU with the number of its local rank."""
    if device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise UserError(f"--device {device} cannot be shared by several processes: use --device cuda or cpu")
    if local_rank >= gpus:
        raise UserError(
            f"process {local_rank + 1} on this machine has no GPU, there are {gpus} (each process needs one): "
            f"use --processes {gpus}, or --device cpu"
        )
    return torch.device("cuda", local_rank)


def why_no_gpu() -> str:
    """Why CUDA finds no GPU."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"CUDA_VISIBLE_DEVICES={visible!r} leaves none of this machine's GPUs"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # no driver, or one too old
        return first_line(error)
    return "no GPU found"


def select_precision(name: Precision, device: torch.device) -> torch.dtype:
    """The dtype for a name; "auto" is bfloat16 where the hardware computes in it (AVX512-BF16, AMX, recent GPUs).

    Raises:
        UserError: an unknown name, or bfloat16 on a GPU that does not compute in it.
    """
    if name not in typing.get_args(Precision):
        raise UserError(f"precision {brief(name)}: use one of {', '.join(typing.get_args(Precision))}")
    if name == "auto":
        return torch.bfloat16 if has_bfloat16_hardware(device) else torch.float32
    if name == "bfloat16" and device.type != "cpu" and not computes_bfloat16(device):
        raise UserError(f"device {str(device)!r} does not compute in bfloat16: use --precision float16 or float32")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def has_bfloat16_hardware(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices natively, not by emulation."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" and computes_bfloat16(device)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether this GPU computes in bfloat16. (``torch.cuda.is_bf16_supported`` answers for the current GPU.)"""
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def autocast(device: torch.device, precision: torch.dtype) -> contextlib.AbstractContextManager:
    """``torch.autocast`` for a precision below float32; for float32, ``exact_float32``.

    Under autocast the tokens between blocks have the lower precision too; compute the loss in float32.
    """
    if precision == torch.float32:
        return exact_float32()
    return torch.autocast(device.type, dtype=precision)


_float32_lock = threading.Lock()
_float32_blocks = 0  # that are being executed, by any thread
_float32_before = ("none", "highest")  # precision of convolutions and of matrix products, outside of these blocks


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Within the block, float32 convolutions and matrix products on GPUs are computed in float32, not in TF32.

    By default PyTorch computes convolutions, such as the stem, in TF32, with 10 bits after the point in place of 23;
    NVIDIA's containers do so for matrix products too. The settings are those of the process: they change with the first
    thread that enters such a block and are restored by the last one that leaves.
    """
    global _float32_blocks, _float32_before
    convolutions: Any = torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue]
    on_cpu: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    products: Any = torch.backends.cuda.matmul
    with _float32_lock:
        _float32_blocks += 1
        if _float32_blocks == 1:
            tf32 = "medium" if on_cpu.fp32_precision == "bf16" else "high"
            _float32_before = convolutions.fp32_precision, tf32 if products.fp32_precision == "tf32" else "highest"
            convolutions.fp32_precision = "ieee"
            if _float32_before[1] != "highest":
                torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        with _float32_lock:
            _float32_blocks -= 1
            if _float32_blocks == 0:
                convolutions.fp32_precision = _float32_before[0]
                if _float32_before[1] != "highest":
                    torch.set_float32_matmul_precision(_float32_before[1])


@contextlib.contextmanager
def current_device(device: torch.device) -> Iterator[None]:
    """Within the block, a GPU is this thread's current one, which pinned memory and libraries' defaults refer to."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def device_errors(what: str, remedy: str) -> Iterator[None]:
    """Turns running out of memory, and other failures of a device, into a RunError.

    Args:
        what: does not fit into memory then, in the plural ("32 images at a time").
        remedy: against running out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise RunError(f"{what} do not fit into memory: {remedy}") from error
        if is_device_failure(error):
            raise RunError(describe_failure(error)) from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, RunError):  # says already what happened
        return False
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


def is_device_failure(error: BaseException) -> bool:
    """Whether the error comes from a GPU, its driver or its libraries."""
    if not isinstance(error, RuntimeError) or isinstance(error, RunError):
        return False
    return isinstance(error, torch.AcceleratorError) or bool(DEVICE_FAILURE.search(first_line(error)))


def describe_failure(error: BaseException) -> str:
    """The failure of a device and what to do, in one line."""
    if is_out_of_memory(error):
        return f"out of memory ({first_line(error)}): use smaller batches, or free some memory"
    return f"the device failed ({first_line(error)}): try again, and --device cpu if it fails again"


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
