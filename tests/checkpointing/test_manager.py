"""The checkpoints of a run: written in the background, the newest intact one found, old ones removed."""

import json
import logging
import random
import shutil
import threading
from collections.abc import Callable, Collection
from pathlib import Path
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


# Saving


@pytest.mark.parametrize("background", [True, False])
def test_a_checkpoint_holds_the_values_at_the_time_of_saving(background: bool, tmp_path: Path) -> None:
    current = tensors(4)
    with CheckpointManager(tmp_path, SINGLE_PROCESS, keep=9, background=background) as manager:
        for step in (4, 8, 12, 16):
            for tensor in current.values():
                tensor.fill_(step)
            manager.save(step, current, {"step": step})
            assert manager.last_step == step
            for tensor in current.values():  # as the next training step does, while the checkpoint is being written
                tensor.fill_(-7)
    assert steps_kept(tmp_path) == [16, 12, 8, 4]
    for step in (4, 8, 12, 16):
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
    with CheckpointManager(tmp_path, SINGLE_PROCESS, keep=9) as manager:
        manager.save(1, tensors(1), {"step": 1})
        assert names(tmp_path) == []  # nothing is written yet, but save has returned
        threading.Timer(0.1, gate.set).start()
        manager.save(2, tensors(2), {"step": 2})
        assert events[:2] == [f"begin {checkpoint_name(1)}", f"end {checkpoint_name(1)}"]
    assert events == [f"{word} {checkpoint_name(step)}" for step in (1, 2) for word in ("begin", "end")]
    assert steps_kept(tmp_path) == [2, 1]


def test_saving_a_step_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, SINGLE_PROCESS, keep=2) as manager:
        for attempt in (1, 2, 3):
            manager.save(4, tensors(attempt), {"step": 4, "attempt": attempt})
    assert steps_kept(tmp_path) == [4]
    assert verify_checkpoint(tmp_path / checkpoint_name(4)) == {"step": 4, "attempt": 3}


def test_a_failure_is_raised_once_and_the_next_checkpoint_can_be_saved(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.write_text("a file where a folder should be")
    manager = CheckpointManager(folder, SINGLE_PROCESS, keep=2)
    manager.save(1, tensors(1), {"step": 1})
    assert manager.thread is not None
    manager.thread.join()
    assert manager.failed
    with pytest.raises(RunError, match="cannot be written"):
        manager.save(2, tensors(2), {"step": 2})
    assert not manager.failed
    manager.wait()
    folder.unlink()
    folder.mkdir()
    manager.save(3, tensors(3), {"step": 3})
    manager.wait()
    assert newest_step(folder) == 3


def test_a_missing_folder_is_not_recreated(tmp_path: Path) -> None:
    """Its storage may be unmounted: files written to the empty mount point would be hidden when it is back."""
    manager = CheckpointManager(tmp_path / "gone", SINGLE_PROCESS, keep=2)
    manager.save(1, {"w": torch.zeros(3)}, {"step": 1})
    with pytest.raises(RunError, match=r"cannot be written \(No such file or directory\)"):
        manager.wait()
    assert not (tmp_path / "gone").exists()


def test_in_the_foreground_a_failure_is_raised_at_once(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file where a folder should be")
    with pytest.raises(RunError, match="cannot be written"):
        CheckpointManager(tmp_path / "c", SINGLE_PROCESS, keep=2, background=False).save(1, tensors(1), {"step": 1})


def fail_after_a_save(folder: Path) -> None:
    with CheckpointManager(folder, SINGLE_PROCESS, keep=2) as manager:
        manager.save(1, tensors(1), {"step": 1})
        raise KeyError("another error")


def test_a_failure_is_raised_at_the_end_but_does_not_replace_another_error(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file where a folder should be")
    with (
        pytest.raises(RunError, match="cannot be written"),
        CheckpointManager(tmp_path / "c", SINGLE_PROCESS, keep=2) as manager,
    ):
        manager.save(1, tensors(1), {"step": 1})
    with pytest.raises(KeyError, match="another error"):
        fail_after_a_save(tmp_path / "c")


def test_after_an_error_the_checkpoint_being_written_is_completed(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="another error"):
        fail_after_a_save(tmp_path)
    assert newest_step(tmp_path) == 1


@LINUX
def test_old_checkpoints_that_cannot_be_removed_are_reported(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    (tmp_path / checkpoint_name(1)).chmod(0o555)
    with without_privileges():
        manager = CheckpointManager(tmp_path, SINGLE_PROCESS, keep=1)
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
        steps = rng.sample(range(1, 2000), rng.randint(1, 9))
        for step in steps:
            (folder / checkpoint_name(step) / "inner").mkdir(parents=True)
        keep, others = rng.randint(1, 4), {rng.choice(steps), rng.choice([*steps, 5000])}
        remove_old(folder, keep, {*others, None})
        assert steps_kept(folder) == expected(steps, keep, others)


@pytest.mark.parametrize("keep", [1, 2])
def test_the_best_is_kept_until_there_is_a_better_one(keep: int, tmp_path: Path) -> None:
    best = {1: None, 2: 1, 3: 1, 4: 1, 5: 4, 6: 4}
    by_step = {1: [1], 2: [2, 1], 3: [3, 1], 4: [4, 1], 5: [5, 4], 6: [6, 4]}
    with CheckpointManager(tmp_path, SINGLE_PROCESS, keep=keep) as manager:
        for step in range(1, 7):
            manager.save(step, tensors(step), {"step": step}, best[step])
            manager.wait()
            steps = by_step[step] if keep == 1 else expected([*range(1, step + 1)], 2, {best[step]})
            assert steps_kept(tmp_path) == steps


def test_the_checkpoint_just_written_is_kept_even_if_later_steps_exist(tmp_path: Path) -> None:
    write_steps(tmp_path, 8, 12)
    damage(tmp_path, 8, 12)
    with CheckpointManager(tmp_path, SINGLE_PROCESS, keep=1) as manager:
        manager.save(4, tensors(4), {"step": 4})
    assert 4 in checkpoints_by_step(tmp_path)
    assert newest_step(tmp_path) == 4


def test_other_files_and_folders_are_left_alone(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, 3)
    others = ("best.safetensors", "step-x", "step-00000009.bak", "damaged-step-00000007", "notes")
    for other in others:
        (tmp_path / other).mkdir()
    (tmp_path / "step-00000010").write_text("a file where a folder should be")
    assert list(checkpoints_by_step(tmp_path)) == [3, 2, 1]
    remove_old(tmp_path, 1, set())
    assert list(checkpoints_by_step(tmp_path)) == [3]
    assert {*others, "step-00000010"} <= {*names(tmp_path)}
    assert newest_step(tmp_path) == 3


def test_steps_are_sorted_as_numbers(tmp_path: Path) -> None:
    steps = [999_999_999, 100_000_000, 99_999_999, 10, 9]
    for step in steps:
        (tmp_path / checkpoint_name(step)).mkdir()
    assert list(checkpoints_by_step(tmp_path)) == steps
    assert checkpoints_by_step(tmp_path / "gone") == {}


def test_an_old_checkpoint_that_is_a_link_is_unlinked(tmp_path: Path) -> None:
    """A user who is short of space may move a checkpoint to another disk and link to it."""
    write_steps(tmp_path / "elsewhere", 1)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / checkpoint_name(1)).symlink_to(tmp_path / "elsewhere" / checkpoint_name(1))
    assert newest_step(tmp_path / "c") == 1
    with CheckpointManager(tmp_path / "c", SINGLE_PROCESS, keep=1) as manager:
        manager.save(2, tensors(2), {"step": 2})
    assert steps_kept(tmp_path / "c") == [2]


# Finding the newest intact checkpoint


def test_the_newest_sound_checkpoint_is_found_and_damaged_ones_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest_intact(tmp_path) is None
    assert newest_intact(tmp_path / "gone") is None
    write_steps(tmp_path, 4, 8, 12)
    assert newest_step(tmp_path) == 12
    assert [record for record in caplog.records if record.name.startswith("allmlp")] == []
    damage(tmp_path, 12)
    with caplog.at_level(logging.WARNING):
        assert newest_step(tmp_path) == 8
    (message,) = (record.getMessage() for record in caplog.records if record.name.startswith("allmlp"))
    assert str(tmp_path / checkpoint_name(12) / STATE) in message
    assert message.endswith("falling back to an older checkpoint")
    damage(tmp_path, 8)
    assert newest_step(tmp_path) == 4
    damage(tmp_path, 4)
    with pytest.raises(RunError, match=r"no checkpoint in .* is intact \(3 damaged: .*step-00000012.*\): train again"):
        newest_intact(tmp_path)


def test_any_combination_of_damaged_checkpoints(tmp_path: Path) -> None:
    steps = [4, 8, 12, 16]
    write_steps(tmp_path / "intact", *steps)
    for bits in range(15):
        folder = tmp_path / str(bits)
        shutil.copytree(tmp_path / "intact", folder)
        damaged = [step for i, step in enumerate(steps) if bits >> i & 1]
        damage(folder, *damaged)
        expected = max({*steps} - {*damaged})
        assert newest_step(folder) == expected
        set_aside_damaged(folder, expected)
        assert max(checkpoints_by_step(folder)) == expected == newest_step(folder)
        assert {n for n in names(folder) if n.startswith("damaged-")} == {
            f"damaged-{checkpoint_name(step)}" for step in steps if step > expected
        }


def test_an_empty_checkpoint_folder_is_damaged(tmp_path: Path) -> None:
    write_steps(tmp_path, 4)
    (tmp_path / checkpoint_name(8)).mkdir()
    assert newest_step(tmp_path) == 4


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(tmp_path: Path) -> None:
    """It was copied by hand; the original must stay, and the copy's name must not count as a step."""
    write_steps(tmp_path, 4, 8)
    shutil.copytree(tmp_path / checkpoint_name(8), tmp_path / checkpoint_name(99))
    sound = newest_intact(tmp_path)
    assert sound is not None
    set_aside_damaged(tmp_path, sound[1]["step"])
    assert sound[0].is_dir()
    assert sound[0] == tmp_path / checkpoint_name(8)


def test_setting_aside_the_same_step_twice(tmp_path: Path) -> None:
    for _ in range(2):
        write_steps(tmp_path, 4, 8)
        set_aside_damaged(tmp_path, 4)
        assert list(checkpoints_by_step(tmp_path)) == [4]
    assert names(tmp_path) == ["damaged-step-00000008", checkpoint_name(4)]


# After a kill


def test_leftovers_of_a_killed_run_are_cleaned_up(tmp_path: Path) -> None:
    write_steps(tmp_path, 4, 8)
    for leftover in (".step-00000012.partial", ".step-00000004.replaced", ".step-00000001.removed"):
        shutil.copytree(tmp_path / checkpoint_name(4), tmp_path / leftover)
    (tmp_path / checkpoint_name(8)).rename(tmp_path / ".step-00000008.replaced")
    clean_up(tmp_path)
    assert steps_kept(tmp_path) == [8, 4]
    assert newest_step(tmp_path) == 8


def test_half_written_weights_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    """They are as large as best.safetensors and last.safetensors, and in the same folder."""
    for leftover in (".best.safetensors.k3_x9a2b", ".last.safetensors.8s7d6f5g"):
        (tmp_path / leftover).write_bytes(bytes(100))
    for other in ("best.safetensors", "last.safetensors"):
        (tmp_path / other).write_bytes(bytes(100))
    clean_up(tmp_path)
    assert names(tmp_path) == ["best.safetensors", "last.safetensors"]


class Killed(BaseException):
    """Stands in for SIGKILL: nothing is cleaned up after it."""


class KillAtCall:
    """From a given call of an action on, counted from 1, every rename and removal raises ``Killed``."""

    def __init__(self, patch: pytest.MonkeyPatch, action: str, at: int) -> None:
        self.calls_left, self.action = at, action
        for owner, name in ((Path, "rename"), (shutil, "rmtree")):
            patch.setattr(owner, name, self.wrap(getattr(owner, name), name))

    def wrap(self, original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def replaced(*words: Any, **options: Any) -> Any:
            self.calls_left -= name == self.action
            if self.calls_left <= 0:
                raise Killed
            return original(*words, **options)

        return replaced


@pytest.mark.parametrize("action", ["rename", "rmtree"])
def test_a_sound_checkpoint_survives_a_kill_at_any_time(
    action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each rename or removal of a save that replaces one checkpoint and removes another."""
    completed = False
    for at in range(1, 11):
        folder = tmp_path / f"{action}-{at}"
        write_steps(folder, 2, 4)
        if at % 2:
            write_steps(folder, 8)
        with monkeypatch.context() as patch:
            KillAtCall(patch, action, at)
            try:
                write_checkpoint(folder / checkpoint_name(8), tensors(8), {"step": 8}, SINGLE_PROCESS)
                remove_old(folder, 1, {8})
                completed = True
            except Killed:
                pass
        clean_up(folder)
        assert newest_step(folder) in (4, 8)
        with CheckpointManager(folder, SINGLE_PROCESS, keep=1) as manager:
            manager.save(12, tensors(12), {"step": 12})
        assert steps_kept(folder) == [12]
        assert json.loads((folder / checkpoint_name(12) / STATE).read_text()) == {"step": 12}
    assert completed
