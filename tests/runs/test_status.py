"""Where a run is, told from its folder alone, whatever state that is in."""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fit import recipe
from test_trust import LINUX, without_privileges

from allmlp.checkpointing.checkpoint import STATE, write
from allmlp.checkpointing.manager import name
from allmlp.cli.status import format_duration, status_lines
from allmlp.config.serialize import to_json_object
from allmlp.distributed.context import SINGLE_PROCESS
from allmlp.errors import RunError, UserError
from allmlp.files import to_json
from allmlp.runs.folder import LOCK, is_locked, locked, run_folder
from allmlp.runs.records import METRICS
from allmlp.runs.status import status

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
    """A run of 12 images a step, stopped after step 6 of 10."""
    folder = tmp_path / "my run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "recipe.json").write_text(to_json(to_json_object(recipe())))
    (folder / METRICS).write_text("".join(to_json(record) + "\n" for record in RECORDS))
    for step in (2, 4, 6):
        state = {"step": step, "steps": 10, "seconds": 10.0 * step}
        write(folder / "checkpoints" / name(step), {"w": torch.zeros(3)}, state, SINGLE_PROCESS)
    return folder


HOLDER = """
import fcntl, sys
with open(sys.argv[1], "a") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def training(out: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that trains the run."""
    yield from hold(out)


def hold(out: Path) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", HOLDER, out / LOCK], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.communicate()


def test_all_that_is_known_of_a_stopped_run(out: Path) -> None:
    told = status(out)
    assert 0 <= told.pop("saved_seconds_ago") < 60
    assert told == {
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
        "best": (4, 0.75),  # the first of equals
        "checkpoints": [6, 4, 2],
        "seconds": 60.0,
        "left_seconds": 4 * 12 / 24,
    }
    json.loads(to_json(told))


def test_running_stopped_and_finished(out: Path, training: subprocess.Popen[str]) -> None:
    assert status(out)["state"] == "running"
    training.communicate()
    assert status(out)["state"] == "stopped"
    (out / "summary.json").write_text("{}")
    told = status(out)
    assert (told["state"], told["left_seconds"]) == ("finished", None)


def test_a_run_killed_by_force_is_stopped(out: Path, training: subprocess.Popen[str]) -> None:
    assert status(out)["state"] == "running"
    training.kill()
    training.wait()
    assert status(out)["state"] == "stopped"


def test_asking_takes_nothing_from_the_run(out: Path) -> None:
    """The process that trains may ask too, and keeps its lock (POSIX's go when any descriptor is closed)."""
    with locked(out):
        status(out)
        held = subprocess.run([sys.executable, "-c", TRY, out / LOCK], capture_output=True, text=True)
    assert held.stdout == "taken\n"


TRY = """
import fcntl, sys
try:
    fcntl.lockf(open(sys.argv[1], "a"), fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("free")
except OSError:
    print("taken")
"""


def test_asking_leaves_the_folder_as_it_is(out: Path) -> None:
    before = sorted(path.name for path in out.iterdir())
    status(out, verify=True)
    assert sorted(path.name for path in out.iterdir()) == before


@LINUX
def test_who_may_only_read_may_ask(out: Path) -> None:
    (out / LOCK).touch(0o444)
    out.chmod(0o555)
    with without_privileges():
        assert status(out)["step"] == 6
    out.chmod(0o755)


def test_a_run_that_has_just_begun(out: Path) -> None:
    (out / METRICS).unlink()
    for path in sorted((out / "checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    told = status(out, verify=True)
    assert (told["step"], told["steps"], told["checkpoints"], told["sound"]) == (0, None, [], None)
    assert all(told[key] is None for key in ("epoch", "loss", "val_top1", "best", "saved_seconds_ago", "seconds"))
    words = dict(status_lines(told))
    assert (words["step"], words["checkpoints"], words["verified"]) == ("0", "none yet", "nothing to verify")
    (out / "checkpoints").rmdir()
    assert status(out, verify=True)["checkpoints"] == []


def test_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "gone", tmp_path / "file"):
        with pytest.raises(UserError, match="is no run: name a folder that mixer train has made"):
            status(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"nmae": ""}', "\0\0\0"])
def test_a_damaged_recipe_is_told(text: str, out: Path) -> None:
    (out / "recipe.json").write_text(text)
    with pytest.raises(UserError, match="recipe"):
        status(out)


@pytest.mark.parametrize(
    "ending",
    [b'{"step": 7, "lo', b"\0" * 100 + b"\n", b"5\n", b"null\n", b"[]\n", b'"step"\n', b"\xff\xfe\n", b"\n"],
    ids=repr,
)
def test_lines_that_are_none_are_passed_over(ending: bytes, out: Path) -> None:
    with (out / METRICS).open("ab") as file:
        file.write(ending)
    assert (status(out)["step"], status(out)["loss"]) == (6, 1.0)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_damaged_checkpoint_is_passed_over(text: str, out: Path) -> None:
    (out / "checkpoints" / name(6) / STATE).write_text(text)
    told = status(out)
    assert (told["steps"], told["seconds"], told["checkpoints"]) == (10, 40.0, [6, 4, 2])


def test_verifying_reads_every_file(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert status(out, verify=True)["sound"] == 6
    assert "sound" not in status(out)
    content = (out / "checkpoints" / name(6) / "__0_0.distcp").read_bytes()
    (out / "checkpoints" / name(6) / "__0_0.distcp").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert status(out)["checkpoints"] == [6, 4, 2]
    assert status(out, verify=True)["sound"] == 4
    assert "SHA-256 differs" in caplog.text
    for step in (2, 4):
        (out / "checkpoints" / name(step) / STATE).unlink()
    with pytest.raises(RunError, match="none of the 3 checkpoints"):
        status(out, verify=True)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [name(step) for step in (2, 4, 6)]


def test_another_user_s_run_can_be_verified(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    assert status(out, verify=True)["sound"] == 6


def test_a_loss_that_is_no_number(out: Path) -> None:
    with (out / METRICS).open("a") as file:
        file.write(to_json({"step": 7, "loss": float("nan")}) + "\n")
    told = status(out)
    assert told["loss"] is None
    assert "loss" not in dict(status_lines(told))


# in words


def test_the_words(out: Path) -> None:
    told = status(out, verify=True)
    words = dict(status_lines(told))
    assert words["run"] == f"{out}, recipe custom: stopped"
    assert words["step"] == "6 of 10, epoch 3"
    assert words["loss"] == "1.0000"
    assert words["validation"] == "top-1 0.7500 (best 0.7500 at step 4)"
    assert words["speed"] == "24 images/s, 50% of the time spent waiting for images"
    assert words["time"] == "1.0 min in steps, about 2 s left"
    assert words["checkpoints"].startswith("steps 6, 4, 2; the newest ")
    assert words["verified"] == "step 6 is sound"


def test_the_words_to_go_on_can_be_pasted(out: Path) -> None:
    assert dict(status_lines(status(out)))["resume"] == f"mixer train --resume '{out}'"
    (out / "summary.json").write_text("{}")
    assert "resume" not in dict(status_lines(status(out)))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1.0 min"), (3599, "60.0 min"), (3600, "1.0 h"), (86_400, "1.0 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


# the lock


def test_only_one_process_at_a_time(out: Path, training: subprocess.Popen[str]) -> None:
    with pytest.raises(UserError, match="is being trained by another process: wait for it, or end it"), locked(out):
        pass
    assert is_locked(out)
    with locked(out, owner=False):
        pass
    training.communicate()
    with locked(out):
        pass


def test_the_folder_of_a_run_that_another_process_has_just_begun_stays(tmp_path: Path) -> None:
    """Two that begin at once make the same folder: the one that comes too late must not take it away."""
    out = tmp_path / "runs" / "new"
    holder = hold(out)

    def begin_too_late() -> None:
        with run_folder(out):
            next(holder)
            (out / "recipe.json").write_text("the other's")
            with locked(out):
                pass

    with pytest.raises(UserError, match="is being trained by another process"):
        begin_too_late()
    next(holder, None)
    assert (out / "recipe.json").read_text() == "the other's"


def test_a_forked_process_has_no_share_in_the_lock(out: Path) -> None:
    """A worker that outlives its run does not keep it from being gone on with."""
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


def test_numbers_of_every_field_are_json(out: Path) -> None:
    told: dict[str, Any] = json.loads(to_json(status(out, verify=True)))
    assert told["best"] == [4, 0.75]
    assert told["sound"] == 6
