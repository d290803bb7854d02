"""The key that signs a user's own checkpoints: made once, whole, for its owner alone, and no run fails without it."""

import contextlib
import ctypes
import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from allmlp.checkpointing.trust import key, key_file, signature, written_here

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Within the block this thread, root's too, is held to the permissions of files."""
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    held = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
    assert libc.capget(header, held) == 0
    none = (ctypes.c_uint32 * 6)(*held)
    none[0] = none[3] = 0
    assert libc.capset(header, none) == 0
    try:
        yield
    finally:
        assert libc.capset(header, held) == 0


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No key is there yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def test_the_key_is_made_once_for_its_owner_alone(home: Path) -> None:
    assert key_file() == home / "allmlp" / "key"
    first = key()
    assert first is not None
    assert len(first) == 32
    assert key() == first == key_file().read_bytes()
    assert stat.S_IMODE(key_file().stat().st_mode) == 0o600
    assert stat.S_IMODE(key_file().parent.stat().st_mode) == 0o700
    assert [path.name for path in key_file().parent.iterdir()] == ["key"]


def test_each_user_has_another(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, signed = key(), signature("a manifest")
    assert written_here("a manifest", signed)
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "other"))
    assert key() != mine
    assert not written_here("a manifest", signed)


def test_without_the_variable_it_is_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for told in (None, ""):
        monkeypatch.delenv("XDG_STATE_HOME", raising=False)
        if told is not None:
            monkeypatch.setenv("XDG_STATE_HOME", told)
        assert key_file() == tmp_path / ".local" / "state" / "allmlp" / "key"


def test_a_signature_is_of_every_character() -> None:
    text = '{"format": 1, "files": {}}'
    signed = signature(text)
    assert signed is not None
    assert signature(text) == signed
    assert written_here(text, signed)
    for i in range(len(text)):
        assert not written_here(text[:i] + "x" + text[i + 1 :], signed)
    for i in range(len(signed)):
        other = signed[:i] + ("0" if signed[i] != "0" else "1") + signed[i + 1 :]
        assert not written_here(text, other)
    assert not written_here(text, signed[:-1])
    assert not written_here(text, "")
    assert not written_here(text, None)


@pytest.mark.parametrize("signed", ["Schlüssel", 5, ["a"], {}])
def test_a_signature_that_is_none_is_not_ours(signed: object) -> None:
    assert not written_here("a manifest", signed)  # pyright: ignore[reportArgumentType]


# where there is no place for a key


def assert_unsigned() -> None:
    assert key() is None
    assert signature("a manifest") is None
    assert not written_here("a manifest", None)
    assert not written_here("a manifest", "0" * 64)


def test_no_place_for_the_key(home: Path) -> None:
    home.write_text("a file where a folder should be")
    assert_unsigned()
    assert home.read_text() == "a file where a folder should be"


@LINUX
def test_a_folder_that_may_not_be_written(home: Path) -> None:
    home.mkdir(mode=0o555)
    with without_privileges():
        assert_unsigned()
    assert list(home.iterdir()) == []


@LINUX
def test_a_key_that_may_not_be_read_is_left_alone(home: Path) -> None:
    mine = key()
    key_file().chmod(0)
    with without_privileges():
        assert_unsigned()
    key_file().chmod(0o600)
    assert key() == mine


def test_a_user_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number nobody has given a name."""
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_123_456)
    assert_unsigned()


def test_a_file_system_without_hard_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*words: object, **options: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    mine = key()
    assert mine is not None
    assert len(mine) == 32
    assert key() == mine
    assert [path.name for path in key_file().parent.iterdir()] == ["key"]
    assert stat.S_IMODE(key_file().stat().st_mode) == 0o600


def test_an_empty_key_is_made_anew() -> None:
    key_file().parent.mkdir(parents=True)
    key_file().touch()  # of a machine that lost its power
    mine = key()
    assert mine is not None
    assert len(mine) == 32


def test_the_key_is_on_the_disk_before_what_it_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a synced checkpoint may outlive it, and be refused as a stranger's."""
    synced = []
    fsync = os.fsync

    def noted(handle: int) -> None:
        synced.append(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    assert key() is not None
    assert key_file().stat().st_ino in synced


PROGRAM = """
import sys
from allmlp.checkpointing.trust import key
sys.stdin.read()
print(key().hex())
"""


def test_processes_that_begin_together_have_one_key() -> None:
    pipe = subprocess.PIPE
    started = [subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=pipe, stdout=pipe, text=True) for _ in range(4)]
    for process in started:
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
    found = {process.communicate()[0] for process in started}
    assert found == {key_file().read_bytes().hex() + "\n"}
    assert [path.name for path in key_file().parent.iterdir()] == ["key"]
