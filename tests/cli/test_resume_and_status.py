"""On the command line: resuming a run, what it leaves, and mixer status; mistakes are one line."""

import csv
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import allmlp
from allmlp.runs import folder as module
from allmlp.runs.folder import remove_checkpoints

Mixer = Callable[..., Any]
STEPS = ("--steps", "4", "--save-every-steps", "2", "--evaluate-every-steps", "2", "--compile", "off", "--workers", "0")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Started by no launcher, in an empty folder."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def with_checkpoints(mixer: Mixer, tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that is complete, but was killed before its checkpoints were removed."""
    out = tmp_path_factory.mktemp("done") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "remove_checkpoints", lambda *words: None)
        answer = mixer("train", *STEPS, *tiny, "--out", out, "--resume", "auto")
    assert answer.status == 0, answer.err
    return out


@pytest.fixture
def done(with_checkpoints: Path, tmp_path: Path) -> Path:
    """The complete run."""
    out = shutil.copytree(with_checkpoints, tmp_path / "done")
    remove_checkpoints(out, json.loads((out / "summary.json").read_text()))
    return out


@pytest.fixture
def stopped(with_checkpoints: Path, tmp_path: Path) -> Path:
    """The same, had it been killed after step 2."""
    out = shutil.copytree(with_checkpoints, tmp_path / "my run")
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


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_does_not_fit_is_refused_and_not_changed(mixer: Mixer, stopped: Path, tmp_path: Path) -> None:
    before = contents(stopped)
    answer = mixer("train", "--resume", stopped, "--out", tmp_path / "elsewhere")
    assert_mistake(answer, f"--resume {stopped} and --out {tmp_path / 'elsewhere'}: a run stays in its folder")
    answer = mixer("train", "--resume", stopped, "--epochs", 3, "--seed", 5)
    assert answer.status == 2
    assert f"{stopped} is a run with another --epochs, --steps, --seed: repeat its options" in answer.last
    assert contents(stopped) == before


# What is resumed, and what is left


def test_a_complete_run_is_left_as_it_is_but_for_its_checkpoints(
    mixer: Mixer, with_checkpoints: Path, tmp_path: Path
) -> None:
    out, environment = shutil.copytree(with_checkpoints, tmp_path / "run"), dict(os.environ)
    before = contents(out)
    answer = mixer("train", "--resume", f"{out}/", "--out", out, "--json")
    assert answer.status == 0
    assert "is complete: nothing is left to do" in answer.err
    summary = json.loads((out / "summary.json").read_text())
    assert json.loads(answer.out).items() >= summary.items()
    left = {path: found for path, found in before.items() if "checkpoints" not in path.parts}
    best = out / "checkpoints" / "best.safetensors"
    assert contents(out) == (left if summary["best_step"] == 4 else left | {best: before[best]})
    assert mixer("train", "--resume", out).status == 0
    assert dict(os.environ) == environment  # that of a launcher is not left behind


@pytest.mark.parametrize(
    ("kept", "best", "left"),
    [(4, 4, set()), (4, 2, {"best.safetensors"}), (2, 2, {"last.safetensors"}), (4, None, set())],
)
def test_weights_that_are_not_those_of_the_model_stay(
    kept: int, best: int | None, left: set[str], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("step-00000002", ".step-00000004.partial", ".step-00000001.removed", "damaged-step-00000001"):
        (folder / name).mkdir(parents=True)
    for name in ("last.safetensors", *([] if best is None else ["best.safetensors"])):
        (folder / name).touch()
    for _ in range(2):
        remove_checkpoints(tmp_path, {"steps": 4, "kept_step": kept, "best_step": best})
        assert {path.name for path in tmp_path.rglob("*")} == (left | {"checkpoints"} if left else set())


def test_a_stopped_run_is_resumed_by_its_folder_alone(mixer: Mixer, stopped: Path, with_checkpoints: Path) -> None:
    answer = mixer("train", "--resume", stopped)
    assert answer.status == 0, answer.err
    assert f"resuming after step 2, from {stopped / 'checkpoints' / 'step-00000002'}" in answer.err
    assert (stopped / "consumed.jsonl").read_bytes() == (with_checkpoints / "consumed.jsonl").read_bytes()
    ours, theirs = (load_file(out / "model.safetensors") for out in (stopped, with_checkpoints))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert not list(stopped.glob("checkpoints/step-*"))
    summary, first = (json.loads((out / "summary.json").read_text()) for out in (stopped, with_checkpoints))
    assert (first["command"], first["resumed_with"]) == (summary["command"], [])
    assert "--steps 4" in summary["command"]
    (resumed_with,) = summary["resumed_with"]
    assert resumed_with == f"mixer train --resume '{stopped}'"
    assert summary["started"] == first["started"]
    assert allmlp.load(stopped / "model.safetensors").metadata.provenance["command"] == summary["command"]
    report = (stopped / "report.html").read_text()
    assert "--steps 4" in report
    assert str(stopped) in report


def kind(path: Path) -> str:
    """What a file is, by its content."""
    content = path.read_bytes()
    if content[:8] == b"\x89PNG\r\n\x1a\n" or content[:3] == b"\xff\xd8\xff":
        Image.open(path).verify()
        return "picture"
    if content[8:9] == b"{":
        load_file(path)
        return "safetensors"
    if content.startswith(b"<!doctype html>") or content.startswith(b"<!DOCTYPE html>"):
        return "HTML"
    if path.name.startswith("events.out.tfevents."):
        reader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
        assert list(reader.EventFileLoader(str(path)).Load())
        return "events"
    if path.suffix == ".csv":
        assert len(list(csv.reader(content.decode().splitlines()))) > 1
        return "CSV"
    records = (
        [json.loads(line) for line in content.splitlines()]
        if path.suffix == ".jsonl"
        else [json.loads(content or b"0")]
    )
    assert records
    return "JSON" if content else "empty"


def test_nothing_in_a_run_can_execute(done: Path, stopped: Path) -> None:
    """Every file is of a kind that a loader only reads, and nothing that could read another kind is imported."""
    found = [{kind(path) for path in out.rglob("*") if path.is_file()} for out in (done, stopped)]
    assert found == [{"safetensors", "JSON", "CSV", "HTML", "picture", "events", "empty"}, found[0] - {"HTML"}]
    assert [path.name for path in done.rglob("*") if path.is_file() and not path.stat().st_size] == [".lock"]
    loads = re.compile(r"\bpickle\b|\btorch\.load\b|\bmarshal\b|\bshelve\b|\bdill\b|FileSystemReader|allow_pickle=True")
    source = Path(allmlp.__file__).parent
    users = {str(path.relative_to(source)) for path in source.rglob("*.py") if loads.search(path.read_text())}
    # The first sends data between a run's own processes; the second opens weights, by a restricted unpickler
    assert users == {"data/shared.py", "weights/containers.py"}


# Where it is


def test_status(mixer: Mixer, done: Path, stopped: Path) -> None:
    answer = mixer("status", done, "--verify", "--json")
    assert answer.status == 0
    assert answer.out.count("\n") == 1
    found = json.loads(answer.out)
    assert (found["state"], found["step"], found["steps"], found["checkpoints"]) == ("finished", 4, 4, [])
    assert 0.1 < found["val_majority"] < 0.11  # of ten digits
    assert f"commonest class {found['val_majority']:.4f}" in mixer("status", done).out
    found = json.loads(mixer("status", stopped, "--json").out)
    assert (found["run"], found["state"], found["checkpoints"]) == (str(stopped), "stopped", [2])
    assert "sound" not in found
    answer = mixer("status", stopped, "--verify")
    assert answer.status == 0
    assert "step 2 is intact" in answer.out
    assert f"resume       mixer train --resume '{stopped}'\n" in answer.out


def test_status_of_a_run_without_an_intact_checkpoint(mixer: Mixer, stopped: Path) -> None:
    (stopped / "checkpoints" / "step-00000002" / "state.json").unlink()
    answer = mixer("status", stopped, "--verify")
    assert answer.status == 1
    assert answer.last.startswith(f"mixer: no checkpoint in {stopped / 'checkpoints'} is intact (1 damaged: ")
    assert "Traceback" not in answer.err
