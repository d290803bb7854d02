"""The key that signs a user's checkpoints: created once, atomically, readable by its owner alone; runs work without."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from processes import LINUX, without_privileges

from allmlp.checkpointing.signing import key, key_file, signature, written_by_this_user


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder without a key."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def test_the_key_is_created_once_and_readable_by_its_owner_alone(home: Path) -> None:
    assert key_file() == home / "allmlp" / "key"
    first = key()
    assert first is not None
    assert len(first) == 32
    assert key() == first == key_file().read_bytes()
    assert stat.S_IMODE(key_file().stat().st_mode) == 0o600
    assert stat.S_IMODE(key_file().parent.stat().st_mode) == 0o700
    assert [path.name for path in key_file().parent.iterdir()] == ["key"]


def test_each_user_has_a_different_key(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, signed = key(), signature("a manifest")
    assert written_by_this_user("a manifest", signed)
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "other"))
    assert key() != mine
    assert not written_by_this_user("a manifest", signed)


def test_without_the_variable_the_key_is_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in (None, ""):
        monkeypatch.delenv("XDG_STATE_HOME", raising=False)
        if value is not None:
            monkeypatch.setenv("XDG_STATE_HOME", value)
        assert key_file() == tmp_path / ".local" / "state" / "allmlp" / "key"


def test_a_signature_depends_on_every_character() -> None:
    text = '{"format": 1, "files": {}}'
    signed = signature(text)
    assert signed is not None
    assert signature(text) == signed
    assert written_by_this_user(text, signed)
    for i in range(len(text)):
        assert not written_by_this_user(text[:i] + "x" + text[i + 1 :], signed)
    for i in range(len(signed)):
        other = signed[:i] + ("0" if signed[i] != "0" else "1") + signed[i + 1 :]
        assert not written_by_this_user(text, other)
    assert not written_by_this_user(text, signed[:-1])
    assert not written_by_this_user(text, "")
    assert not written_by_this_user(text, None)


@pytest.mark.parametrize("signed", ["Schlüssel", 5, ["a"], {}])
def test_a_malformed_signature_is_rejected(signed: object) -> None:
    assert not written_by_this_user("a manifest", signed)  # pyright: ignore[reportArgumentType]


# Without a folder for the key


def assert_unsigned() -> None:
    assert key() is None
    assert signature("a manifest") is None
    assert not written_by_this_user("a manifest", None)
    assert not written_by_this_user("a manifest", "0" * 64)


def test_a_file_in_place_of_the_state_folder(home: Path) -> None:
    home.write_text("a file where a folder should be")
    assert_unsigned()
    assert home.read_text() == "a file where a folder should be"


@LINUX
def test_a_state_folder_without_write_permission(home: Path) -> None:
    home.mkdir(mode=0o555)
    with without_privileges():
        assert_unsigned()
    assert list(home.iterdir()) == []


@LINUX
def test_a_key_without_read_permission_is_not_replaced(home: Path) -> None:
    mine = key()
    key_file().chmod(0)
    with without_privileges():
        assert_unsigned()
    key_file().chmod(0o600)
    assert key() == mine


def test_a_user_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a user ID without an account."""
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


def test_an_empty_key_is_replaced() -> None:
    key_file().parent.mkdir(parents=True)
    key_file().touch()  # a power failure can leave an empty file
    mine = key()
    assert mine is not None
    assert len(mine) == 32


def test_the_key_is_synced_before_it_signs_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a synced checkpoint could survive a power failure without its key, and be rejected."""
    synced = []
    fsync = os.fsync

    def recording_fsync(handle: int) -> None:
        synced.append(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    assert key() is not None
    assert key_file().stat().st_ino in synced


PROGRAM = """
import sys
from allmlp.checkpointing.signing import key
sys.stdin.read()
print(key().hex())
"""


def test_processes_that_start_together_share_one_key() -> None:
    pipe = subprocess.PIPE
    started = [subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=pipe, stdout=pipe, text=True) for _ in range(4)]
    for process in started:
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
    found = {process.communicate()[0] for process in started}
    assert found == {key_file().read_bytes().hex() + "\n"}
    assert [path.name for path in key_file().parent.iterdir()] == ["key"]
