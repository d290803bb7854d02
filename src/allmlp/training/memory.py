"""Memory of a training run: recomputed activations, the allocator's settings, peak usage, out-of-memory errors."""

import contextlib
import ctypes
import functools
import platform
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from allmlp.device import device_errors
from allmlp.factory import Model

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def recompute_blocks(model: Model) -> None:
    """Makes each block keep only its input for the backward pass, and compute the rest again there.

    A step takes about a third longer and needs the memory of one block's activations instead of all (Chen et al. 2016).
    The random masks of dropout and stochastic depth are the same both times.
    """
    for block in model.blocks:
        norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
        contexts = {"context_fn": functools.partial(recomputation, norms)} if norms else {}
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **contexts)


def recomputation(norms: list[nn.BatchNorm2d]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of a block's forward pass and of its recomputation."""
    return contextlib.nullcontext(), frozen_statistics(norms)


@contextlib.contextmanager
def frozen_statistics(norms: list[nn.BatchNorm2d]) -> Iterator[None]:
    """Within the block, batch normalization leaves its running statistics: they have counted this batch already."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for this process; other C libraries: no effect.

    By default glibc returns every freed block of 32 MB or more to the system at once. B/16's activations at batch 32
    are such blocks: each step then page-faults 1.3 GB of fresh memory, and took a seventh longer on two cores.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, -1)  # never


def peak_memory(device: torch.device) -> int | None:
    """The most memory used so far, in bytes: by the device's allocator on a GPU, by the whole process on a CPU.

    None for the process on Windows, where Python's standard library does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_errors(micro_batch_size: int) -> AbstractContextManager[None]:
    """Turns running out of memory into a RunError that says what to do."""
    return device_errors(
        f"{micro_batch_size} images at a time",
        f"give --micro-batch-size {max(micro_batch_size // 2, 1)} or less (gradients are accumulated to the same "
        "result), or --recompute",
    )
