"""The status of a run, read from its folder alone, whatever the state of the folder."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import LINUX, locked_by_another_process, without_privileges
from small_runs import recipe

from allmlp.checkpointing.checkpoint import STATE, write_checkpoint
from allmlp.checkpointing.manager import checkpoint_name
from allmlp.cli.commands.status import format_duration, status_lines
from allmlp.config.serialize import to_json_object
from allmlp.distributed.context import SINGLE_PROCESS
from allmlp.errors import RunError, UserError
from allmlp.files import to_json
from allmlp.runs.folder import LOCK, is_locked, locked, run_folder
from allmlp.runs.records import METRICS
from allmlp.runs.status import run_status

RECORDS = [
    {"step": 2, "epoch": 1.0, "loss": 1.5},
    {"step": 2, "epoch": 1.0, "val_top1": 0.5, "val_loss": 1.0},
    {"step": 4, "epoch": 2.0, "loss": 1.25, "images_per_second": 48.0, "data_wait": 0.25},
    {"step": 4, "epoch": 2.0, "val_top1": 0.75, "val_loss": 0.9},
    {"step": 5, "epoch": 2.5, "loss": 1.0, "images_per_second": 24.0, "data_wait": 0.5},
    {"step": 6, "epoch": 3.0, "val_top1": 0.75, "val_loss": 0.8},
]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run with 12 images per step, stopped after step 6 of 10."""
    folder = tmp_path / "my run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "recipe.json").write_text(to_json(to_json_object(recipe())))
    (folder / METRICS).write_text("".join(to_json(record) + "\n" for record in RECORDS))
    for step in (2, 4, 6):
        state = {"step": step, "steps": 10, "seconds": 10.0 * step}
        write_checkpoint(folder / "checkpoints" / checkpoint_name(step), {"w": torch.zeros(3)}, state, SINGLE_PROCESS)
    return folder


@pytest.fixture
def training(out: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run's lock, as if it trained the run."""
    with locked_by_another_process(out) as process:
        yield process


def test_all_fields_of_a_stopped_run(out: Path) -> None:
    status = run_status(out)
    assert 0 <= status.pop("saved_seconds_ago") < 60
    assert status == {
        "run": str(out),
        "recipe": "custom",
        "state": "stopped",
        "step": 6,
        "steps": 10,
        "epoch": 3.0,
        "loss": 1.0,
        "val_top1": 0.75,
        "images_per_second": 24.0,
        "data_wait": 0.5,
        "val_majority": None,
        "best": (4, 0.75),  # the first one with the highest accuracy
        "checkpoints": [6, 4, 2],
        "seconds": 60.0,
        "left_seconds": 4 * 12 / 24,
    }
    json.loads(to_json(status))


def test_running_killed_and_finished(out: Path, training: subprocess.Popen[str]) -> None:
    assert run_status(out)["state"] == "running"
    assert is_locked(out)
    with pytest.raises(UserError, match="is being trained by another process: wait for it, or end it"), locked(out):
        pass
    with locked(out, owner=False):
        pass
    training.kill()
    training.wait()
    status = run_status(out)
    assert status["state"] == "stopped"
    assert dict(status_lines(status))["resume"] == f"mixer train --resume '{out}'"
    (out / "summary.json").write_text('{"steps": 6, "train_seconds": 9.0}')
    shutil.rmtree(out / "checkpoints")  # as a complete run leaves it
    status = run_status(out, verify=True)
    found = [status[key] for key in ("state", "steps", "seconds", "left_seconds", "checkpoints", "sound")]
    assert found == ["finished", 6, 9.0, None, [], None]
    assert not {"resume", "checkpoints"} & dict(status_lines(status)).keys()


def test_the_process_that_trains_keeps_its_lock(out: Path) -> None:
    """It may read the status too, although POSIX releases a lock when any descriptor of the file is closed."""
    with locked(out):
        run_status(out)
        tried = subprocess.run([sys.executable, "-c", TRY_LOCK, out / LOCK], capture_output=True, text=True)
    assert tried.stdout == "locked\n"


@LINUX
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_no_obstacle(
    out: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_words: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.lockf", fail)
    done = []
    with locked(out):
        done.append(run_status(out)["step"])
    assert done == [6]
    assert [record.getMessage() for record in caplog.records] == [
        f"the disk of {out} has no file locks: start no other run in this folder meanwhile"
    ]
    assert run_status(out)["state"] == "stopped"
    number = errno.EIO  # a failure, unlike the others
    with pytest.raises(OSError, match="Input/output"), locked(out):
        pass


TRY_LOCK = """
import fcntl, sys
try:
    fcntl.lockf(open(sys.argv[1], "a"), fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("free")
except OSError:
    print("locked")
"""


@LINUX
def test_read_permission_is_enough_and_nothing_is_changed(out: Path) -> None:
    (out / LOCK).touch(0o444)
    before = sorted(path.name for path in out.iterdir())
    out.chmod(0o555)
    with without_privileges():
        assert run_status(out, verify=True)["sound"] == 6
    out.chmod(0o755)
    assert sorted(path.name for path in out.iterdir()) == before


def test_a_run_that_has_just_started(out: Path) -> None:
    (out / METRICS).unlink()
    for path in sorted((out / "checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    status = run_status(out, verify=True)
    assert (status["step"], status["steps"], status["checkpoints"], status["sound"]) == (0, None, [], None)
    assert all(status[key] is None for key in ("epoch", "loss", "val_top1", "best", "saved_seconds_ago", "seconds"))
    lines = dict(status_lines(status))
    assert (lines["step"], lines["checkpoints"], lines["verified"]) == ("0", "none yet", "nothing to verify")
    (out / "checkpoints").rmdir()
    assert run_status(out, verify=True)["checkpoints"] == []


def test_a_folder_without_a_run_and_a_damaged_recipe(out: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "gone", tmp_path / "file"):
        with pytest.raises(UserError, match="is not the folder of a run: name one that mixer train has created"):
            run_status(path)
    for text in ("", "{", "[]", '{"nmae": ""}', "\0\0\0"):
        (out / "recipe.json").write_text(text)
        with pytest.raises(UserError, match="recipe"):
            run_status(out)


def test_malformed_lines_and_states_are_skipped(out: Path) -> None:
    content = (out / METRICS).read_bytes()
    for ending in (
        b'{"step": 7, "lo',
        b"\0" * 100 + b"\n",
        b"5\n",
        b"null\n",
        b"[]\n",
        b'"step"\n',
        b"\xff\xfe\n",
        b"\n",
    ):
        (out / METRICS).write_bytes(content + ending)
        assert (run_status(out)["step"], run_status(out)["loss"]) == (6, 1.0), ending
    (out / METRICS).write_bytes(content + b'{"step": 7, "loss": null}\n')  # it was not a number
    assert run_status(out)["loss"] is None
    assert "loss" not in dict(status_lines(run_status(out)))
    for text in ("", "{", "[]", "null"):
        (out / "checkpoints" / checkpoint_name(6) / STATE).write_text(text)
        status = run_status(out)
        assert (status["steps"], status["seconds"], status["checkpoints"]) == (10, 40.0, [6, 4, 2])


def test_verifying_reads_every_file(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run_status(out, verify=True)["sound"] == 6
    assert "sound" not in run_status(out)
    (file,) = (out / "checkpoints" / checkpoint_name(6)).glob("shard-*")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert run_status(out)["checkpoints"] == [6, 4, 2]
    assert run_status(out, verify=True)["sound"] == 4
    assert "SHA-256 differs" in caplog.text
    for step in (2, 4):
        (out / "checkpoints" / checkpoint_name(step) / STATE).unlink()
    with pytest.raises(RunError, match=r"no checkpoint in .* is intact \(3 damaged: "):
        run_status(out, verify=True)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        checkpoint_name(step) for step in (2, 4, 6)
    ]


# The lines that are printed


def test_the_lines_of_a_stopped_run(out: Path) -> None:
    status = run_status(out, verify=True)
    lines = dict(status_lines(status))
    assert lines["run"] == f"{out}, recipe custom: stopped"
    assert lines["step"] == "6 of 10, epoch 3"
    assert lines["loss"] == "1.0000"
    assert lines["validation"] == "top-1 0.7500 (best 0.7500 at step 4)"
    assert lines["speed"] == "24 images/s, 50% of the time spent waiting for images"
    assert lines["time"] == "1.0 min in steps, about 2 s left"
    assert lines["checkpoints"].startswith("steps 6, 4, 2; the newest ")
    assert lines["verified"] == "step 6 is intact"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1.0 min"), (3599, "60.0 min"), (3600, "1.0 h"), (86_400, "1.0 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


# The lock


def test_the_folder_of_a_run_that_another_process_has_just_started_is_kept(tmp_path: Path) -> None:
    """When two processes create the same folder at once, the one that cannot lock it must not remove it."""
    out = tmp_path / "runs" / "new"

    def start_too_late(other: contextlib.ExitStack) -> None:
        with run_folder(out):
            other.enter_context(locked_by_another_process(out))
            (out / "recipe.json").write_text("the other's")
            with locked(out):
                pass

    with (
        contextlib.ExitStack() as other,
        pytest.raises(UserError, match="is being trained by another process"),
    ):
        start_too_late(other)
    assert (out / "recipe.json").read_text() == "the other's"


def test_a_forked_process_does_not_hold_the_lock(out: Path) -> None:
    """A data-loading process that outlives its run does not keep the run from being resumed."""
    with (out / LOCK).open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        child = os.fork()
        if child == 0:
            time.sleep(20)
            os._exit(0)
    try:
        with locked(out):
            pass
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
