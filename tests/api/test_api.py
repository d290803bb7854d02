"""Training, fine-tuning and evaluation from Python: as the commands, but they raise and leave the process as it was."""

import contextlib
import io
import json
import logging
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import allmlp
from allmlp.api.progress import progress_bar
from allmlp.errors import Stopped, UserError
from allmlp.training.preemption import deferred_signals
from allmlp.training.step import TrainingStep

SIZES: dict[str, Any] = {"num_blocks": 1, "hidden_dim": 16, "tokens_mlp_dim": 8, "channels_mlp_dim": 32}
FAST: dict[str, Any] = {"compile": "off", "workers": 0, "device": "cpu", "precision": "float32"}


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return allmlp.train("digits", out=tmp_path_factory.mktemp("api") / "run", steps=np.int64(4), **SIZES, **FAST)


def test_a_run_is_that_of_the_command(run: Any, mixer: Callable[..., Any], tiny: tuple[str, ...]) -> None:
    assert (run.folder / "report.html").is_file()
    assert not list(run.folder.glob("checkpoints/step-*"))
    assert allmlp.train(out=run.folder, resume=True).summary == run.summary  # complete; by its own recipe
    assert run.summary == json.loads((run.folder / "summary.json").read_text())
    assert run.summary["command"].startswith("allmlp.train('digits', num_blocks=1, ")
    options = ("--steps", 4, "--compile", "off", "--workers", 0, "--device", "cpu", "--precision", "float32")
    answer = mixer("train", "digits", *options, *tiny, "--out", "command", "--json")
    printed = json.loads(answer.out)
    assert (printed["weights"], printed["report"]) == ("command/model.safetensors", "command/report.html")
    assert Path(printed["report"]).is_file()
    same = allmlp.load(printed["weights"]).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in run.model.state_dict().items())
    scored = allmlp.evaluate(run.model, "digits", device="cpu", precision="float32", workers=0)
    assert scored.top1 == run.summary["test_top1"] == printed["test_top1"]


def test_in_a_thread_the_process_stays_as_it_was(run: Any) -> None:
    def state() -> tuple[Any, ...]:
        logger = logging.getLogger("allmlp")
        return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), [*logger.handlers], logger.level

    before = state()
    with ThreadPoolExecutor() as pool:
        pool.submit(allmlp.train, run.folder / "recipe.json", out="again", steps=1).result()
    assert state() == before


def test_an_interrupted_run_is_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    call, steps = TrainingStep.__call__, []

    def interrupted(self: TrainingStep, *args: Any, **options: Any) -> Any:
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        return call(self, *args, **options)

    monkeypatch.setattr(TrainingStep, "__call__", interrupted)
    with pytest.raises(Stopped, match=r"allmlp\.train\('digits'.*out='stopped', resume=True\)"):
        allmlp.train("digits", out="stopped", steps=3, **SIZES, **FAST)
    done = allmlp.train("digits", out="stopped", resume=True, steps=3, **SIZES, **FAST)
    assert done.summary["steps"] == 3


def test_a_second_interrupt_raises_where_the_process_is_the_callers() -> None:
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)

    with deferred_signals(may_exit=False) as signals:
        interrupt()
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            interrupt()


@pytest.mark.parametrize("search", [{"learning_rate": 0.01}, {"learning_rates": [0.01, 0.03], "seeds": 2}])
def test_finetuning_a_model_in_memory(run: Any, search: dict[str, Any]) -> None:
    weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    options = {"out": "tuned", "epochs": 0.1, **search, **FAST}
    tuned = allmlp.finetune(run.model, "digits", **options)
    assert all(torch.equal(value, weights[name]) for name, value in run.model.state_dict().items())
    assert tuned.summary["started_from"] == "tuned-start.safetensors"
    assert len(tuned.summary.get("seeds", [0])) == search.get("seeds", 1)
    assert allmlp.finetune(run.model, "digits", **options).summary == tuned.summary
    with pytest.raises(UserError, match="another model"):
        allmlp.finetune(tuned.model, "digits", **options)


def test_one_of_several_processes_cannot_train_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2.*--processes"):
        allmlp.train()


@pytest.mark.parametrize(("wanted", "shown"), [(None, False), (False, False), (True, True)])
def test_progress_without_a_terminal(wanted: bool | None, shown: bool) -> None:
    with contextlib.redirect_stderr(io.StringIO()) as err, progress_bar(wanted) as bar:
        bar.update(1, 2, "working")
    assert ("working" in err.getvalue()) == shown
