"""A checkpoint exists complete or not at all, every change to it is detected, and it is read back bit for bit."""

import errno
import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import LINUX, without_privileges
from torch import Tensor

from allmlp.checkpointing import tensors as storage
from allmlp.checkpointing.checkpoint import (
    MANIFEST,
    STATE,
    DamagedCheckpoint,
    read_tensors,
    verify_checkpoint,
    with_digest,
    write_checkpoint,
)
from allmlp.distributed.context import SINGLE_PROCESS
from allmlp.errors import RunError, UserError

STATE_OF_4 = {"step": 4, "loss": 0.1 + 0.2, "best": [2, 0.75], "classes": ["ä", "b\udc80"], "unreadable": {}}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
SHARD = "shard-00001-model-00001-of-00001.safetensors"


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """Tensors of every dtype and of many shapes, one of them not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(), (1,), (7,), (3, 5), (2, 3, 4), (0, 3)]
    values = {(s, d): torch.randn(s, generator=generator, dtype=torch.float64) * 9 for s in shapes for d in DTYPES}
    named = {f"model.{dtype}.{shape}": value.to(dtype) for (shape, dtype), value in values.items()}
    return named | {"model.transposed": torch.randn(4, 5, generator=generator).t()}


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
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def assert_intact(folder: Path, seed: int = 0, state: dict[str, Any] = STATE_OF_4) -> None:
    assert verify_checkpoint(folder) == state
    found = zeros_like(tensors())
    read_tensors(folder, found, SINGLE_PROCESS)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(seed).items())


def test_the_manifest_names_every_other_file_and_nan_becomes_null(folder: Path, tmp_path: Path) -> None:
    assert_intact(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    stored = json.loads((folder / MANIFEST).read_text())
    assert files(folder).keys() == {STATE, MANIFEST, SHARD}
    assert {name: file["bytes"] for name, file in stored["files"].items()} == {
        name: len(content) for name, content in files(folder).items() if name != MANIFEST
    }
    write_checkpoint(tmp_path / "c", {}, {"loss": float("nan"), "best": [1, float("inf")]}, SINGLE_PROCESS)
    assert verify_checkpoint(tmp_path / "c") == {"loss": None, "best": [1, None]}


def test_large_tensors_are_spread_over_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Because safetensors builds each file in memory."""
    monkeypatch.setattr(storage, "FILE_BYTES", 200)
    write_checkpoint(tmp_path / "c", tensors(), STATE_OF_4, SINGLE_PROCESS)
    sizes = [len(content) for name, content in files(tmp_path / "c").items() if name.startswith("shard-")]
    assert len(sizes) > 5
    assert max(sizes) < 3000  # with its header
    assert_intact(tmp_path / "c")


def test_writing_replaces_an_older_checkpoint_and_the_leftovers_of_a_killed_run(folder: Path) -> None:
    for ending in ("partial", "replaced"):
        leftover = folder.with_name(f".{folder.name}.{ending}")
        leftover.mkdir()
        for name in (SHARD, "shard-00001-model-00077-of-00077.safetensors"):
            (leftover / name).write_bytes(b"of a run that was killed")
    write_checkpoint(folder, tensors(1), {"step": 4, "attempt": 2}, SINGLE_PROCESS)
    assert_intact(folder, 1, {"step": 4, "attempt": 2})
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


def damaged(content: bytes, kind: str, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    if kind == "flipped":
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    return content[:at] if kind == "short" else content + rng.randbytes(1 + rng.randrange(9))


@pytest.mark.parametrize("name", [SHARD, STATE, MANIFEST])
def test_all_damage_is_detected_and_named(name: str, folder: Path) -> None:
    rng, intact, path = random.Random(name), files(folder)[name], folder / name
    one_line = re.compile(rf"^{re.escape(str(path))} [^\n]*$")
    every_byte = [intact[:i] + bytes([intact[i] ^ (1 << i % 8)]) + intact[i + 1 :] for i in range(len(intact))]
    contents = every_byte if name == MANIFEST else rng.sample(every_byte, 40)
    contents += [damaged(intact, kind, rng) for kind in ("flipped", "short", "long") for _ in range(15)]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(DamagedCheckpoint, match=one_line):
            verify_checkpoint(folder)
    path.unlink()
    with pytest.raises(DamagedCheckpoint, match=one_line):
        verify_checkpoint(folder)
    path.mkdir()
    with pytest.raises(DamagedCheckpoint, match=one_line):
        verify_checkpoint(folder)
    path.rmdir()
    path.write_bytes(intact)
    assert_intact(folder)


def test_a_manifest_with_other_content_is_damaged(folder: Path, tmp_path: Path) -> None:
    texts = ["", "{", "[]", "null", "5", '"text"', "{}", '{"format": 2}', '{"format": 3, "files": []}', "[" * 5000]
    for content in (*map(str.encode, texts), b"\0" * 200, b"\xff\xfe\x00"):
        (folder / MANIFEST).write_bytes(content)
        with pytest.raises(DamagedCheckpoint, match=re.escape(f"{folder / MANIFEST} ")):
            verify_checkpoint(folder)
    with pytest.raises(DamagedCheckpoint, match=f"{MANIFEST} cannot be read"):
        verify_checkpoint(tmp_path / "gone")


def test_what_a_file_browser_adds_is_ignored_and_a_copy_or_a_link_is_intact(folder: Path, tmp_path: Path) -> None:
    for name in (".DS_Store", f"._{SHARD}", SHARD.replace("00001", "00002")):
        (folder / name).write_bytes(b"no tensors")
    (folder / "notes").mkdir()
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "copy")
    for path in (folder, tmp_path / "copy", tmp_path / "link"):
        assert_intact(path)


@pytest.mark.parametrize("found", [1, 2, 7])
def test_another_format_is_refused_unopened(found: int, folder: Path) -> None:
    (folder / MANIFEST).write_text(with_digest({"format": found, "files": {".metadata": {}}, "signature": "a"}))
    with pytest.raises(UserError, match=rf"^{re.escape(str(folder))} .*format {found},.* reads 3: .*--weights"):
        verify_checkpoint(folder)


# Reading into tensors of another run


LONGER, TURNED, HALF = (f"model.{torch.float32}.{shape}" for shape in ((7,), (3, 5), (1,)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model.new": torch.zeros(3)}, ["model.new"]),
        ({LONGER: torch.zeros(8)}, [LONGER, "(7,)", "(8,)"]),
        ({TURNED: torch.zeros(5, 3)}, [TURNED, "(3, 5)", "(5, 3)"]),
        ({HALF: torch.zeros(1).bfloat16()}, [HALF, "torch.float32", "torch.bfloat16"]),
        ({TURNED: None}, [TURNED]),
    ],
    ids=["missing", "longer", "transposed", "another dtype", "unexpected"],
)
def test_tensors_that_do_not_fit_are_named(change: dict[str, Any], named: list[str], folder: Path) -> None:
    wanted = {name: tensor for name, tensor in (zeros_like(tensors()) | change).items() if tensor is not None}
    with pytest.raises(RunError, match=re.escape(f"{folder} does not fit this run: ")) as caught:
        read_tensors(folder, wanted, SINGLE_PROCESS)
    assert all(part in str(caught.value) for part in (*named, "start a new run from its weights"))
    assert not any(tensor.any() for tensor in wanted.values())  # nothing was read


# Failures to write


@LINUX
def test_a_folder_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    folder.parent.chmod(0o555)
    with without_privileges(), pytest.raises(RunError, match=r"cannot be written \(Permission denied\)"):
        write_checkpoint(folder.with_name("step-00000008"), tensors(1), STATE_OF_4, SINGLE_PROCESS)
    folder.parent.chmod(0o755)
    assert_intact(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    (tmp_path / "file").write_text("a file")
    with pytest.raises(RunError, match=r"cannot be written \(.*\): \w+.*; earlier checkpoints are unchanged"):
        write_checkpoint(tmp_path / "file" / "step-00000004", tensors(), STATE_OF_4, SINGLE_PROCESS)
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.parametrize(
    ("stage", "replaces"),
    [(stage, replaces) for stage in ("tensors", "state", "manifest", "new") for replaces in (False, True)]
    + [("old", True)],
)
def test_a_failure_leaves_earlier_checkpoints_unchanged(
    stage: str, replaces: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever stage of writing fails, for a new checkpoint and for one that replaces another."""
    target = folder if replaces else folder.with_name("step-00000008")
    full = OSError(errno.ENOSPC, "No space left on device")
    file = {"tensors": SHARD, "state": STATE, "manifest": MANIFEST}.get(stage)
    name = {"old": f".{target.name}.replaced", "new": target.name}.get(stage)
    fsync, rename = os.fsync, Path.rename

    def failing_fsync(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").readlink().name == file:
            raise full
        fsync(handle)

    def failing_rename(self: Path, to: Path) -> Path:
        if to.name == name and self.suffix != ".replaced":
            raise full
        return rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing_fsync)
        patch.setattr(Path, "rename", failing_rename)
        with pytest.raises(RunError, match=r"cannot be written \(.*No space left on device\)"):
            write_checkpoint(target, tensors(1), {"step": 8}, SINGLE_PROCESS)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert_intact(folder)
    write_checkpoint(target, tensors(1), {"step": 8}, SINGLE_PROCESS)  # works once there is space again
    assert_intact(target, 1, {"step": 8})
