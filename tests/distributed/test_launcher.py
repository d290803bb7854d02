"""The processes that ``--processes`` starts: the exit status and the messages when one of them fails or is stopped."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from allmlp.distributed import launcher as module
from allmlp.distributed.launcher import LaunchConfig, launch, start_process, wait_for

SLEEP = "import time; time.sleep(60)"


def start_python(code: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.DEVNULL)


def launch_code(monkeypatch: pytest.MonkeyPatch, codes: Sequence[str]) -> tuple[int, float, list[int]]:
    """Launches ranks that run this code: the exit status, the seconds until then, and the status of each rank."""
    children: list[subprocess.Popen[bytes]] = []

    def start(
        config: LaunchConfig, rank: int, endpoint: tuple[str, int], pipe: int, words: Sequence[str]
    ) -> "subprocess.Popen[bytes]":
        assert endpoint[0] == "127.0.0.1"
        assert endpoint[1] > 0
        children.append(start_python(codes[rank]))
        return children[-1]

    monkeypatch.setattr(module, "start_process", start)
    monkeypatch.setattr(module, "GRACE", 1.0)
    begin = time.monotonic()
    try:
        status = launch(LaunchConfig(nproc_per_node=len(codes)), ["train"])
        return status, time.monotonic() - begin, [child.wait(10) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()


@pytest.mark.parametrize("status", [0, 3, 130, 143])
def test_the_exit_status_is_that_of_the_ranks(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _, _ = launch_code(monkeypatch, [f"raise SystemExit({status})"] * 3)
    assert found == status


@pytest.mark.parametrize(("status", "rank"), [(1, 0), (2, 2)])
def test_a_rank_that_fails_ends_the_others(
    status: int, rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = [SLEEP] * 3
    codes[rank] = f"raise SystemExit({status})"
    found, seconds, ended = launch_code(monkeypatch, codes)
    assert found == status
    assert seconds < 10
    assert [code for i, code in enumerate(ended) if i != rank] == [-signal.SIGKILL] * 2
    messages = capsys.readouterr().err.splitlines()
    assert messages == [f"mixer: rank {i} did not end with the others: killed" for i in range(3) if i != rank]


def test_the_exit_status_is_that_of_the_first_rank_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    late = "import time; time.sleep(0.5); raise SystemExit(1)"
    assert launch_code(monkeypatch, [late, "raise SystemExit(2)", late])[0] == 2


def test_a_killed_rank_is_named_even_if_others_failed_because_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Both have ended before the launcher looks: rank 0 because its connection to rank 1 broke."""
    children = [start_python("raise SystemExit(1)"), start_python("import os; os.kill(os.getpid(), 9)")]
    for child in children:
        child.wait(10)
    assert wait_for(children) == 1
    assert "mixer: rank 1 was ended by signal 9 (SIGKILL)\n" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_rank_ended_by_a_signal_before_it_has_a_handler_was_stopped(number: signal.Signals, status: int) -> None:
    """While Python starts there is no handler yet: the exit status is still that of a run that can be resumed."""
    child = start_python(f"import os, signal; signal.signal({number}, signal.SIG_DFL); os.kill(os.getpid(), {number})")
    child.wait(10)
    assert wait_for([child]) == status


def test_a_signal_to_the_launcher_reaches_all_ranks_and_they_have_time_to_save(tmp_path: Path) -> None:
    rank = (
        "import signal, sys, time\n"
        "def handle(number, frame):\n    time.sleep(1.5); raise SystemExit(128 + number)\n"
        "signal.signal(signal.SIGTERM, handle); print('ready\\n', end='', flush=True); time.sleep(60)"
    )
    program = (
        "import subprocess, sys\n"
        "from allmlp.distributed import launcher\n"
        "launcher.GRACE = 0.5\n"
        f"launcher.start_process = lambda *arguments: subprocess.Popen([sys.executable, '-S', '-c', {rank!r}])\n"
        "sys.exit(launcher.launch(launcher.LaunchConfig(nproc_per_node=2), []))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(2):
        assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (143, "")


def test_ranks_get_the_environment_of_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = tmp_path / "printed"
    program = tmp_path / "program"
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
    program.write_text(
        f'#!/bin/sh\nfor n in {names}; do eval echo "\\$$n"; done > "{printed}"\necho "$@" >> "{printed}"\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    config = LaunchConfig(nproc_per_node=4, nnodes=3, node_rank=2, rdzv_endpoint="node1:29500")
    reader, writer = os.pipe()
    child = start_process(config, 1, ("node1", 29500), reader, ["train", "digits"])
    os.close(reader)
    os.close(writer)
    assert child.wait(10) == 0
    assert printed.read_text().split() == ["9", "1", "12", "4", "node1", "29500", "-m", "allmlp.cli", "train", "digits"]
