"""On the command line: resuming a run, launching its processes, and mixer status; mistakes are one line."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

Mixer = Callable[..., Any]
STEPS = ("--steps", "4", "--save-every-steps", "2", "--compile", "off", "--workers", "0")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Started by no launcher, in an empty folder."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def done(mixer: Mixer, tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that is complete."""
    out = tmp_path_factory.mktemp("done") / "run"
    answer = mixer("train", *STEPS, *tiny, "--out", out, "--resume", "auto")
    assert answer.status == 0, answer.err
    return out


@pytest.fixture
def stopped(done: Path, tmp_path: Path) -> Path:
    """The same, had it been killed after step 2."""
    out = tmp_path / "my run"
    shutil.copytree(done, out)
    for name in ("summary.json", "report.html", "model.safetensors"):
        (out / name).unlink()
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    return out


def assert_mistake(answer: Any, *said: str) -> None:
    assert answer.status == 2, answer.err
    assert answer.err.splitlines() == [answer.last]
    assert answer.last.startswith("mixer: ")
    assert answer.out == ""
    for words in said:
        assert words in answer.last


# mistakes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--resume", "auto"], ["--resume auto without --out: name the run's folder"]),
        (["--resume=auto"], ["--resume auto without --out: name the run's folder"]),
        (["digits", "--resume", "auto"], ["--resume auto without --out"]),
        (["--resume", "gone"], ["--resume gone: there is no run", "name its folder, or auto"]),
        (["--resume", "."], ["--resume .: there is no run"]),
        (["digits", "--resume", "gone"], ["--resume gone has its own recipe: leave out the other"]),
        (["--recipe-file", "r.json", "--resume", "gone"], ["--resume gone has its own recipe"]),
        (["--resume"], ["--resume"]),
        (["--resume", "--out", "run"], ["--resume"]),
        (["--processes", "0"], ["--processes 0 --nnodes 1: must be at least 1"]),
        (["--processes", "-1"], ["--processes -1"]),
        (["--nnodes", "0"], ["--processes 1 --nnodes 0: must be at least 1"]),
        (
            ["--nnodes", "2", "--node-rank", "2", "--rdzv-endpoint", "a:1"],
            ["--node-rank 2 of --nnodes 2: must be from 0 to 1"],
        ),
        (["--node-rank", "1"], ["--node-rank 1 of --nnodes 1: must be from 0 to 0"]),
        (["--nnodes", "2", "--node-rank", "-1", "--rdzv-endpoint", "a:1"], ["--node-rank -1 of --nnodes 2"]),
        (["--nnodes", "2"], ["--rdzv-endpoint None: give HOST:PORT of machine 0"]),
        (["--nnodes", "2", "--rdzv-endpoint", "node1"], ["--rdzv-endpoint node1: give HOST:PORT"]),
        (["--nnodes", "2", "--rdzv-endpoint", ":29500"], ["--rdzv-endpoint :29500: give HOST:PORT"]),
        (["--nnodes", "2", "--rdzv-endpoint", "node1:port"], ["--rdzv-endpoint node1:port: give HOST:PORT"]),
        (
            ["--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:99999", "--global-batch-size", "64"],
            ["--rdzv-endpoint 127.0.0.1:99999"],
        ),
        (
            ["--processes", "2", "--rdzv-endpoint", "nonsense", "--global-batch-size", "64"],
            ["--rdzv-endpoint nonsense"],
        ),
        (
            ["--processes", "3", "--global-batch-size", "64"],
            ["--global-batch-size 64 on 3 processes: must be a multiple of 3, such as 63"],
        ),
        (
            ["--processes", "2", "--nnodes", "2", "--rdzv-endpoint", "a:1", "--global-batch-size", "2"],
            ["--global-batch-size 2 on 4 processes: must be a multiple of 4, such as 4"],
        ),
        (
            ["--processes", "2", "--global-batch-size", "64", "--mixup", "0.5", "--mix-group-size", "12"],
            [
                "--mix-group-size 12: the images of a group must be on one process, and each of 2 has 32",
                "divisor of 32",
            ],
        ),
        (
            ["--processes", "2", "--global-batch-size", "48", "--micro-batch-size", "16"],
            ["--micro-batch-size 16: must divide the 24 images of each of 2 processes"],
        ),
        (["--processes", "two"], ["two"]),
        (["--keep-checkpoints", "0"], ["--keep-checkpoints 0: must be above 0"]),
        (["--save-every-steps", "0"], ["--save-every-steps 0: must be above 0"]),
        (["--save-every-minutes", "-1"], ["--save-every-minutes -1"]),
        (["--timeout-seconds", "0"], ["--timeout-seconds 0"]),
        (["--resum", "auto"], ["did you mean --resume"]),
    ],
    ids=" ".join,
)
def test_mistakes(mixer: Mixer, tmp_path: Path, words: list[str], said: list[str]) -> None:
    (tmp_path / "r.json").write_text("{}")
    assert_mistake(mixer("train", *words), *said)
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_run_stays_in_its_folder(mixer: Mixer, done: Path, tmp_path: Path) -> None:
    answer = mixer("train", "--resume", done, "--out", tmp_path / "elsewhere")
    assert_mistake(answer, f"--resume {done} and --out {tmp_path / 'elsewhere'}: a run stays in its folder")
    assert mixer("train", "--resume", f"{done}/", "--out", done).status == 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"optimisation": {}}'])
def test_a_run_whose_recipe_is_damaged(mixer: Mixer, stopped: Path, text: str) -> None:
    (stopped / "recipe.json").write_text(text)
    assert_mistake(mixer("train", "--resume", stopped), str(stopped / "recipe.json"))


def test_another_recipe_is_refused_by_its_options(mixer: Mixer, stopped: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*") if path.is_file()}
    answer = mixer("train", "--resume", stopped, "--epochs", 3, "--seed", 5)
    assert answer.status == 2
    assert f"{stopped} is a run with another --epochs, --steps, --seed: repeat its options" in answer.last
    assert {path: path.stat().st_mtime_ns for path in before} == before


# what is gone on with


def test_a_complete_run_is_left_as_it_is(mixer: Mixer, done: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()}
    answer = mixer("train", "--resume", done, "--json")
    assert answer.status == 0
    assert f"{done} is complete: nothing is left to do" in answer.err
    assert json.loads(answer.out) == {"out": str(done), **json.loads((done / "summary.json").read_text())}
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()} == before


def test_a_stopped_run_is_gone_on_with_by_its_folder_alone(mixer: Mixer, stopped: Path, done: Path) -> None:
    answer = mixer("train", "--resume", stopped)
    assert answer.status == 0, answer.err
    assert f"resuming after step 2, from {stopped / 'checkpoints' / 'step-00000002'}" in answer.err
    assert (stopped / "consumed.jsonl").read_bytes() == (done / "consumed.jsonl").read_bytes()
    ours, theirs = (load_file(out / "checkpoints" / "last.safetensors") for out in (stopped, done))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert (stopped / "report.html").is_file()


# where it is


def test_status_as_json(mixer: Mixer, done: Path, stopped: Path) -> None:
    answer = mixer("status", done, "--verify", "--json")
    assert answer.status == 0
    assert answer.out.count("\n") == 1
    found = json.loads(answer.out)
    assert (found["state"], found["step"], found["steps"], found["sound"]) == ("finished", 4, 4, 4)
    assert found["checkpoints"] == [4, 2]
    assert found["best"] == [4, found["val_top1"]]
    found = json.loads(mixer("status", stopped, "--json").out)
    assert (found["run"], found["state"], found["checkpoints"]) == (str(stopped), "stopped", [2])
    assert "sound" not in found


def test_status_in_words(mixer: Mixer, stopped: Path) -> None:
    answer = mixer("status", stopped, "--verify")
    assert answer.status == 0
    assert "step 2 is intact" in answer.out
    assert f"resume       mixer train --resume '{stopped}'\n" in answer.out


def test_status_mistakes(mixer: Mixer, stopped: Path, tmp_path: Path) -> None:
    assert_mistake(mixer("status", "gone"), "gone is not the folder of a run: name one that mixer train has created")
    assert_mistake(mixer("status", tmp_path), "is not the folder of a run")
    assert_mistake(mixer("status"), "mixer status --help")
    assert_mistake(mixer("status", stopped, "--jsn"), "did you mean --json")
    (stopped / "checkpoints" / "step-00000002" / "state.json").unlink()
    answer = mixer("status", stopped, "--verify")
    assert answer.status == 1
    assert answer.last.startswith(f"mixer: no checkpoint in {stopped / 'checkpoints'} is intact (1 damaged: ")
    assert "Traceback" not in answer.err


def test_the_environment_of_a_launcher_is_not_left_behind(mixer: Mixer, done: Path) -> None:
    before = dict(os.environ)
    mixer("status", done)
    mixer("train", "--resume", done)
    assert dict(os.environ) == before
