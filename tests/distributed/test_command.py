"""``mixer`` on several ranks: which rank prints what, how often, and the exit statuses."""

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
from ranks import Outcome, run_ranks

WORDS = (
    *("train", "digits", "--steps", 4, "--evaluate-every-steps", 2, "--global-batch-size", 32, "--warmup-steps", 0),
    *("--log-every-steps", 1, "--workers", 0, "--compile", "off", "--device", "cpu", "--precision", "float32"),
    *("--num-blocks", 1, "--hidden-dim", 16, "--tokens-mlp-dim", 8, "--channels-mlp-dim", 32),
)


def command(*words: str) -> int:
    from allmlp.cli import main

    return main(list(words))


def mixer(world_size: int, *words: object) -> list[Outcome]:
    """``mixer WORDS`` on each rank."""
    return run_ranks(command, world_size, *map(str, words))


def failures(outcomes: list[Outcome]) -> list[str]:
    """The messages about failures on standard error, of all ranks."""
    return [line for outcome in outcomes for line in outcome.err.splitlines() if line.startswith("mixer: ")]


def test_rank_0_prints_for_all(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = (*WORDS, "--shard", "--recompute", "--ema-decay", 0.9, "--keep", "best", "--patience", 1, "--out", out)
    first, second = mixer(2, *words, "--json")
    assert (first.status, second.status) == (0, 0), first.err + second.err
    summary = json.loads(first.out)
    assert (summary["processes"], summary["sharded"], summary["out"]) == (2, True, str(out))
    assert second.out == ""
    assert second.err == ""
    assert first.err.count("val top-1") == len([m for m in read_metrics(out) if "val_top1" in m])

    outcomes = mixer(2, *words, "--resume", "auto", "--json")
    assert [outcome.status for outcome in outcomes] == [0, 0]
    assert json.loads(outcomes[0].out) == summary
    assert "".join(outcome.err for outcome in outcomes) == f"{out} is complete: nothing is left to do\n"

    outcomes = mixer(2, *words)
    message = f"{out} exists: resume it with --resume {out}, name another folder with --out, or remove it"
    assert [outcome.status for outcome in outcomes] == [2, 2]
    assert without_rank(failures(outcomes)) == [f"mixer: {message}"]


def without_rank(messages: list[str]) -> list[str]:
    return [re.sub(r"rank \d: ", "", message) for message in messages]


def read_metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_missing_data_is_a_user_error_on_all_ranks(tmp_path: Path) -> None:
    start = time.monotonic()
    outcomes = mixer(2, *WORDS, "--data", tmp_path / "absent", "--out", tmp_path / "run")
    assert time.monotonic() - start < 15
    assert [outcome.status for outcome in outcomes] == [2, 2]
    (message,) = failures(outcomes)  # of one rank
    assert re.match(rf"mixer: rank \d: no data at '{tmp_path / 'absent'}'", message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "words", "named"),
    [
        ("WORLD_SIZE=2", (), "RANK"),
        ("WORLD_SIZE=2 RANK=0", (), "MASTER_ADDR"),
        ("WORLD_SIZE=two RANK=0", (), "WORLD_SIZE"),
        ("WORLD_SIZE=1 RANK=0", ("--processes", "2"), "--processes 2"),
        ("RANK=0", ("--processes", "2"), "--processes 2"),
    ],
)
def test_an_incomplete_environment_is_a_user_error(
    environment: str, words: tuple[str, ...], named: str, tmp_path: Path
) -> None:
    given = dict(variable.split("=") for variable in environment.split())
    (outcome,) = run_ranks(in_environment, 1, given, [*map(str, WORDS), "--out", str(tmp_path / "run"), *words])
    assert (outcome.value if outcome.status == 0 else outcome.status) == 2, outcome.err[-1000:]
    (message,) = failures([outcome])
    assert named in message
    assert "Traceback" not in outcome.err


def in_environment(environment: dict[str, str], words: list[str]) -> int:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    return command(*words)


def test_two_processes_search_the_learning_rate_of_a_transfer(
    color_weights: Path, pictures: Callable[[Path, dict[str, int]], Path], tmp_path: Path
) -> None:
    """Started by the launcher; then one process repeats the command, and finds that the fine-tuning is complete."""
    data = pictures(tmp_path / "data", {"blue": 20, "green": 20, "red": 20})
    out = tmp_path / "out"
    words = (
        *("finetune", color_weights, "--data", data, "--out", out, "--learning-rates", "0.01", "0.1", "--seeds", 2),
        *("--steps", 4, "--global-batch-size", 8, "--warmup-steps", 0, "--workers", 0, "--compile", "off"),
        *("--device", "cpu", "--precision", "float32", "--json"),
    )
    ended = run_command(*words, "--processes", 2)
    assert ended.returncode == 0, ended.stderr
    summary = json.loads(ended.stdout)
    assert summary["processes"] == 2
    assert set(summary["search"]) == {"0.01", "0.1"}
    assert len(summary["test_top1s"]) == 2
    assert {path.name for path in out.iterdir()} >= {"search", "seed-0", "seed-1", "model.safetensors", "report.html"}
    assert ended.stderr.count("learning rate 0.01: held-out") == 1
    assert [outcome.status for outcome in mixer(1, *words)] == [0]


def run_command(*words: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "allmlp.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize("mode", [(), ("--shard",)], ids=["DDP", "FSDP2"])
def test_sgd_on_two_ranks(mode: tuple[str, ...], tmp_path: Path) -> None:
    outcomes = mixer(2, *WORDS, "--optimizer", "sgd", "--out", tmp_path / "run", *mode)
    assert [outcome.status for outcome in outcomes] == [0, 0], failures(outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [(), ("--shard",)], ids=["DDP", "FSDP2"])
def test_two_ranks_with_compilation(mode: tuple[str, ...], tmp_path: Path) -> None:
    extra = ("--micro-batch-size", 8, "--dropout", 0.1, "--recompute", "--ema-decay", 0.9, *mode)
    plain = mixer(2, *WORDS, *extra, "--out", tmp_path / "plain")
    assert [outcome.status for outcome in plain] == [0, 0], failures(plain)
    words = ["on" if word == "off" else word for word in WORDS]
    ended = run_command(*words, *extra, "--processes", 2, "--out", tmp_path / "compiled", "--json")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert json.loads(ended.stdout)["compiled"] is True
    losses = [[m["loss"] for m in read_metrics(tmp_path / name) if "loss" in m] for name in ("plain", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
@pytest.mark.parametrize("steps", [0, 3], ids=["at the start", "during steps"])
def test_ranks_end_soon_after_their_launcher_is_killed(steps: int, tmp_path: Path) -> None:
    words = [100_000 if word == 4 else word for word in WORDS]
    command = [sys.executable, "-m", "allmlp.cli", *map(str, words), "--processes", "2", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    consumed = tmp_path / "run/consumed.jsonl"
    ranks: list[int] = []
    limit = time.monotonic() + 60
    while len(ranks) < 2 or (steps and not (consumed.exists() and consumed.read_text().count("\n") >= steps)):
        assert time.monotonic() < limit
        time.sleep(0.05)
        ranks = [int(pid) for pid in children.read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    try:
        limit = time.monotonic() + 20
        while any(map(is_running, ranks)) and time.monotonic() < limit:
            time.sleep(0.1)
        assert not any(map(is_running, ranks))
    finally:
        for pid in filter(is_running, ranks):
            os.kill(pid, signal.SIGKILL)


FAILS_ONCE = """
import os, sys
from allmlp.training.optimizer_step import OptimizerStep
original, calls = OptimizerStep.__call__, []
def failing(*arguments):
    calls.append(1)
    if len(calls) == 3 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        raise ArithmeticError("in the first attempt")
    return original(*arguments)
OptimizerStep.__call__ = failing
from allmlp.cli import main
sys.exit(main())
"""


@pytest.mark.slow
def test_torchrun_may_restart_the_ranks(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(FAILS_ONCE)
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
        pytest.fail("the second attempt did not end")
    assert process.returncode == 0, err[-3000:]
    assert json.loads(out)["steps"] == 4
