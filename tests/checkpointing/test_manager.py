"""The checkpoints of a run: copied at once, written in the background, the old ones removed, the newest sound found."""

import json
import logging
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trust import LINUX, without_privileges
from torch import Tensor

from allmlp.checkpointing import manager
from allmlp.checkpointing.checkpoint import STATE, read, verify, write
from allmlp.checkpointing.manager import CheckpointManager, name, newest, retain, set_aside, steps_in, tidy
from allmlp.distributed.context import SINGLE_PROCESS
from allmlp.errors import RunError, UserError


def tensors(value: float) -> dict[str, Tensor]:
    return {"model.w": torch.full((3, 4), value), "optimizer.w.step": torch.tensor(value)}


def put(folder: Path, *steps: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        write(folder / name(step), tensors(step), {"step": step}, SINGLE_PROCESS)
    return folder


def spoil(folder: Path, *steps: int) -> None:
    for step in steps:
        (folder / name(step) / STATE).write_text("{}")


def found(folder: Path) -> int | None:
    sound = newest(folder)
    if sound is None:
        return None
    assert sound[0] == folder / name(sound[1]["step"])
    held = tensors(-1)
    read(sound[0], held, SINGLE_PROCESS)
    assert all(torch.equal(held[key], tensor) for key, tensor in tensors(sound[1]["step"]).items())
    return sound[1]["step"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kept(folder: Path) -> list[int]:
    """The steps; nothing else is there."""
    assert names(folder) == sorted(name(step) for step in steps_in(folder))
    return list(steps_in(folder))


# saving


@pytest.mark.parametrize("background", [True, False])
def test_what_is_saved_is_what_was_there_at_that_moment(background: bool, tmp_path: Path) -> None:
    held = tensors(4)
    with CheckpointManager(tmp_path, SINGLE_PROCESS, keep=9, background=background) as saving:
        for step in (4, 8, 12, 16):
            for tensor in held.values():
                tensor.fill_(step)
            saving.save(step, held, {"step": step})
            assert saving.last == step
            for tensor in held.values():  # as the next step does, while this one is being written
                tensor.fill_(-7)
    assert kept(tmp_path) == [16, 12, 8, 4]
    for step in (4, 8, 12, 16):
        stored = tensors(0)
        assert verify(tmp_path / name(step)) == {"step": step}
        read(tmp_path / name(step), stored, SINGLE_PROCESS)
        assert all(torch.equal(stored[key], tensor) for key, tensor in tensors(step).items())


def test_the_training_does_not_wait_and_one_is_written_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, order = threading.Event(), []

    def slow(folder: Path, *words: Any) -> None:
        order.append(f"begins {folder.name}")
        assert gate.wait(20)
        write(folder, *words)
        order.append(f"ends {folder.name}")

    monkeypatch.setattr(manager, "write", slow)
    with CheckpointManager(tmp_path, SINGLE_PROCESS, keep=9) as saving:
        saving.save(1, tensors(1), {"step": 1})
        assert names(tmp_path) == []  # and yet it has returned
        threading.Timer(0.1, gate.set).start()
        saving.save(2, tensors(2), {"step": 2})
        assert order[:2] == [f"begins {name(1)}", f"ends {name(1)}"]
    assert order == [f"{word} {name(step)}" for step in (1, 2) for word in ("begins", "ends")]
    assert kept(tmp_path) == [2, 1]


def test_the_same_step_twice_is_the_second(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, SINGLE_PROCESS, keep=2) as saving:
        for turn in (1, 2, 3):
            saving.save(4, tensors(turn), {"step": 4, "turn": turn})
    assert kept(tmp_path) == [4]
    assert verify(tmp_path / name(4)) == {"step": 4, "turn": 3}


def test_a_failure_is_told_once_and_the_next_can_be_saved(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.write_text("a file where a folder should be")
    saving = CheckpointManager(folder, SINGLE_PROCESS, keep=2)
    saving.save(1, tensors(1), {"step": 1})
    assert saving.thread is not None
    saving.thread.join()
    assert saving.failed
    with pytest.raises(RunError, match="cannot be written"):
        saving.save(2, tensors(2), {"step": 2})
    assert not saving.failed
    saving.wait()
    folder.unlink()
    folder.mkdir()
    saving.save(3, tensors(3), {"step": 3})
    saving.wait()
    assert found(folder) == 3


def test_storage_that_has_vanished_is_not_made_again(tmp_path: Path) -> None:
    """As where it was mounted: what is written below the empty place would be lost once it is back."""
    keeper = CheckpointManager(tmp_path / "gone", SINGLE_PROCESS, keep=2)
    keeper.save(1, {"w": torch.zeros(3)}, {"step": 1})
    with pytest.raises(RunError, match=r"cannot be written \(No such file or directory\)"):
        keeper.wait()
    assert not (tmp_path / "gone").exists()


def test_without_a_background_the_failure_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file where a folder should be")
    with pytest.raises(RunError, match="cannot be written"):
        CheckpointManager(tmp_path / "c", SINGLE_PROCESS, keep=2, background=False).save(1, tensors(1), {"step": 1})


def fail_after_a_save(folder: Path) -> None:
    with CheckpointManager(folder, SINGLE_PROCESS, keep=2) as saving:
        saving.save(1, tensors(1), {"step": 1})
        raise KeyError("another")


def test_at_the_end_a_failure_is_told_but_never_in_place_of_another_error(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file where a folder should be")
    with (
        pytest.raises(RunError, match="cannot be written"),
        CheckpointManager(tmp_path / "c", SINGLE_PROCESS, keep=2) as saving,
    ):
        saving.save(1, tensors(1), {"step": 1})
    with pytest.raises(KeyError, match="another"):
        fail_after_a_save(tmp_path / "c")


def test_after_an_error_what_is_being_written_is_written_to_its_end(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="another"):
        fail_after_a_save(tmp_path)
    assert found(tmp_path) == 1


@LINUX
def test_old_ones_that_cannot_be_removed_are_told(tmp_path: Path) -> None:
    put(tmp_path, 1, 2)
    (tmp_path / name(1)).chmod(0o555)
    with without_privileges():
        saving = CheckpointManager(tmp_path, SINGLE_PROCESS, keep=1)
        saving.save(3, tensors(3), {"step": 3})
        with pytest.raises(RunError, match=r"old checkpoints in .* cannot be removed \(Permission denied\)"):
            saving.wait()
    assert found(tmp_path) == 3


# keeping


def wanted(steps: list[int], keep: int, others: set[int | None]) -> list[int]:
    return sorted({*sorted(steps)[-keep:], *(step for step in steps if step in others)}, reverse=True)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    rng = random.Random(0)
    for trial in range(40):
        folder = tmp_path / str(trial)
        steps = rng.sample(range(1, 2000), rng.randint(1, 9))
        for step in steps:
            (folder / name(step) / "inner").mkdir(parents=True)
        keep, others = rng.randint(1, 4), {rng.choice(steps), rng.choice([*steps, 5000])}
        retain(folder, keep, {*others, None})
        assert kept(folder) == wanted(steps, keep, others)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_keeps_its_best_until_there_is_a_better_one(keep: int, tmp_path: Path) -> None:
    best = {1: None, 2: 1, 3: 1, 4: 1, 5: 4, 6: 4}
    by_step = {1: [1], 2: [2, 1], 3: [3, 1], 4: [4, 1], 5: [5, 4], 6: [6, 4]}
    with CheckpointManager(tmp_path, SINGLE_PROCESS, keep=keep) as saving:
        for step in range(1, 7):
            saving.save(step, tensors(step), {"step": step}, best[step])
            saving.wait()
            assert kept(tmp_path) == (by_step[step] if keep == 1 else wanted([*range(1, step + 1)], 2, {best[step]}))


def test_the_one_just_written_is_kept_even_among_later_ones(tmp_path: Path) -> None:
    put(tmp_path, 8, 12)
    spoil(tmp_path, 8, 12)
    with CheckpointManager(tmp_path, SINGLE_PROCESS, keep=1) as saving:
        saving.save(4, tensors(4), {"step": 4})
    assert 4 in steps_in(tmp_path)
    assert found(tmp_path) == 4


def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    put(tmp_path, 1, 2, 3)
    others = ("best.safetensors", "step-x", "step-00000009.bak", "damaged-step-00000007", "notes")
    for other in others:
        (tmp_path / other).mkdir()
    (tmp_path / "step-00000010").write_text("a file where a folder should be")
    assert list(steps_in(tmp_path)) == [3, 2, 1]
    retain(tmp_path, 1, set())
    assert list(steps_in(tmp_path)) == [3]
    assert {*others, "step-00000010"} <= {*names(tmp_path)}
    assert found(tmp_path) == 3


def test_steps_are_numbers_and_not_words(tmp_path: Path) -> None:
    steps = [999_999_999, 100_000_000, 99_999_999, 10, 9]
    for step in steps:
        (tmp_path / name(step)).mkdir()
    assert list(steps_in(tmp_path)) == steps
    assert steps_in(tmp_path / "gone") == {}


def test_an_old_one_that_lies_elsewhere_is_let_go_of(tmp_path: Path) -> None:
    """A link in place of a folder, as who is short of space makes it."""
    put(tmp_path / "elsewhere", 1)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / name(1)).symlink_to(tmp_path / "elsewhere" / name(1))
    assert found(tmp_path / "c") == 1
    with CheckpointManager(tmp_path / "c", SINGLE_PROCESS, keep=1) as saving:
        saving.save(2, tensors(2), {"step": 2})
    assert kept(tmp_path / "c") == [2]


# finding


def test_the_newest_sound_one_is_found_and_damaged_ones_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest(tmp_path) is None
    assert newest(tmp_path / "gone") is None
    put(tmp_path, 4, 8, 12)
    assert found(tmp_path) == 12
    assert [told for told in caplog.records if told.name.startswith("allmlp")] == []
    spoil(tmp_path, 12)
    with caplog.at_level(logging.WARNING):
        assert found(tmp_path) == 8
    (told,) = (record.getMessage() for record in caplog.records if record.name.startswith("allmlp"))
    assert str(tmp_path / name(12) / STATE) in told
    assert told.endswith("an older checkpoint is used")
    spoil(tmp_path, 8)
    assert found(tmp_path) == 4
    spoil(tmp_path, 4)
    with pytest.raises(RunError, match=r"none of the 3 checkpoints in .* is sound \(.*step-00000012.*\): train again"):
        newest(tmp_path)


def test_any_combination_of_damaged_ones(tmp_path: Path) -> None:
    steps = [4, 8, 12, 16]
    put(tmp_path / "whole", *steps)
    for bits in range(15):
        folder = tmp_path / str(bits)
        shutil.copytree(tmp_path / "whole", folder)
        damaged = [step for i, step in enumerate(steps) if bits >> i & 1]
        spoil(folder, *damaged)
        expected = max({*steps} - {*damaged})
        assert found(folder) == expected
        set_aside(folder, expected)
        assert max(steps_in(folder)) == expected == found(folder)
        assert {n for n in names(folder) if n.startswith("damaged-")} == {
            f"damaged-{name(step)}" for step in steps if step > expected
        }


def test_an_empty_folder_of_a_checkpoint_is_damaged(tmp_path: Path) -> None:
    put(tmp_path, 4)
    (tmp_path / name(8)).mkdir()
    assert found(tmp_path) == 4


def test_the_newest_of_a_stranger_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "c", 4)
    with monkeypatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
        put(tmp_path / "c", 8)
    with pytest.raises(UserError, match="step-00000008 was not written by a run of yours"):
        newest(tmp_path / "c")
    sound = newest(tmp_path / "c", trusted=True)
    assert sound is not None
    assert sound[1] == {"step": 8}


def test_one_under_the_name_of_another_step_is_not_what_it_says(tmp_path: Path) -> None:
    """Copied or renamed by hand: its folder must not be set aside, nor the step be counted as the name's."""
    put(tmp_path, 4, 8)
    shutil.copytree(tmp_path / name(8), tmp_path / name(99))
    sound = newest(tmp_path)
    assert sound is not None
    set_aside(tmp_path, sound[1]["step"])
    assert sound[0].is_dir()
    assert sound[0] == tmp_path / name(8)


def test_setting_aside_twice(tmp_path: Path) -> None:
    for _ in range(2):
        put(tmp_path, 4, 8)
        set_aside(tmp_path, 4)
        assert list(steps_in(tmp_path)) == [4]
    assert names(tmp_path) == ["damaged-step-00000008", name(4)]


# after a kill


def test_what_a_killed_run_left_is_tidied(tmp_path: Path) -> None:
    put(tmp_path, 4, 8)
    for rest in (".step-00000012.partial", ".step-00000004.replaced", ".step-00000001.removed"):
        shutil.copytree(tmp_path / name(4), tmp_path / rest)
    (tmp_path / name(8)).rename(tmp_path / ".step-00000008.replaced")
    tidy(tmp_path)
    assert kept(tmp_path) == [8, 4]
    assert found(tmp_path) == 8


def test_weights_that_a_killed_run_was_writing_are_tidied(tmp_path: Path) -> None:
    """They lie beside best.safetensors and last.safetensors, as large as these."""
    for rest in (".best.safetensors.k3_x9a2b", ".last.safetensors.8s7d6f5g"):
        (tmp_path / rest).write_bytes(bytes(100))
    for other in ("best.safetensors", "last.safetensors"):
        (tmp_path / other).write_bytes(bytes(100))
    tidy(tmp_path)
    assert names(tmp_path) == ["best.safetensors", "last.safetensors"]


class Killed(BaseException):
    """As SIGKILL: nothing is cleaned up after it."""


class Dying:
    """From the call of an action on, counted from 1, no file is renamed or removed any more."""

    def __init__(self, patch: pytest.MonkeyPatch, action: str, at: int) -> None:
        self.left, self.action = at, action
        for owner, what in ((Path, "rename"), (shutil, "rmtree")):
            patch.setattr(owner, what, self.around(getattr(owner, what), what))

    def around(self, original: Callable[..., Any], what: str) -> Callable[..., Any]:
        def replaced(*words: Any, **options: Any) -> Any:
            self.left -= what == self.action
            if self.left <= 0:
                raise Killed
            return original(*words, **options)

        return replaced


@pytest.mark.parametrize("action", ["rename", "rmtree"])
def test_killed_anywhere_there_is_always_a_sound_one(
    action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every change of names, of a save that replaces a checkpoint and removes another, keeping one."""
    survived = False
    for at in range(1, 11):
        folder = tmp_path / f"{action}-{at}"
        put(folder, 2, 4)
        if at % 2:
            put(folder, 8)
        with monkeypatch.context() as patch:
            Dying(patch, action, at)
            try:
                write(folder / name(8), tensors(8), {"step": 8}, SINGLE_PROCESS)
                retain(folder, 1, {8})
                survived = True
            except Killed:
                pass
        tidy(folder)
        assert found(folder) in (4, 8)
        with CheckpointManager(folder, SINGLE_PROCESS, keep=1) as saving:
            saving.save(12, tensors(12), {"step": 12})
        assert kept(folder) == [12]
        assert json.loads((folder / name(12) / STATE).read_text()) == {"step": 12}
    assert survived
