"""``python windows.py WORDS -- WORDS …``: runs ``mixer`` commands as on Windows, as far as Linux can pretend to be it.

What only POSIX has is gone, folders cannot be opened, and a file that this process has open or mapped can be neither
removed nor replaced. Libraries are imported before, since they would look for Windows itself.
"""

import importlib
import os
import shutil
import signal
import stat
import sys
import types
from fcntl import F_GETFL, LOCK_EX, LOCK_NB, LOCK_SH, fcntl, lockf
from pathlib import Path
from typing import Any

LIBRARIES = (
    "matplotlib.pyplot", "sklearn.datasets", "torch.distributed.checkpoint", "torch.utils.data",
    "torch.utils.tensorboard", "torch._dynamo", "torch._inductor", "rich.console", "tyro", "jinja2",
)  # fmt: skip
POSIX_MODULES = ("fcntl", "grp", "pwd", "resource", "termios")
POSIX_FUNCTIONS = (
    "fchmod", "fork", "geteuid", "getloadavg", "getuid", "killpg", "mkfifo", "posix_fadvise", "pread", "pwrite",
    "register_at_fork", "sched_getaffinity", "set_blocking", "setsid", "statvfs", "sync", "sysconf", "uname",
)  # fmt: skip
POSIX_SIGNALS = ("SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "alarm", "setitimer")


def read_only(handle: int) -> bool:
    return fcntl(handle, F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def in_use(path: str) -> bool:
    handles = {os.path.realpath(handle) for handle in Path("/proc/self/fd").iterdir()}
    mapped = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    return any(name == path or name.startswith(f"{path}/") for name in handles | mapped)


def refuse_what_is_in_use(name: str) -> None:
    real = getattr(os, name)

    def call(*paths: Any, **options: Any) -> None:
        for path in paths:
            if in_use(os.path.realpath(path)):
                raise PermissionError(13, "the file is open", path)
        real(*paths, **options)

    setattr(os, name, call)


def lock(handle: int, mode: int, size: int) -> None:
    try:
        lockf(handle, (LOCK_SH if read_only(handle) else LOCK_EX) | LOCK_NB)
    except OSError:
        raise PermissionError(13, "Permission denied") from None


def open_file(path: Any, *arguments: Any, real: Any = os.open, **options: Any) -> int:
    if Path(path).is_dir():
        raise PermissionError(13, "Permission denied", path)
    return real(path, *arguments, **options)


def fsync(handle: int, real: Any = os.fsync) -> None:
    if read_only(handle) or stat.S_ISDIR(os.fstat(handle).st_mode):
        raise OSError(9, "Bad file descriptor")
    real(handle)


def pretend() -> None:
    for library in LIBRARIES:
        importlib.import_module(library)
    sys.modules |= dict.fromkeys(POSIX_MODULES)
    sys.modules["msvcrt"] = types.ModuleType("msvcrt")
    sys.modules["msvcrt"].__dict__.update(LK_NBLCK=2, locking=lock)
    for name in POSIX_FUNCTIONS:
        delattr(os, name)
    for name in POSIX_SIGNALS:
        delattr(signal, name)
    for name in ("remove", "rename", "replace", "rmdir", "unlink"):
        refuse_what_is_in_use(name)
    os.open, os.fsync = open_file, fsync
    shutil._use_fd_functions = False
    sys.platform = "win32"


if __name__ == "__main__":
    pretend()
    from allmlp.cli import main

    words = sys.argv[1:]
    while words:
        end = words.index("--") if "--" in words else len(words)
        sys.argv = ["mixer", *words[:end]]
        if status := main():
            sys.exit(status)
        words = words[end + 1 :]
