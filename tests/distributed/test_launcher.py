"""The processes that ``--processes`` starts: what becomes of the call when one of them ends otherwise than well."""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from allmlp.distributed import launcher as module
from allmlp.distributed.launcher import LaunchConfig, launch, start_process, wait_for

LONG = "import time; time.sleep(60)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x', flush=True); time.sleep(60)"


def stand_in(code: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.DEVNULL)


def launched(monkeypatch: pytest.MonkeyPatch, codes: Sequence[str]) -> tuple[int, float, list[int]]:
    """The exit status for ranks that do no more than this, the seconds until then, and how each of them ended."""
    children: list[subprocess.Popen[bytes]] = []

    def begin(config: LaunchConfig, rank: int, host: str, port: int, words: Sequence[str]) -> "subprocess.Popen[bytes]":
        assert host == "127.0.0.1"
        assert port > 0
        children.append(stand_in(codes[rank]))
        return children[-1]

    monkeypatch.setattr(module, "start_process", begin)
    monkeypatch.setattr(module, "GRACE", 1.0)
    begun = time.monotonic()
    try:
        status = launch(LaunchConfig(nproc_per_node=len(codes)), ["train"])
        return status, time.monotonic() - begun, [child.wait(10) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()


@pytest.mark.parametrize("status", [0, 1, 2, 3, 130, 143])
def test_the_exit_status_is_the_ranks_own(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _, _ = launched(monkeypatch, [f"raise SystemExit({status})"] * 3)
    assert found == status


@pytest.mark.parametrize("status", [1, 2])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_one_that_failed_ends_the_others(
    status: int, rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = [LONG] * 3
    codes[rank] = f"raise SystemExit({status})"
    found, seconds, ended = launched(monkeypatch, codes)
    assert found == status
    assert seconds < 10
    assert [code for i, code in enumerate(ended) if i != rank] == [-signal.SIGKILL] * 2
    told = capsys.readouterr().err.splitlines()
    assert told == [f"mixer: rank {i} did not end with the others: killed" for i in range(3) if i != rank]


def test_the_first_that_fails_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    late = "import time; time.sleep(0.5); raise SystemExit(1)"
    assert launched(monkeypatch, [late, "raise SystemExit(2)", late])[0] == 2


def test_one_that_was_killed_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    kill = "import os, time; time.sleep(0.2); os.kill(os.getpid(), 9)"
    status, _, _ = launched(monkeypatch, ["import time; time.sleep(0.5)", kill])
    assert status == 1
    assert capsys.readouterr().err == "mixer: rank 1 was ended by signal 9 (SIGKILL)\n"


def test_one_that_was_killed_is_named_even_if_others_have_failed_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Both have ended before anyone looks: rank 0 because its connection to rank 1 broke."""
    children = [stand_in("raise SystemExit(1)"), stand_in("import os; os.kill(os.getpid(), 9)")]
    for child in children:
        child.wait(10)
    assert wait_for(children) == 1
    assert "mixer: rank 1 was ended by signal 9 (SIGKILL)\n" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_one_that_a_signal_ended_before_it_could_heed_it_was_stopped(number: signal.Signals, status: int) -> None:
    """In its first moments Python knows of no handler: the exit status is that of a run that can be gone on with."""
    child = stand_in(f"import os, signal; signal.signal({number}, signal.SIG_DFL); os.kill(os.getpid(), {number})")
    child.wait(10)
    assert wait_for([child]) == status


def test_a_signal_to_the_launcher_reaches_all_and_all_have_time_to_save(tmp_path: Path) -> None:
    rank = (
        "import signal, sys, time\n"
        "def heed(number, frame):\n    time.sleep(1.5); raise SystemExit(128 + number)\n"
        "signal.signal(signal.SIGTERM, heed); print('there\\n', end='', flush=True); time.sleep(60)"
    )
    program = (
        "import subprocess, sys\n"
        "from allmlp.distributed import launcher\n"
        "launcher.GRACE = 0.5\n"
        f"launcher.start_process = lambda *words: subprocess.Popen([sys.executable, '-S', '-c', {rank!r}])\n"
        "sys.exit(launcher.launch(launcher.LaunchConfig(nproc_per_node=2), []))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(2):
        assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (143, "")


def test_ranks_get_what_torchrun_gives_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "told"
    program = tmp_path / "program"
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
    program.write_text(f'#!/bin/sh\nfor n in {names}; do eval echo "\\$$n"; done > "{told}"\necho "$@" >> "{told}"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    config = LaunchConfig(nproc_per_node=4, nnodes=3, node_rank=2, rdzv_endpoint="node1:29500")
    child = start_process(config, 1, "node1", 29500, ["train", "digits"])
    assert child.wait(10) == 0
    assert told.read_text().split() == ["9", "1", "12", "4", "node1", "29500", "-m", "allmlp.cli", "train", "digits"]
