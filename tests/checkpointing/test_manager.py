"""The checkpoints of a run: written in the background, the newest intact one found, old ones removed."""

import contextlib
import json
import logging
import os
import random
import shutil
import stat
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import LINUX, without_privileges
from torch import Tensor

from allmlp.checkpointing import manager as module
from allmlp.checkpointing.checkpoint import STATE, read_tensors, verify_checkpoint, write_checkpoint
from allmlp.checkpointing.manager import (
    CheckpointManager,
    checkpoint_name,
    checkpoints_by_step,
    clean_up,
    newest_intact,
    remove_old,
    set_aside_damaged,
)
from allmlp.distributed.context import SINGLE_PROCESS
from allmlp.errors import RunError
from allmlp.files import write_text


def tensors(value: float) -> dict[str, Tensor]:
    return {"model.w": torch.full((3, 4), value), "optimizer.w.step": torch.tensor(value)}


def write_steps(folder: Path, *steps: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        write_checkpoint(folder / checkpoint_name(step), tensors(step), {"step": step}, SINGLE_PROCESS)


def damage(folder: Path, *steps: int) -> None:
    for step in steps:
        (folder / checkpoint_name(step) / STATE).write_text("{}")


def newest_step(folder: Path) -> int | None:
    """The step of the newest intact checkpoint, whose tensors are compared with those that were written."""
    sound = newest_intact(folder)
    if sound is None:
        return None
    assert sound[0] == folder / checkpoint_name(sound[1]["step"])
    stored = tensors(-1)
    read_tensors(sound[0], stored, SINGLE_PROCESS)
    assert all(torch.equal(stored[key], tensor) for key, tensor in tensors(sound[1]["step"]).items())
    return sound[1]["step"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def steps_kept(folder: Path) -> list[int]:
    """The steps of the checkpoints, after checking that the folder holds nothing else."""
    assert names(folder) == sorted(checkpoint_name(step) for step in checkpoints_by_step(folder))
    return list(checkpoints_by_step(folder))


def manager_of(folder: Path, keep: int = 9, background: bool = True) -> CheckpointManager:
    return CheckpointManager(folder, SINGLE_PROCESS, keep, background)


# Saving


@pytest.mark.parametrize("background", [True, False])
def test_a_checkpoint_holds_the_values_at_the_time_of_saving(background: bool, tmp_path: Path) -> None:
    current = tensors(4)
    with manager_of(tmp_path, 2, background) as manager:
        for step in (4, 8, 12, 12):  # the last one replaces its own checkpoint
            for tensor in current.values():
                tensor.fill_(step)
            manager.save(step, current, {"step": step})
            assert manager.last_step == step
            for tensor in current.values():  # as the next training step does, while the checkpoint is being written
                tensor.fill_(-7)
    assert steps_kept(tmp_path) == [12, 8]
    for step in (8, 12):
        stored = tensors(0)
        assert verify_checkpoint(tmp_path / checkpoint_name(step)) == {"step": step}
        read_tensors(tmp_path / checkpoint_name(step), stored, SINGLE_PROCESS)
        assert all(torch.equal(stored[key], tensor) for key, tensor in tensors(step).items())


def test_saving_returns_at_once_but_waits_for_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, events = threading.Event(), []

    def slow_write(folder: Path, *words: Any) -> None:
        events.append(f"begin {folder.name}")
        assert gate.wait(20)
        write_checkpoint(folder, *words)
        events.append(f"end {folder.name}")

    monkeypatch.setattr(module, "write_checkpoint", slow_write)
    with manager_of(tmp_path) as manager:
        manager.save(1, tensors(1), {"step": 1})
        assert names(tmp_path) == []  # nothing is written yet, but save has returned
        threading.Timer(0.1, gate.set).start()
        manager.save(2, tensors(2), {"step": 2})
        assert events[:2] == [f"begin {checkpoint_name(1)}", f"end {checkpoint_name(1)}"]
    assert events == [f"{word} {checkpoint_name(step)}" for step in (1, 2) for word in ("begin", "end")]
    assert steps_kept(tmp_path) == [2, 1]


def test_the_copies_are_made_on_the_gpu_of_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DefaultStager pins memory for the current device and waits for that one. Simulated, for machines without two."""
    events: list[Any] = []

    @contextlib.contextmanager
    def device_index(index: int | None) -> Iterator[None]:
        events.append(index)
        yield
        events.append("restored")

    stager = SimpleNamespace(stage=lambda named: (events.append("staged"), named)[1])
    monkeypatch.setattr(module, "DefaultStager", lambda options: (events.append(options), stager)[1])
    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    for device in ("cuda:1", "cpu"):
        monkeypatch.setattr(module, "local_shard", lambda tensor, d=device: SimpleNamespace(device=torch.device(d)))
        manager = manager_of(tmp_path)
        for _ in range(2):
            assert manager.copy_to_cpu(tensors(1)).keys() == tensors(1).keys()
        for save in (0, 4):  # with a stager of its own, since PyTorch 2.11's cannot be used twice
            index, options, *rest = events[save : save + 4]
            assert index == (1 if device == "cuda:1" else None)
            assert (options.use_pinned_memory, options.use_non_blocking_copy) == (device != "cpu",) * 2
            assert rest == ["staged", "restored"]
        events.clear()


@pytest.mark.gpu
@pytest.mark.parametrize("background", [True, False])
def test_values_on_the_last_gpu_are_those_at_the_time_of_saving(background: bool, tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    values = torch.zeros(2**24, device=device)
    with manager_of(tmp_path, 9, background) as manager:
        for step in (1, 2, 3):
            for _ in range(50):  # the copy has to wait for these
                values.add_(1)
            manager.save(step, {"w": values}, {"step": step})
            values.add_(-7).add_(7)
    for step in (1, 2, 3):
        stored = {"w": torch.empty(2**24)}
        read_tensors(tmp_path / checkpoint_name(step), stored, SINGLE_PROCESS)
        assert (stored["w"] == 50 * step).all()


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_no_file_of_another_thread_is_writable_for_all(tmp_path: Path) -> None:
    """While a checkpoint and texts are written, another thread creates files and folders, under a umask of 027."""
    (tmp_path / "c").mkdir()
    (tmp_path / "others").mkdir()
    before, stop = os.umask(0o027), threading.Event()

    def create() -> None:
        for number in range(100_000):
            if stop.is_set():
                break
            (tmp_path / "others" / str(number)).mkdir()

    try:
        thread = threading.Thread(target=create)
        thread.start()
        for number in range(30):
            write_text(tmp_path / f"{number}.json", "{}")
        write_steps(tmp_path / "c", 1, 2, 3)
        stop.set()
        thread.join()
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.parent != tmp_path}
    modes |= {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*.json")}
    assert len(modes) > 45
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o750}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o640}


# Failures


def test_a_failure_is_raised_once_and_the_next_checkpoint_can_be_saved(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    manager = manager_of(folder)
    manager.save(1, tensors(1), {"step": 1})
    assert manager.thread is not None
    manager.thread.join()
    assert manager.failed
    with pytest.raises(RunError, match=r"cannot be written \(No such file or directory\)"):
        manager.save(2, tensors(2), {"step": 2})
    assert not manager.failed
    manager.wait()
    assert not folder.exists()  # its storage may be unmounted: files at the mount point would be hidden later
    with pytest.raises(RunError, match="cannot be written"):
        manager_of(folder, background=False).save(1, tensors(1), {"step": 1})
    folder.mkdir()
    manager.save(3, tensors(3), {"step": 3})
    manager.wait()
    assert newest_step(folder) == 3


def fail_after_a_save(folder: Path) -> None:
    with manager_of(folder) as manager:
        manager.save(1, tensors(1), {"step": 1})
        raise KeyError("another error")


def test_a_failure_is_raised_at_the_end_but_does_not_replace_another_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be written"), manager_of(tmp_path / "gone") as manager:
        manager.save(1, tensors(1), {"step": 1})
    with pytest.raises(KeyError, match="another error"):
        fail_after_a_save(tmp_path / "gone")
    with pytest.raises(KeyError, match="another error"):
        fail_after_a_save(tmp_path)
    assert newest_step(tmp_path) == 1  # it was completed


@LINUX
def test_old_checkpoints_that_cannot_be_removed_are_reported(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    (tmp_path / checkpoint_name(1)).chmod(0o555)
    with without_privileges():
        manager = manager_of(tmp_path, keep=1)
        manager.save(3, tensors(3), {"step": 3})
        with pytest.raises(RunError, match=r"old checkpoints in .* cannot be removed \(Permission denied\)"):
            manager.wait()
    assert newest_step(tmp_path) == 3


# Removing old checkpoints


def expected(steps: list[int], keep: int, others: Collection[int | None]) -> list[int]:
    return sorted({*sorted(steps)[-keep:], *(step for step in steps if step in others)}, reverse=True)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    rng = random.Random(0)
    for trial in range(40):
        folder = tmp_path / str(trial)
        steps = rng.sample([*range(1, 2000), 99_999_999, 100_000_000], rng.randint(1, 9))
        for step in steps:
            (folder / checkpoint_name(step) / "inner").mkdir(parents=True)
        keep, others = rng.randint(1, 4), {rng.choice(steps), rng.choice([*steps, 5000])}
        remove_old(folder, keep, {*others, None})
        assert steps_kept(folder) == expected(steps, keep, others)


@pytest.mark.parametrize("keep", [1, 2])
def test_the_best_is_kept_until_there_is_a_better_one(keep: int, tmp_path: Path) -> None:
    with manager_of(tmp_path, keep) as manager:
        for step, best in enumerate((None, 1, 1, 1, 5, 5), 1):
            manager.save(step, tensors(step), {"step": step}, best)
            manager.wait()
            assert steps_kept(tmp_path) == expected([*range(1, step + 1)], keep, {best})


def test_the_checkpoint_just_written_is_kept_even_if_later_steps_exist(tmp_path: Path) -> None:
    write_steps(tmp_path, 8, 12)
    damage(tmp_path, 8, 12)
    with manager_of(tmp_path, keep=1) as manager:
        manager.save(4, tensors(4), {"step": 4})
    assert 4 in checkpoints_by_step(tmp_path)
    assert newest_step(tmp_path) == 4


def test_other_files_are_left_alone_and_a_link_to_another_disk_is_unlinked(tmp_path: Path) -> None:
    write_steps(tmp_path / "elsewhere", 1)
    write_steps(tmp_path / "c", 2, 3)
    (tmp_path / "c" / checkpoint_name(1)).symlink_to(tmp_path / "elsewhere" / checkpoint_name(1))
    others = ("best.safetensors", "step-x", "step-00000009.bak", "damaged-step-00000007", "notes")
    for other in others:
        (tmp_path / "c" / other).mkdir()
    (tmp_path / "c" / "step-00000010").write_text("a file where a folder should be")
    assert list(checkpoints_by_step(tmp_path / "c")) == [3, 2, 1]
    remove_old(tmp_path / "c", 1, set())
    assert names(tmp_path / "c") == sorted([*others, "step-00000010", checkpoint_name(3)])
    assert newest_step(tmp_path / "c") == 3
    assert newest_step(tmp_path / "elsewhere") == 1
    assert checkpoints_by_step(tmp_path / "gone") == {}


# Finding the newest intact checkpoint


def test_any_combination_of_damaged_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest_intact(tmp_path / "gone") is None
    steps = [4, 8, 12, 16]
    write_steps(tmp_path / "intact", *steps)
    caplog.set_level(logging.WARNING, "allmlp")
    for bits in range(16):
        folder = tmp_path / str(bits)
        shutil.copytree(tmp_path / "intact", folder)
        damaged = [step for i, step in enumerate(steps) if bits >> i & 1]
        damage(folder, *damaged)
        caplog.clear()
        if damaged == steps:
            with pytest.raises(RunError, match=r"no checkpoint in .*4 damaged: .*step-00000016.*: train again"):
                newest_intact(folder)
            continue
        newest = max({*steps} - {*damaged})
        assert newest_step(folder) == newest
        told = [f"{folder / checkpoint_name(step) / STATE}" for step in reversed(damaged) if step > newest]
        messages = [record.getMessage() for record in caplog.records if record.name.startswith("allmlp")]
        assert len(messages) == len(told)
        assert all(path in message and "older" in message for path, message in zip(told, messages, strict=True))
        for _ in range(2):  # the second time, some are aside already
            set_aside_damaged(folder, newest)
            assert max(checkpoints_by_step(folder)) == newest == newest_step(folder)
            write_steps(folder, *(step for step in damaged if step > newest))
        aside = {f"damaged-{checkpoint_name(step)}" for step in steps if step > newest}
        assert {name for name in names(folder) if name.startswith("damaged-")} == aside


def test_an_empty_folder_and_a_copy_under_another_step_are_damaged(tmp_path: Path) -> None:
    write_steps(tmp_path, 4, 8)
    (tmp_path / checkpoint_name(12)).mkdir()
    shutil.copytree(tmp_path / checkpoint_name(8), tmp_path / checkpoint_name(99))
    assert newest_step(tmp_path) == 8


# After a kill


def test_leftovers_of_a_killed_run_are_cleaned_up(tmp_path: Path) -> None:
    write_steps(tmp_path, 4, 8)
    for leftover in (".step-00000012.partial", ".step-00000004.replaced", ".step-00000001.removed"):
        shutil.copytree(tmp_path / checkpoint_name(4), tmp_path / leftover)
    (tmp_path / checkpoint_name(8)).rename(tmp_path / ".step-00000008.replaced")
    for weights in (".best.safetensors.k3_x9a2b", ".last.safetensors.8s7d6f5g", "best.safetensors"):
        (tmp_path / weights).write_bytes(bytes(100))
    clean_up(tmp_path)
    assert names(tmp_path) == ["best.safetensors", checkpoint_name(4), checkpoint_name(8)]
    assert newest_step(tmp_path) == 8


class Killed(BaseException):
    """Stands in for SIGKILL: nothing is cleaned up after it."""


def kill_at_call(patch: pytest.MonkeyPatch, action: str, at: int) -> None:
    """From a given call of an action on, counted from 1, every rename and removal raises ``Killed``."""
    calls = [0]

    def wrap(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def replaced(*words: Any, **options: Any) -> Any:
            calls[0] += name == action
            if calls[0] >= at:
                raise Killed
            return original(*words, **options)

        return replaced

    for owner, name in ((Path, "rename"), (shutil, "rmtree")):
        patch.setattr(owner, name, wrap(getattr(owner, name), name))


@pytest.mark.parametrize("action", ["rename", "rmtree"])
def test_a_sound_checkpoint_survives_a_kill_at_any_time(
    action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each rename or removal of a save that replaces one checkpoint and removes another."""
    completed = False
    for at in range(1, 11):
        folder = tmp_path / f"{action}-{at}"
        write_steps(folder, 2, 4, *([8] if at % 2 else []))
        with monkeypatch.context() as patch:
            kill_at_call(patch, action, at)
            with contextlib.suppress(Killed):
                write_checkpoint(folder / checkpoint_name(8), tensors(8), {"step": 8}, SINGLE_PROCESS)
                remove_old(folder, 1, {8})
                completed = True
        clean_up(folder)
        assert newest_step(folder) in (4, 8)
        with manager_of(folder, keep=1) as manager:
            manager.save(12, tensors(12), {"step": 12})
        assert steps_kept(folder) == [12]
        assert json.loads((folder / checkpoint_name(12) / STATE).read_text()) == {"step": 12}
    assert completed
