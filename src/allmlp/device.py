"""The device and precision to compute with, from the names that a user gives."""

import contextlib
from typing import Literal

import torch

from allmlp.errors import UserError

Precision = Literal["auto", "float32", "bfloat16", "float16"]


def select_device(name: str) -> torch.device:
    """The device for a name such as "cpu", "cuda", "cuda:1" or "mps"; "auto" takes CUDA, else MPS, else the CPU.

    Raises:
        UserError: an unknown name, or a device that this machine does not have.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}: use auto, cpu, cuda, cuda:1 or mps") from None
    available = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }.get(device.type, 0)
    if (device.index or 0) >= available:
        raise UserError(
            f"device {name!r} is not available, this machine has {available} of type {device.type}: use --device auto"
        )
    return device


def select_precision(name: Precision, device: torch.device) -> torch.dtype:
    """The dtype for a name; "auto" is bfloat16 where the hardware computes in it (AVX512-BF16, AMX, recent GPUs)."""
    if name == "auto":
        return torch.bfloat16 if has_bfloat16_hardware(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def has_bfloat16_hardware(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices natively, not by emulation."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def autocast(device: torch.device, precision: torch.dtype) -> contextlib.AbstractContextManager:
    """``torch.autocast`` for a precision below float32; for float32, a context that does nothing.

    Under autocast the tokens between blocks have the lower precision too; compute the loss in float32.
    """
    if precision == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=precision)
