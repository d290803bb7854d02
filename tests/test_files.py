"""Atomic writes."""

import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from allmlp.files import atomic_write, sync_folder, write_text


@pytest.fixture
def umask() -> Iterator[None]:
    """Restores the process's file mode creation mask."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


def test_the_new_file_replaces_the_old(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path) as temporary:
        assert temporary.parent == tmp_path  # on the same file system, so that renaming is atomic
        assert temporary != path
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("existing", [True, False])
def test_any_exception_leaves_the_old_file(tmp_path: Path, error: type[BaseException], existing: bool) -> None:
    path = tmp_path / "a.txt"
    if existing:
        path.write_text("old")

    def fail() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        fail()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == ({"a.txt": "old"} if existing else {})


def test_a_failed_sync_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        write_text(tmp_path / "a.txt", "new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.txt": "old"}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(_handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    write_text(tmp_path / "a.txt", "new")
    sync_folder(tmp_path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.txt": "new"}


def test_an_error_names_the_file_that_was_to_be_written(tmp_path: Path) -> None:
    write_text(tmp_path / ("a" * 250), "as long as a name may be")
    for path, number in ((tmp_path / "gone" / "a.txt", errno.ENOENT), (tmp_path / ("a" * 260), errno.ENAMETOOLONG)):
        with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught:
            write_text(path, "x")
        assert (caught.value.errno, caught.value.filename) == (number, str(path))


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_any_new_file(tmp_path: Path, umask: None, mask: int, mode: int) -> None:
    os.umask(mask)
    write_text(tmp_path / "a.txt", "x")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == mode
    assert os.umask(mask) == mask  # reading the mask did not change it


def test_the_file_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync, replace = os.fsync, Path.replace

    def synced(handle: int) -> None:
        calls.append(("fsync", os.fstat(handle).st_ino, os.fstat(handle).st_size))
        fsync(handle)

    def replaced(self: Path, target: Path) -> Path:
        calls.append(("replace", self.stat().st_ino, self.stat().st_size))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write_text(tmp_path / "a.txt", "four")
    inode = (tmp_path / "a.txt").stat().st_ino
    assert calls[:2] == [("fsync", inode, 4), ("replace", inode, 4)]


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "σ −1\n")
    assert (tmp_path / "a.txt").read_bytes() == "σ −1\n".encode()
