"""A process that loads images fails, dies or hangs, in every command that starts some: one line, status 1, an end."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest

from allmlp.data import workers
from allmlp.data.stores import FolderStore
from allmlp.errors import RunError

SMALL = ("--image-size", 16, "--patch-size", 8, "--epochs", 2, "--global-batch-size", 16, "--compile", "off")
MODEL = ("--num-blocks", 1, "--hidden-dim", 16, "--tokens-mlp-dim", 8, "--channels-mlp-dim", 32)
COMMANDS = {
    "train": ("train", "--data", "data", *SMALL, *MODEL, "--out", "run"),
    "finetune": ("finetune", "w.safetensors", "--data", "data", *SMALL[4:], "--out", "run"),
    "evaluate": ("evaluate", "w.safetensors", "--data", "data", "--part", "all", "--batch-size", 8),
}
SECONDS = 30
FORKED = pytest.mark.skipif(sys.platform != "linux", reason="the fault reaches the workers by fork")


@pytest.fixture(autouse=True)
def quick_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch looks for dead workers every 5 s; here more often."""
    monkeypatch.setattr(workers.LoaderIterator._try_get_data, "__defaults__", (0.5,))


def fail(kind: str) -> None:
    match kind:
        case "raises":
            raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stuck":
            time.sleep(1000)


@pytest.fixture
def data(pictures, color_weights, tmp_path, monkeypatch) -> Path:
    """The working folder, with data and weights."""
    pictures(tmp_path / "data", {"red": 24, "blue": 24, "green": 24})
    shutil.copy(color_weights, tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


@FORKED
@pytest.mark.parametrize(
    ("command", "kind", "said"),
    [
        ("train", "killed", "killed by signal 9"),
        ("train", "raises", "No space left on device"),
        pytest.param("train", "stuck", "nothing for 1 s", marks=pytest.mark.slow),
        pytest.param("finetune", "killed", "killed by signal 9", marks=pytest.mark.slow),
        ("finetune", "raises", "No space left on device"),
        pytest.param("finetune", "stuck", "nothing for 1 s", marks=pytest.mark.slow),
        pytest.param("evaluate", "killed", "killed by signal 9", marks=pytest.mark.slow),
        ("evaluate", "raises", "No space left on device"),
        ("evaluate", "stuck", "nothing for 1 s"),
    ],
)
def test_a_failing_worker_ends_the_command(mixer, data, monkeypatch, command, kind, said) -> None:
    read = FolderStore.open

    def read_or_fail(store: FolderStore, name: str, *args: object) -> object:
        if "007" in name and multiprocessing.parent_process() is not None:
            fail(kind)
        return read(store, name, *args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(FolderStore, "open", read_or_fail)
    if kind == "stuck":
        monkeypatch.setattr(workers, "STUCK_SECONDS", 1)
    before = time.monotonic()
    answer = mixer(*COMMANDS[command], "--workers", 2)
    assert time.monotonic() - before < SECONDS
    assert answer.status == 1
    assert len(answer.errors) == 1
    assert said in answer.last
    assert "--workers 0" in answer.last
    assert "Traceback" not in answer.err
    assert multiprocessing.active_children() == []


@FORKED
@pytest.mark.parametrize("kind", ["killed", pytest.param("raises", marks=pytest.mark.slow)])
def test_a_failing_worker_ends_all_ranks(data, tmp_path, kind) -> None:
    """The fault is in the workers of rank 1."""
    fault = {"killed": "os.kill(os.getpid(), 9)", "raises": "raise ValueError('no room')"}[kind]
    program = f"""
    import multiprocessing, os
    from allmlp.data.stores import FolderStore
    read = FolderStore.open
    def read_or_fail(store, name, *args):
        if "7" in name and multiprocessing.parent_process() is not None and os.environ.get("RANK") == "1":
            {fault}
        return read(store, name, *args)
    FolderStore.open = read_or_fail
    """
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(textwrap.dedent(program))
    paths = [str(tmp_path / "site"), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    words = map(str, (*COMMANDS["train"], "--processes", 2, "--device", "cpu", "--workers", 2))
    done = subprocess.run(
        [sys.executable, "-m", "allmlp.cli", *words], env=environment, capture_output=True, text=True, timeout=90
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("mixer: ")]
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert any("rank 1" in line and "--workers 0" in line for line in errors), done.stderr


def test_a_zip_that_is_replaced_or_removed_while_it_is_read(mixer, data, tmp_path, monkeypatch) -> None:
    """Removed: a failure. Replaced: its images are unreadable, up to the limit."""
    packed = Path(shutil.make_archive("data", "zip", data))
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as file:
        file.writestr("red/other.png", b"")
    plan = workers.plan_workers
    actions = [packed.unlink, lambda: other.replace(packed)]

    def act_and_plan(*args: int) -> object:  # when the images are about to be loaded
        actions.pop(0)()
        return plan(*args)

    monkeypatch.setattr("allmlp.data.loader.plan_workers", act_and_plan)
    words = [word if word != "data" else packed for word in COMMANDS["evaluate"]]
    answer = mixer(*words, "--workers", 2)
    assert (answer.status, len(answer.errors)) == (1, 1), answer.err
    assert "data.zip is gone: put it back" in answer.last
    shutil.make_archive("data", "zip", data)
    answer = mixer(*words, "--workers", 2)
    assert (answer.status, len(answer.errors)) == (2, 1), answer.err
    assert "no longer in the zip" in answer.last


def test_a_failure_keeps_its_status(mixer, data, monkeypatch) -> None:
    def gone(*_: object) -> None:
        raise RunError("the server is gone: try again")

    monkeypatch.setattr(FolderStore, "open", gone)
    for count in (0, 2):
        answer = mixer(*COMMANDS["evaluate"], "--workers", count)
        assert (answer.status, answer.last) == (1, "mixer: the server is gone: try again")
