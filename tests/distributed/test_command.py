"""``mixer`` on several ranks: who says what, how often, and with which exit status."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import Left, run

WORDS = (
    *("train", "digits", "--steps", 4, "--evaluate-every-steps", 2, "--global-batch-size", 32, "--warmup-steps", 0),
    *("--log-every-steps", 1, "--workers", 0, "--compile", "off", "--device", "cpu", "--precision", "float32"),
    *("--num-blocks", 1, "--hidden-dim", 16, "--tokens-mlp-dim", 8, "--channels-mlp-dim", 32),
)


def command(*words: str) -> int:
    from allmlp.cli import main

    return main(list(words))


def mixer(world_size: int, *words: object) -> list[Left]:
    """What each rank leaves of ``mixer WORDS``."""
    return run(command, world_size, *map(str, words))


def lines(left: list[Left]) -> list[str]:
    """What standard error tells of failures, of all ranks."""
    return [line for one in left for line in one.err.splitlines() if line.startswith("mixer: ")]


def test_one_rank_speaks_for_all(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = (*WORDS, "--shard", "--recompute", "--ema-decay", 0.9, "--keep", "best", "--patience", 1, "--out", out)
    first, second = mixer(2, *words, "--json")
    assert (first.status, second.status) == (0, 0), first.err + second.err
    summary = json.loads(first.out)
    assert (summary["processes"], summary["sharded"], summary["out"]) == (2, True, str(out))
    assert second.out == ""
    assert second.err == ""
    assert first.err.count("val top-1") == len([m for m in read_metrics(out) if "val_top1" in m])

    left = mixer(2, *words, "--resume", "auto", "--json")
    assert [one.status for one in left] == [0, 0]
    assert json.loads(left[0].out) == summary
    assert "".join(one.err for one in left) == f"{out} is complete: nothing is left to do\n"

    left = mixer(2, *words)
    told = f"{out} exists: go on with it by --resume {out}, name another folder with --out, or remove it"
    assert [one.status for one in left] == [2, 2]
    assert [re.sub(r"rank \d: ", "", line) for line in lines(left)] == [f"mixer: {told}"]


def read_metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_data_that_is_not_there_is_a_mistake_of_the_call_on_all_ranks(tmp_path: Path) -> None:
    begun = time.monotonic()
    left = mixer(2, *WORDS, "--data", tmp_path / "absent", "--out", tmp_path / "run")
    assert time.monotonic() - begun < 15
    assert [one.status for one in left] == [2, 2]
    (told,) = lines(left)  # by one of them
    assert re.match(rf"mixer: rank \d: no data at '{tmp_path / 'absent'}'", told)
    assert not (tmp_path / "run").exists()


def test_a_step_that_cannot_be_shared_out_is_told_with_what_could(tmp_path: Path) -> None:
    left = mixer(3, *WORDS, "--out", tmp_path / "run")
    assert [one.status for one in left] == [2, 2, 2]
    told = "--global-batch-size 32 on 3 processes: must be a multiple of 3, such as 30"
    assert [re.sub(r"rank \d: ", "", line) for line in lines(left)] == [f"mixer: {told}"]


@pytest.mark.parametrize(
    ("environment", "words", "named"),
    [
        ({"WORLD_SIZE": "2"}, (), "RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, (), "MASTER_ADDR"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, (), "WORLD_SIZE"),
        ({"WORLD_SIZE": "1", "RANK": "0"}, ("--processes", "2"), "--processes 2"),
        ({"RANK": "0"}, ("--processes", "2"), "--processes 2"),
    ],
    ids=["no rank", "no place to meet", "no number", "a world of one", "a rank alone"],
)
def test_half_an_environment_is_a_mistake_of_the_call(
    environment: dict[str, str], words: tuple[str, ...], named: str, tmp_path: Path
) -> None:
    left = run(in_environment, 1, environment, [*map(str, WORDS), "--out", str(tmp_path / "run"), *words])[0]
    assert (left.value if left.status == 0 else left.status) == 2, left.err[-1000:]
    (line,) = lines([left])
    assert named in line
    assert "Error" not in line
    assert "Traceback" not in left.err


def in_environment(environment: dict[str, str], words: list[str]) -> int:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    return command(*words)


def test_the_rate_of_a_transfer_is_searched_on_two_processes(
    colour_weights: Path, pictures: Callable[[Path, dict[str, int]], Path], tmp_path: Path
) -> None:
    """Through the launcher; then the rest of the same transfer by one process, which finds nothing left to do."""
    data = pictures(tmp_path / "data", {"blue": 20, "green": 20, "red": 20})
    out = tmp_path / "out"
    words = (
        *("finetune", colour_weights, "--data", data, "--out", out, "--learning-rates", "0.01", "0.1", "--seeds", 2),
        *("--steps", 4, "--global-batch-size", 8, "--warmup-steps", 0, "--workers", 0, "--compile", "off"),
        *("--device", "cpu", "--precision", "float32", "--json"),
    )
    ended = called(*words, "--processes", 2)
    assert ended.returncode == 0, ended.stderr
    summary = json.loads(ended.stdout)
    assert summary["processes"] == 2
    assert set(summary["search"]) == {"0.01", "0.1"}
    assert len(summary["test_top1s"]) == 2
    assert {path.name for path in out.iterdir()} >= {"search", "seed-0", "seed-1", "model.safetensors", "report.html"}
    assert ended.stderr.count("learning rate 0.01: held-out") == 1
    assert [one.status for one in mixer(1, *words)] == [0]


def called(*words: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", "allmlp.cli", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize("spread", [(), ("--shard",)], ids=["replicas", "shares"])
def test_sgd_on_two_ranks(spread: tuple[str, ...], tmp_path: Path) -> None:
    left = mixer(2, *WORDS, "--optimizer", "sgd", "--out", tmp_path / "run", *spread)
    assert [one.status for one in left] == [0, 0], lines(left)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [(), ("--shard",)], ids=["replicas", "shares"])
def test_two_ranks_compile(spread: tuple[str, ...], tmp_path: Path) -> None:
    extra = ("--micro-batch-size", 8, "--dropout", 0.1, "--recompute", "--ema-decay", 0.9, *spread)
    plain = mixer(2, *WORDS, *extra, "--out", tmp_path / "plain")
    assert [one.status for one in plain] == [0, 0], lines(plain)
    words = ["on" if word == "off" else word for word in WORDS]
    made = called(*words, *extra, "--processes", 2, "--out", tmp_path / "compiled", "--json")
    assert made.returncode == 0, made.stderr[-3000:]
    assert json.loads(made.stdout)["compiled"] is True
    losses = [[m["loss"] for m in read_metrics(tmp_path / name) if "loss" in m] for name in ("plain", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
@pytest.mark.parametrize("steps", [0, 3], ids=["as it begins", "in its steps"])
def test_ranks_end_soon_after_their_launcher_was_killed(steps: int, tmp_path: Path) -> None:
    words = [100_000 if word == 4 else word for word in WORDS]
    line = [sys.executable, "-m", "allmlp.cli", *map(str, words), "--processes", "2", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    consumed = tmp_path / "run/consumed.jsonl"
    world_size: list[int] = []
    limit = time.monotonic() + 60
    while len(world_size) < 2 or (steps and not (consumed.exists() and consumed.read_text().count("\n") >= steps)):
        assert time.monotonic() < limit
        time.sleep(0.05)
        world_size = [int(pid) for pid in children.read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    try:
        limit = time.monotonic() + 20
        while any(map(alive, world_size)) and time.monotonic() < limit:
            time.sleep(0.1)
        assert not any(map(alive, world_size))
    finally:
        for pid in filter(alive, world_size):
            os.kill(pid, signal.SIGKILL)


AGAIN = """
import os, sys
from allmlp.training.optimizer_step import Update
original, calls = Update.__call__, []
def failing(*words):
    calls.append(1)
    if len(calls) == 3 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        raise ArithmeticError("in the first attempt")
    return original(*words)
Update.__call__ = failing
from allmlp.cli import main
sys.exit(main())
"""


@pytest.mark.slow
def test_torchrun_may_start_the_ranks_again(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(AGAIN)
    agent = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", str(program))
    words = [*map(str, WORDS), "--out", str(tmp_path / "run"), "--resume", "auto", "--json"]
    process = subprocess.Popen(
        [sys.executable, *agent, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, err = process.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.communicate()
        pytest.fail("the second attempt did not come to an end")
    assert process.returncode == 0, err[-3000:]
    assert json.loads(out)["steps"] == 4
