"""A checkpoint is there whole or not at all, and no change to it goes unseen."""

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
from test_trust import LINUX, without_privileges
from torch import Tensor

from allmlp.checkpointing import checkpoint
from allmlp.checkpointing.checkpoint import MANIFEST, STATE, Damaged, read, seal, sealed, verify, write
from allmlp.distributed.context import SINGLE_PROCESS
from allmlp.errors import RunError, UserError

STATE_OF_4 = {"step": 4, "loss": 0.1 + 0.2, "best": [2, 0.75], "classes": ["ä", "b\udc80"], "unreadable": {}}
KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """Of all kinds and shapes that a run might have."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(), (1,), (7,), (3, 5), (2, 3, 4)]
    drawn = {(s, k): torch.randn(s, generator=generator, dtype=torch.float64) * 9 for s in shapes for k in KINDS}
    return {f"model.{kind}.{shape}": value.to(kind) for (shape, kind), value in drawn.items()}


def zeros(like: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in like.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound checkpoint."""
    path = tmp_path / "checkpoints" / "step-00000004"
    path.parent.mkdir(exist_ok=True)
    write(path, tensors(), STATE_OF_4, SINGLE_PROCESS)
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_sound(folder: Path, seed: int = 0) -> None:
    verify(folder)
    found = zeros(tensors())
    read(folder, found, SINGLE_PROCESS)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(seed).items())


def test_all_comes_back_bit_for_bit(folder: Path) -> None:
    assert verify(folder) == STATE_OF_4
    assert_sound(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["step-00000004"]


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    write(tmp_path / "c", tensors(), {"step": 1, "loss": float("nan"), "best": [1, float("inf")]}, SINGLE_PROCESS)
    assert verify(tmp_path / "c") == {"step": 1, "loss": None, "best": [1, None]}


def test_the_manifest_names_every_other_file(folder: Path) -> None:
    stored = json.loads((folder / MANIFEST).read_text())
    assert {*stored["files"], MANIFEST} == files(folder).keys() >= {STATE, ".metadata"}
    assert {name: told["bytes"] for name, told in stored["files"].items()} == {
        name: len(content) for name, content in files(folder).items() if name != MANIFEST
    }


def test_an_older_one_of_the_same_name_is_replaced_and_what_a_killed_run_left(folder: Path) -> None:
    for ending in ("partial", "replaced"):
        rest = folder.with_name(f".{folder.name}.{ending}")
        rest.mkdir()
        (rest / "__0_0.distcp").write_bytes(b"of a run that was killed")
        (rest / "__0_77.distcp").write_bytes(b"of a run that was killed")
    write(folder, tensors(1), {"step": 4, "turn": 2}, SINGLE_PROCESS)
    assert verify(folder) == {"step": 4, "turn": 2}
    assert_sound(folder, 1)
    assert "__0_77.distcp" not in files(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_all_files_are_synced_before_the_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(handle: Any) -> None:
        seen.append(os.fstat(handle if isinstance(handle, int) else handle.fileno()).st_ino)
        fsync(handle)

    def noted_rename(self: Path, target: Path) -> Path:
        seen.append(target.name)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    path = tmp_path / "checkpoints" / "step-00000004"
    path.parent.mkdir()
    write(path, tensors(), STATE_OF_4, SINGLE_PROCESS)
    at = seen.index(path.name)
    before, after = seen[:at], seen[at + 1 :]
    assert {file.stat().st_ino for file in [*path.iterdir(), path]} <= {*before}
    assert path.parent.stat().st_ino in after


# what has changed


def damage(path: Path, how: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "short":
        del content[rng.randrange(len(content)) :]
    elif how == "long":
        content += rng.randbytes(1 + rng.randrange(9))
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "gone":
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["flipped", "short", "long", "gone", "folder"])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", STATE, MANIFEST])
@pytest.mark.parametrize("trusted", [False, True])
def test_no_damage_goes_unseen(name: str, how: str, trusted: bool, folder: Path) -> None:
    rng, whole = random.Random(f"{name} {how}"), files(folder)
    for _ in range(25):
        damage(folder / name, how, rng)
        with pytest.raises(Damaged, match=re.escape(str(folder / name))) as caught:
            verify(folder, trusted)
        assert "\n" not in str(caught.value)
        if how == "folder":
            (folder / name).rmdir()
        (folder / name).write_bytes(whole[name])
    verify(folder)


def test_every_bit_of_the_manifest_counts(folder: Path) -> None:
    path = folder / MANIFEST
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i + 1 :])
        with pytest.raises((Damaged, UserError)):
            verify(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "5", '"text"', "{}", '{"format": 1}', '{"format": 1, "files": []}', "\0" * 200, "[" * 5000],
)
@pytest.mark.parametrize("trusted", [False, True])
def test_a_manifest_that_is_none(text: str, trusted: bool, folder: Path) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(Damaged, match=re.escape(f"{folder / MANIFEST} ")):
        verify(folder, trusted)


def test_a_manifest_that_is_no_text(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Damaged, match=f"{MANIFEST} cannot be read"):
        verify(folder)


def test_the_message_says_what_is_wrong(folder: Path) -> None:
    path, content = folder / "__0_0.distcp", (folder / "__0_0.distcp").read_bytes()
    path.write_bytes(content[:10])
    with pytest.raises(Damaged, match=rf"__0_0.distcp has 10 bytes, not {len(content):,}$"):
        verify(folder)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Damaged, match=r"was changed since it was written \(SHA-256 differs\)"):
        verify(folder)
    path.unlink()
    with pytest.raises(Damaged, match=r"__0_0.distcp cannot be read \(No such file or directory\)"):
        verify(folder)


def test_a_folder_of_which_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(Damaged, match=f"{MANIFEST} cannot be read"):
        verify(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Damaged, match=f"{MANIFEST} cannot be read"):
        verify(tmp_path / "empty")


def test_files_beside_those_of_the_manifest_are_of_no_account(folder: Path) -> None:
    (folder / ".DS_Store").write_bytes(b"of a file browser")
    (folder / "notes").mkdir()
    assert verify(folder) == STATE_OF_4
    assert_sound(folder)


def test_a_copy_elsewhere_and_a_link_to_it_are_as_good(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "copy")
    assert_sound(tmp_path / "copy")
    assert_sound(tmp_path / "link")


# whose it is


def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))


def test_a_strangers_is_refused_and_taken_with_trust(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"was not written by a run of yours .* give --trust-checkpoint if you trust"):
        verify(folder)
    assert verify(folder, trusted=True) == STATE_OF_4


def test_a_strangers_damaged_one_is_damaged_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(tmp_path, monkeypatch)
    (folder / ".metadata").write_bytes(b"")
    for trusted in (False, True):
        with pytest.raises(Damaged):
            verify(folder, trusted)


def test_a_change_with_a_new_digest_is_a_strangers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who can compute a SHA-256 cannot sign."""
    (folder / ".metadata").write_bytes(b"what executes code when it is loaded")
    signature = json.loads((folder / MANIFEST).read_text())["signature"]
    with monkeypatch.context() as patch:
        elsewhere(tmp_path, patch)
        told = {path.name: checkpoint.fingerprint(path) for path in folder.iterdir() if path.name != MANIFEST}
        forged = json.loads(seal(told))
    body = {key: forged[key] for key in ("format", "files")}
    for signed in (forged["signature"], signature, None, "", "ü", 5):
        (folder / MANIFEST).write_text(sealed(body | {"signature": signed}))
        with pytest.raises(UserError, match="was not written by a run of yours"):
            verify(folder)


def test_without_a_place_for_a_key_it_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    write(tmp_path / "c", tensors(), STATE_OF_4, SINGLE_PROCESS)
    with pytest.raises(UserError, match="--trust-checkpoint"):
        verify(tmp_path / "c")
    assert verify(tmp_path / "c", trusted=True) == STATE_OF_4


def test_another_format_is_not_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 7)
        write(folder, tensors(), STATE_OF_4, SINGLE_PROCESS)
    with pytest.raises(UserError, match="has format 7, this is 1: use the version that wrote it"):
        verify(folder)


# into tensors of another run


@pytest.mark.parametrize(
    "change",
    [
        lambda stored: stored | {"model.new": torch.zeros(3)},
        lambda stored: stored | {f"model.{torch.float32}.(7,)": torch.zeros(8)},
        lambda stored: stored | {f"model.{torch.float32}.(3, 5)": torch.zeros(5, 3)},
    ],
    ids=["missing", "longer", "turned"],
)
def test_tensors_that_are_not_there_are_told(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], folder: Path
) -> None:
    with pytest.raises(RunError, match=re.escape(f"{folder} does not fit this run: ")):
        read(folder, change(zeros(tensors())), SINGLE_PROCESS)


# what cannot be written


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(RunError, match=r"cannot be written .*free some space, or mend the storage"):
        write(tmp_path / "checkpoints" / "step-00000004", tensors(), STATE_OF_4, SINGLE_PROCESS)
    assert (tmp_path / "checkpoints").read_text() == "a file"


@LINUX
def test_a_folder_that_may_not_be_written(folder: Path) -> None:
    folder.parent.chmod(0o555)
    with without_privileges(), pytest.raises(RunError, match=r"cannot be written \(Permission denied\)"):
        write(folder.with_name("step-00000008"), tensors(1), STATE_OF_4, SINGLE_PROCESS)
    folder.parent.chmod(0o755)
    assert_sound(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("place", ["tensors", "state", "manifest", "old", "new"])
def test_what_was_there_is_as_it_was_after_a_failure(
    place: str, again: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever step of writing fails, for a new checkpoint and for one that replaces another."""
    target = folder if again else folder.with_name("step-00000008")
    if place == "old" and not again:
        return
    full = OSError(errno.ENOSPC, "No space left on device")
    write_synced, rename = checkpoint.write_synced, Path.rename

    def fails(*words: Any, **options: Any) -> None:
        raise full

    def failing_write(path: Path, text: str) -> None:
        if path.name == {"state": STATE, "manifest": MANIFEST}[place]:
            path.write_text(text[:10])
            raise full
        write_synced(path, text)

    def failing_rename(self: Path, to: Path) -> Path:
        if to.name == {"old": f".{target.name}.replaced", "new": target.name}[place] and "partial" in self.name + place:
            raise full
        if place == "old" and to.name.endswith(".replaced"):
            raise full
        return rename(self, to)

    with monkeypatch.context() as patch:
        if place == "tensors":
            patch.setattr(os, "fsync", fails)
        elif place in ("state", "manifest"):
            patch.setattr(checkpoint, "write_synced", failing_write)
        else:
            patch.setattr(Path, "rename", failing_rename)
        with pytest.raises(RunError, match=r"cannot be written \(.*No space left on device\)"):
            write(target, tensors(1), {"step": 8}, SINGLE_PROCESS)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert verify(folder) == STATE_OF_4
    assert_sound(folder)
    write(target, tensors(1), {"step": 8}, SINGLE_PROCESS)  # and when there is room again
    assert_sound(target, 1)
