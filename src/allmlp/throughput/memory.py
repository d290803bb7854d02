"""How much memory there is, and how much a computation takes."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, MEMORY, CLEAR = Path("/proc/self/status"), Path("/proc/meminfo"), Path("/proc/self/clear_refs")
CGROUP = Path("/sys/fs/cgroup")


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a GPU, or by this process on a CPU; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu" or sys.platform == "win32":
        return None
    limits = [field(MEMORY, "MemAvailable"), room_in_cgroup(), *room_in_limits()]
    known = [limit for limit in limits if limit is not None]
    return max(min(known), 0) if known else None


def room_in_cgroup() -> int | None:
    """Bytes left in this container's limit of memory."""
    with contextlib.suppress(OSError, ValueError):
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        cached = field(CGROUP / "memory.stat", "inactive_file") or 0  # of files, given up when memory is needed
        return None if limit == "max" else int(limit) - used + cached
    return None


def room_in_limits() -> list[int | None]:
    """Bytes left in this process's limits of address space and data (ulimit -v, -d)."""
    import resource  # which Windows does not have

    rooms: list[int | None] = []
    for kind, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit, now = resource.getrlimit(kind)[0], field(STATUS, used)
        rooms.append(limit - now if limit != resource.RLIM_INFINITY and now is not None else None)
    return rooms


def field(path: Path, name: str) -> int | None:
    """A number of bytes in one of Linux's files of "Name: 123 kB" lines; None where there is none."""
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            words = line.replace(":", " ").split()
            if words[0] == name:
                return int(words[1]) * (1024 if words[-1] == "kB" else 1)
    return None


def peak_growth(call: Callable[[], None], device: torch.device) -> int | None:
    """The memory that a call takes at its peak beyond what was in use before, in bytes.

    On a GPU as its allocator counts; on Linux by the process's resident memory, which leaves out memory that was freed
    before and used again. None where that is not known.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    resets = False
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")  # resets the peak of resident memory (VmHWM)
        resets = True
    before = field(STATUS, "VmRSS")
    call()
    peak = field(STATUS, "VmHWM")
    return max(peak - before, 0) if resets and before is not None and peak is not None else None
