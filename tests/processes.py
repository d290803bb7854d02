"""Another process that holds a run's lock, and a thread without root's privileges."""

import contextlib
import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from allmlp.runs.folder import LOCK

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Within the block, file permissions apply to this thread even if it is root's."""
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    before = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
    assert libc.capget(header, before) == 0
    none = (ctypes.c_uint32 * 6)(*before)
    none[0] = none[3] = 0
    assert libc.capset(header, none) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


PROGRAM = """
import fcntl, sys
with open(sys.argv[1], "a") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def locked_by_another_process(out: Path) -> Iterator[subprocess.Popen[str]]:
    """Within the block, a process holds the run's lock, as if it trained the run; it ends when its stdin is closed."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, out / LOCK], stdin=pipe, stdout=pipe, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.communicate()
