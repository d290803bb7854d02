"""Where and in which precision to compute, from the words a user gives."""

import contextlib
from typing import Literal

import torch

from allmlp.errors import UserError

Precision = Literal["auto", "float32", "bfloat16", "float16"]


def select_device(name: str) -> torch.device:
    """ "auto" is the first CUDA device, else Apple's, else the CPU; a UserError for one that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is not one: use auto, cpu, cuda, cuda:1 or mps") from None
    available = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }.get(device.type, 0)
    if (device.index or 0) >= available:
        raise UserError(
            f"device {name!r} is not on this machine, which has {available} of that kind: use --device auto"
        )
    return device


def select_precision(name: Precision, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the hardware multiplies it (AVX512-BF16, AMX, recent GPUs), else float32."""
    if name == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def autocast(device: torch.device, precision: torch.dtype) -> contextlib.AbstractContextManager:
    """As torch.autocast: the matrix products in the given precision, and with them the tokens between the blocks.

    The loss is for the caller to compute in float32. Nothing changes for float32.
    """
    if precision == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=precision)
