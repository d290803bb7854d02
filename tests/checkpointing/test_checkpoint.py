"""A checkpoint exists complete or not at all, and every change to it is detected."""

import errno
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import LINUX, without_privileges
from torch import Tensor

from allmlp.checkpointing import checkpoint
from allmlp.checkpointing.checkpoint import (
    MANIFEST,
    STATE,
    DamagedCheckpoint,
    manifest_text,
    read_tensors,
    verify_checkpoint,
    with_digest,
    write_checkpoint,
)
from allmlp.distributed.context import SINGLE_PROCESS
from allmlp.errors import RunError, UserError

STATE_OF_4 = {"step": 4, "loss": 0.1 + 0.2, "best": [2, 0.75], "classes": ["ä", "b\udc80"], "unreadable": {}}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """Tensors of every dtype and of many shapes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(), (1,), (7,), (3, 5), (2, 3, 4)]
    values = {(s, d): torch.randn(s, generator=generator, dtype=torch.float64) * 9 for s in shapes for d in DTYPES}
    return {f"model.{dtype}.{shape}": value.to(dtype) for (shape, dtype), value in values.items()}


def zeros_like(like: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in like.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An intact checkpoint."""
    path = tmp_path / "checkpoints" / "step-00000004"
    path.parent.mkdir(exist_ok=True)
    write_checkpoint(path, tensors(), STATE_OF_4, SINGLE_PROCESS)
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_intact(folder: Path, seed: int = 0) -> None:
    verify_checkpoint(folder)
    found = zeros_like(tensors())
    read_tensors(folder, found, SINGLE_PROCESS)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(seed).items())


def test_state_and_tensors_are_read_back_bit_for_bit(folder: Path) -> None:
    assert verify_checkpoint(folder) == STATE_OF_4
    assert_intact(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["step-00000004"]


def test_nan_and_infinity_become_null_in_the_state(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path / "c", tensors(), {"step": 1, "loss": float("nan"), "best": [1, float("inf")]}, SINGLE_PROCESS
    )
    assert verify_checkpoint(tmp_path / "c") == {"step": 1, "loss": None, "best": [1, None]}


def test_the_manifest_names_every_other_file(folder: Path) -> None:
    stored = json.loads((folder / MANIFEST).read_text())
    assert {*stored["files"], MANIFEST} == files(folder).keys() >= {STATE, ".metadata"}
    assert {name: file["bytes"] for name, file in stored["files"].items()} == {
        name: len(content) for name, content in files(folder).items() if name != MANIFEST
    }


def test_writing_replaces_an_older_checkpoint_and_the_leftovers_of_a_killed_run(folder: Path) -> None:
    for ending in ("partial", "replaced"):
        leftover = folder.with_name(f".{folder.name}.{ending}")
        leftover.mkdir()
        (leftover / "__0_0.distcp").write_bytes(b"of a run that was killed")
        (leftover / "__0_77.distcp").write_bytes(b"of a run that was killed")
    write_checkpoint(folder, tensors(1), {"step": 4, "attempt": 2}, SINGLE_PROCESS)
    assert verify_checkpoint(folder) == {"step": 4, "attempt": 2}
    assert_intact(folder, 1)
    assert "__0_77.distcp" not in files(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_all_files_are_synced_before_the_folder_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []  # inodes that were synced, and names that were given
    fsync, rename = os.fsync, Path.rename

    def recording_fsync(handle: Any) -> None:
        events.append(os.fstat(handle if isinstance(handle, int) else handle.fileno()).st_ino)
        fsync(handle)

    def recording_rename(self: Path, target: Path) -> Path:
        events.append(target.name)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "rename", recording_rename)
    path = tmp_path / "checkpoints" / "step-00000004"
    path.parent.mkdir()
    write_checkpoint(path, tensors(), STATE_OF_4, SINGLE_PROCESS)
    at = events.index(path.name)
    before, after = events[:at], events[at + 1 :]
    assert {file.stat().st_ino for file in [*path.iterdir(), path]} <= {*before}
    assert path.parent.stat().st_ino in after


# Damage


def damage(path: Path, kind: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if kind == "flipped":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "short":
        del content[rng.randrange(len(content)) :]
    elif kind == "long":
        content += rng.randbytes(1 + rng.randrange(9))
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.write_bytes(content)


@pytest.mark.parametrize("kind", ["flipped", "short", "long", "gone", "folder"])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", STATE, MANIFEST])
@pytest.mark.parametrize("trusted", [False, True])
def test_all_damage_is_detected(name: str, kind: str, trusted: bool, folder: Path) -> None:
    rng, intact = random.Random(f"{name} {kind}"), files(folder)
    for _ in range(25):
        damage(folder / name, kind, rng)
        with pytest.raises(DamagedCheckpoint, match=re.escape(str(folder / name))) as caught:
            verify_checkpoint(folder, trusted)
        assert "\n" not in str(caught.value)
        if kind == "folder":
            (folder / name).rmdir()
        (folder / name).write_bytes(intact[name])
    verify_checkpoint(folder)


def test_every_changed_byte_of_the_manifest_is_detected(folder: Path) -> None:
    path = folder / MANIFEST
    intact = path.read_bytes()
    for i in range(len(intact)):
        path.write_bytes(intact[:i] + bytes([intact[i] ^ (1 << i % 8)]) + intact[i + 1 :])
        with pytest.raises((DamagedCheckpoint, UserError)):
            verify_checkpoint(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "5", '"text"', "{}", '{"format": 2}', '{"format": 2, "files": []}', "\0" * 200, "[" * 5000],
)
@pytest.mark.parametrize("trusted", [False, True])
def test_a_manifest_with_other_content_is_damaged(text: str, trusted: bool, folder: Path) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(DamagedCheckpoint, match=re.escape(f"{folder / MANIFEST} ")):
        verify_checkpoint(folder, trusted)


def test_a_manifest_that_is_not_text_is_damaged(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DamagedCheckpoint, match=f"{MANIFEST} cannot be read"):
        verify_checkpoint(folder)


def test_the_message_says_what_is_damaged(folder: Path) -> None:
    path, content = folder / "__0_0.distcp", (folder / "__0_0.distcp").read_bytes()
    path.write_bytes(content[:10])
    with pytest.raises(DamagedCheckpoint, match=rf"__0_0.distcp has 10 bytes, not {len(content):,}$"):
        verify_checkpoint(folder)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DamagedCheckpoint, match=r"was changed since it was written \(SHA-256 differs\)"):
        verify_checkpoint(folder)
    path.unlink()
    with pytest.raises(DamagedCheckpoint, match=r"__0_0.distcp cannot be read \(No such file or directory\)"):
        verify_checkpoint(folder)


def test_a_missing_or_empty_folder_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(DamagedCheckpoint, match=f"{MANIFEST} cannot be read"):
        verify_checkpoint(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DamagedCheckpoint, match=f"{MANIFEST} cannot be read"):
        verify_checkpoint(tmp_path / "empty")


def test_files_that_the_manifest_does_not_name_are_ignored(folder: Path) -> None:
    (folder / ".DS_Store").write_bytes(b"written by a file browser")
    (folder / "notes").mkdir()
    assert verify_checkpoint(folder) == STATE_OF_4
    assert_intact(folder)


def test_a_copy_and_a_link_to_it_are_intact(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "copy")
    assert_intact(tmp_path / "copy")
    assert_intact(tmp_path / "link")


# Checkpoints of other users


def become_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))


def test_another_users_checkpoint_is_rejected_unless_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become_another_user(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"was not written by a run of yours .* give --trust-checkpoint if you trust"):
        verify_checkpoint(folder)
    assert verify_checkpoint(folder, trusted=True) == STATE_OF_4


def test_damage_is_reported_before_the_author(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    become_another_user(tmp_path, monkeypatch)
    (folder / ".metadata").write_bytes(b"")
    for trusted in (False, True):
        with pytest.raises(DamagedCheckpoint):
            verify_checkpoint(folder, trusted)


def test_a_changed_checkpoint_with_a_new_digest_is_rejected(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anyone can compute a SHA-256, but only the key's owner can sign."""
    (folder / ".metadata").write_bytes(b"executes code when it is loaded")
    signature = json.loads((folder / MANIFEST).read_text())["signature"]
    with monkeypatch.context() as patch:
        become_another_user(tmp_path, patch)
        digests = {path.name: checkpoint.file_digest(path) for path in folder.iterdir() if path.name != MANIFEST}
        forged = json.loads(manifest_text(digests))
    body = {key: forged[key] for key in ("format", "files")}
    for signed in (forged["signature"], signature, None, "", "ü", 5):
        (folder / MANIFEST).write_text(with_digest(body | {"signature": signed}))
        with pytest.raises(UserError, match="was not written by a run of yours"):
            verify_checkpoint(folder)


def test_without_a_folder_for_the_key_checkpoints_are_written_unsigned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    write_checkpoint(tmp_path / "c", tensors(), STATE_OF_4, SINGLE_PROCESS)
    with pytest.raises(UserError, match="--trust-checkpoint"):
        verify_checkpoint(tmp_path / "c")
    assert verify_checkpoint(tmp_path / "c", trusted=True) == STATE_OF_4


def test_another_format_is_reported_as_such(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 7)
        write_checkpoint(folder, tensors(), STATE_OF_4, SINGLE_PROCESS)
    with pytest.raises(
        UserError, match="has checkpoint format 7, and this version reads 2: resume it with the version that wrote"
    ):
        verify_checkpoint(folder)


# Reading into tensors of another run


@pytest.mark.parametrize(
    "change",
    [
        lambda named: named | {"model.new": torch.zeros(3)},
        lambda named: named | {f"model.{torch.float32}.(7,)": torch.zeros(8)},
        lambda named: named | {f"model.{torch.float32}.(3, 5)": torch.zeros(5, 3)},
    ],
    ids=["missing", "longer", "transposed"],
)
def test_tensors_that_do_not_fit_are_reported(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], folder: Path
) -> None:
    with pytest.raises(RunError, match=re.escape(f"{folder} does not fit this run: ")):
        read_tensors(folder, change(zeros_like(tensors())), SINGLE_PROCESS)


# Failures to write


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(RunError, match=r"cannot be written .*free some space or repair the storage"):
        write_checkpoint(tmp_path / "checkpoints" / "step-00000004", tensors(), STATE_OF_4, SINGLE_PROCESS)
    assert (tmp_path / "checkpoints").read_text() == "a file"


@LINUX
def test_a_folder_without_write_permission(folder: Path) -> None:
    folder.parent.chmod(0o555)
    with without_privileges(), pytest.raises(RunError, match=r"cannot be written \(Permission denied\)"):
        write_checkpoint(folder.with_name("step-00000008"), tensors(1), STATE_OF_4, SINGLE_PROCESS)
    folder.parent.chmod(0o755)
    assert_intact(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("stage", ["tensors", "state", "manifest", "old", "new"])
def test_a_failure_leaves_earlier_checkpoints_unchanged(
    stage: str, replaces: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever stage of writing fails, for a new checkpoint and for one that replaces another."""
    target = folder if replaces else folder.with_name("step-00000008")
    if stage == "old" and not replaces:
        return
    full = OSError(errno.ENOSPC, "No space left on device")
    write_synced, rename = checkpoint.write_synced, Path.rename

    def fails(*words: Any, **options: Any) -> None:
        raise full

    def failing_write(path: Path, text: str) -> None:
        if path.name == {"state": STATE, "manifest": MANIFEST}[stage]:
            path.write_text(text[:10])
            raise full
        write_synced(path, text)

    def failing_rename(self: Path, to: Path) -> Path:
        if to.name == {"old": f".{target.name}.replaced", "new": target.name}[stage] and "partial" in self.name + stage:
            raise full
        if stage == "old" and to.name.endswith(".replaced"):
            raise full
        return rename(self, to)

    with monkeypatch.context() as patch:
        if stage == "tensors":
            patch.setattr(os, "fsync", fails)
        elif stage in ("state", "manifest"):
            patch.setattr(checkpoint, "write_synced", failing_write)
        else:
            patch.setattr(Path, "rename", failing_rename)
        with pytest.raises(RunError, match=r"cannot be written \(.*No space left on device\)"):
            write_checkpoint(target, tensors(1), {"step": 8}, SINGLE_PROCESS)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert verify_checkpoint(folder) == STATE_OF_4
    assert_intact(folder)
    write_checkpoint(target, tensors(1), {"step": 8}, SINGLE_PROCESS)  # works once there is space again
    assert_intact(target, 1)
