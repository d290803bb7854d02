"""A run that was interrupted anywhere and resumed ends exactly like an uninterrupted one: same bits, same lines."""

import hashlib
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
from small_runs import (
    CLASSES,
    EVEN,
    FROM_WEIGHTS,
    NOISY,
    InterruptAt,
    Interrupted,
    evaluator_of,
    recipe,
    replace_data,
    same,
    stopped_run,
    train,
)
from torch import Tensor

from allmlp.checkpointing.checkpoint import STATE
from allmlp.checkpointing.manager import checkpoint_name, checkpoints_by_step
from allmlp.config.recipe import Recipe
from allmlp.data.decode import UnreadableImage
from allmlp.data.loader import permutation
from allmlp.data.stores import ArrayStore
from allmlp.errors import Stopped
from allmlp.model import Mixer
from allmlp.runs.records import CONSUMED, METRICS
from allmlp.training.build import build_initializer
from allmlp.training.trainer import Diverged
from allmlp.weights.native import save

TIMINGS = ("images_per_second", "images_per_second_per_device", "data_wait", "memory_bytes")


class ScriptedScores:
    """Gives each new set of weights the next score, and known weights their score again, as if in two batches.

    ``frozen``: new weights are an error.
    """

    def __init__(self, *scores: float) -> None:
        self.scores, self.by_weights = scores, dict[str, float]()
        self.frozen = False

    def __call__(self, model: Mixer, split: Any, on_progress: Callable[[int, int], None], **options: Any) -> Any:
        on_progress(1, 2)
        digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
        if digest not in self.by_weights:
            assert not self.frozen, "weights that the uninterrupted run did not have"
            self.by_weights[digest] = self.scores[min(len(self.by_weights), len(self.scores) - 1)]
        on_progress(2, 2)
        return SimpleNamespace(top1=self.by_weights[digest], loss=1.0, majority=EVEN, unreadable={})


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_data(monkeypatch)


Uninterrupted = Callable[[Recipe], Path]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """The folder of an uninterrupted run of a recipe, trained once."""
    folders: dict[Recipe, Path] = {}

    def folder_of(settings: Recipe) -> Path:
        if settings not in folders:
            folders[settings] = tmp_path_factory.mktemp("uninterrupted") / "run"
            train(settings, folders[settings], resume=False)
        return folders[settings]

    return folder_of


def stored_tensors(checkpoint: Path) -> dict[str, Tensor]:
    return {key: tensor for file in checkpoint.glob("*.safetensors") for key, tensor in load_file(file).items()}


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def assert_same(out: Path, reference: Path) -> None:
    """Compares weights, moments, averages, metrics and consumed samples."""
    checkpoints, expected_checkpoints = (checkpoints_by_step(folder / "checkpoints") for folder in (out, reference))
    assert list(checkpoints) == list(expected_checkpoints)
    for step, checkpoint in checkpoints.items():
        tensors, expected_tensors = map(stored_tensors, (checkpoint, expected_checkpoints[step]))
        assert "model.head.bias" in tensors
        assert same(tensors, expected_tensors), step
        state, expected = (json.loads((c / STATE).read_text()) for c in (checkpoint, expected_checkpoints[step]))
        assert state | {"seconds": 0} == expected | {"seconds": 0}
    assert metrics(out) == metrics(reference)
    assert (out / CONSUMED).read_bytes() == (reference / CONSUMED).read_bytes()
    for weights in ("model", "checkpoints/best", "checkpoints/last"):
        if (reference / f"{weights}.safetensors").exists():
            assert same(*(load_file(folder / f"{weights}.safetensors") for folder in (out, reference))), weights
    summary, expected = (json.loads((folder / "summary.json").read_text()) for folder in (out, reference))
    for key in ("steps", "kept_step", "warmup_steps", "val_top1", "test_top1", "unreadable", "epochs", "images"):
        assert summary[key] == expected[key], key
    assert not list((out / "checkpoints").glob(".*"))


SETTINGS: dict[str, dict[str, Any]] = {
    "noisy micro-batches": {**NOISY, "mix_group_size": 2, "randaugment": 10.0, "color_jitter": 0.4}
    | {"micro_batch_size": 4, "recompute": True, "decay": "cosine", "loss": "sigmoid", "head_bias": -2.0},
    "sgd without momentum, epochs of 2 2/3 steps": {"optimizer": "sgd", "momentum": 0.0, "global_batch_size": 9}
    | {"keep_checkpoints": 1, "keep": "best", "warmup_steps": 0},
    "ema of sgd": {"ema_decay": 0.5, "optimizer": "sgd", "learning_rate": 0.1, "keep": "best"},
    "float16": {"precision": "float16", "learning_rate": 0.05},
    "frozen": FROM_WEIGHTS | {"frozen": True, "ema_decay": 0.5},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_a_run_stopped_within_an_epoch(changes: dict[str, Any], tmp_path: Path) -> None:
    if "weights" in changes:
        changes = changes | {"weights": str(tmp_path / "weights.safetensors")}
        save(build_initializer(recipe())(CLASSES), Path(changes["weights"]))
    settings, out = recipe(save_every_steps=1, **changes), stopped_run(tmp_path / "run", **changes)
    train(settings, tmp_path / "uninterrupted", resume=False)
    assert max(checkpoints_by_step(out / "checkpoints")) == 3
    train(settings, out)
    assert_same(out, tmp_path / "uninterrupted")


def test_a_run_stopped_at_every_step_and_at_its_report(tmp_path: Path, uninterrupted: Uninterrupted) -> None:
    settings = recipe(save_every_steps=1, ema_decay=0.5, keep="best", **NOISY)
    for at in range(2, 7):
        with pytest.raises(Interrupted):
            train(settings, tmp_path / "run", progress=InterruptAt(at))
        assert max(checkpoints_by_step(tmp_path / "run" / "checkpoints")) == at - 1
    for _ in range(2):  # the second time, it lacks only its report
        train(settings, tmp_path / "run")
        assert_same(tmp_path / "run", uninterrupted(settings))


MOMENTS = [(3, 1), *(("evaluating on val", n) for n in (2, 8)), ("evaluating on test", 2)]


@pytest.mark.parametrize(("moment", "n"), MOMENTS)
def test_patience_and_the_best_survive_any_interruption(moment: int | str, n: int, tmp_path: Path) -> None:
    """In a step, in an evaluation, after the run has stopped early, or while the best weights are evaluated again."""
    scores = ScriptedScores(0.2, 0.7, 0.7, 0.6, 0.9)
    evaluator = evaluator_of(scores)
    settings = recipe(keep="best", patience=2, epochs=20, ema_decay=0.5, keep_checkpoints=1)
    done = train(settings, tmp_path / "uninterrupted", evaluator, resume=False)
    assert (done.summary["steps"], done.summary["kept_step"], done.summary["val_top1"]) == (8, 4, 0.7)
    scores.frozen = True
    with pytest.raises(Interrupted):
        train(settings, tmp_path / "run", evaluator, InterruptAt(moment, n))
    with pytest.raises(Interrupted):
        train(settings, tmp_path / "run", evaluator, InterruptAt("evaluating"))
    train(settings, tmp_path / "run", evaluator)
    assert_same(tmp_path / "run", tmp_path / "uninterrupted")
    assert list(checkpoints_by_step(tmp_path / "run" / "checkpoints")) == [8, 4]


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path, uninterrupted: Uninterrupted) -> None:
    out = stopped_run(tmp_path / "run")
    shutil.rmtree(out / "checkpoints")
    assert metrics(out)
    train(recipe(save_every_steps=1), out)
    assert_same(out, uninterrupted(recipe(save_every_steps=1)))


def test_an_older_checkpoint_is_used_if_the_newest_are_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, uninterrupted: Uninterrupted
) -> None:
    out, newest = stopped_run(tmp_path / "run", keep_checkpoints=9), [checkpoint_name(step) for step in (2, 3)]
    for name in newest:
        (out / "checkpoints" / name / STATE).unlink()
    with caplog.at_level(logging.INFO):
        train(recipe(save_every_steps=1, keep_checkpoints=9), out)
    for name in newest:
        assert any(f"{name}/{STATE} cannot be read" in message and "older" in message for message in caplog.messages)
    assert any(message.startswith("resuming after step 1, from ") for message in caplog.messages)
    assert_same(out, uninterrupted(recipe(save_every_steps=1, keep_checkpoints=9)))
    assert {path.name for path in (out / "checkpoints").glob("damaged-*")} == {f"damaged-{name}" for name in newest}


def test_unreadable_images_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    order, intact = permutation(0, 2, 24), ArrayStore.open  # the order of the third epoch, whose first half is step 5
    damaged = {f"{i:03d}" for i in order[:12] if i > 20}  # the other splits have no such names
    assert damaged

    def read(store: ArrayStore, name: str, *args: Any) -> Any:
        if name in damaged:
            raise UnreadableImage(f"{name}: truncated")
        return intact(store, name, *args)

    monkeypatch.setattr(ArrayStore, "open", read)
    settings = recipe(save_every_steps=1, max_unreadable_fraction=0.2)
    train(settings, tmp_path / "uninterrupted", resume=False)
    with pytest.raises(Interrupted):
        train(settings, tmp_path / "run", progress=InterruptAt(6))
    caplog.clear()
    done = train(settings, tmp_path / "run")
    assert sorted(done.summary["unreadable"]) == sorted(damaged)
    assert not any("left out of its batch" in message for message in caplog.messages)  # it was logged before
    assert_same(tmp_path / "run", tmp_path / "uninterrupted")


# Signals


def send_signal(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.05)  # until it has been received


@pytest.mark.parametrize(
    ("moment", "number"),
    [(3, signal.SIGINT), ("evaluating on val", signal.SIGINT), ("evaluating on test", signal.SIGTERM)],
)
def test_a_run_that_a_signal_stopped_can_be_resumed(
    moment: int | str, number: signal.Signals, tmp_path: Path, uninterrupted: Uninterrupted
) -> None:
    settings, out, evaluator = recipe(), tmp_path / "run", evaluator_of(ScriptedScores(0.5))
    stop = InterruptAt(moment, action=partial(send_signal, number))
    with pytest.raises(Stopped, match=rf"^stopped by {number.name} after step \d: .* this command$") as caught:
        train(settings, out, evaluator, stop, resume_command="this command")
    assert caught.value.status == 128 + number
    step = max(checkpoints_by_step(out / "checkpoints"))
    assert f"after step {step}:" in str(caught.value)
    assert [json.loads(line)["step"] for line in (out / CONSUMED).read_text().splitlines()] == list(range(1, step + 1))
    train(settings, out, evaluator)
    assert same(*(load_file(folder / "model.safetensors") for folder in (out, uninterrupted(settings))))
    assert (out / CONSUMED).read_bytes() == (uninterrupted(settings) / CONSUMED).read_bytes()


def test_stopped_again_before_the_next_step_the_message_names_the_resumed_step(tmp_path: Path) -> None:
    evaluator = evaluator_of(ScriptedScores(0.5))
    with pytest.raises(Interrupted):
        train(recipe(), tmp_path, evaluator, InterruptAt("evaluating on val", 3))  # the evaluation of step 4
    send_term = InterruptAt("evaluating on val", action=partial(send_signal, signal.SIGTERM))
    with pytest.raises(Stopped, match=r"^stopped by SIGTERM after step 4: "):
        train(recipe(), tmp_path, evaluator, send_term)


CADENCES = [
    ({"save_every_steps": 3}, [6, 4, 3, 2]),
    ({"evaluate_every_steps": 5}, [6, 5]),
    ({"save_every_minutes": 1e-9, "keep_checkpoints": 1}, [6, 2]),
    ({"save_every_minutes": 1e-9, "keep_checkpoints": 2, "save_in_background": False}, [6, 5, 2]),
]


@pytest.mark.parametrize(("changes", "steps"), CADENCES)
def test_which_checkpoints_are_written_and_kept(changes: dict[str, Any], steps: list[int], tmp_path: Path) -> None:
    evaluator = evaluator_of(ScriptedScores(0.9, 0.5, 0.5, 0.5))
    train(recipe(**{"keep_checkpoints": 99} | changes), tmp_path / "run", evaluator)
    assert list(checkpoints_by_step(tmp_path / "run" / "checkpoints")) == steps


def test_a_diverged_run_diverges_again_at_the_same_step(tmp_path: Path) -> None:
    settings, messages = recipe(learning_rate=1e30, warmup_steps=0, save_every_steps=1), []
    for _ in range(2):
        with pytest.raises(Diverged) as caught:
            train(settings, tmp_path / "run")
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
