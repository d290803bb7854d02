"""A run that was stopped anywhere and resumed ends exactly like an uninterrupted one: same bits, same lines."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import locked_by_another_process
from safetensors.torch import load_file
from small_runs import CLASSES, NOISY, Silent, dataset, recipe, same, splits
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from allmlp.checkpointing.checkpoint import STATE, read_tensors, verify_checkpoint, write_checkpoint
from allmlp.checkpointing.manager import checkpoint_name, steps_in
from allmlp.config.limits import flag
from allmlp.config.recipe import Recipe
from allmlp.config.serialize import to_json_object
from allmlp.data.dataset import Dataset, DatasetSplits, ImageDataset
from allmlp.data.decode import UnreadableImage
from allmlp.data.loader import permutation
from allmlp.data.stores import ArrayStore
from allmlp.distributed.context import SINGLE_PROCESS
from allmlp.errors import RunError, Stopped, UserError
from allmlp.evaluation.classification import SplitEvaluator
from allmlp.model import Mixer
from allmlp.runs.records import CONSUMED, METRICS
from allmlp.runs.result import RunResult
from allmlp.runs.resume import (
    FREE_FIELDS,
    Checkpoint,
    check_same_data,
    check_same_recipe,
    fingerprint,
    finished_summary,
)
from allmlp.training import build, run
from allmlp.training.build import build_initializer, build_optimizer
from allmlp.training.ema import EMA
from allmlp.training.optimizer_step import OptimizerStep
from allmlp.training.run import RunOptions
from allmlp.training.state import TrainingState
from allmlp.training.trainer import Diverged, Evaluator
from allmlp.weights.native import save

TIMINGS = ("images_per_second", "images_per_second_per_device", "data_wait", "memory_bytes")


class Interrupted(Exception):
    """Ends a run at a chosen moment."""


def interrupt() -> None:
    raise Interrupted


class InterruptAt:
    """Progress that interrupts the run when it reports a step, or the n-th text with a given beginning.

    Args:
        moment: the step, or the beginning of the text.
        n: which of these reports, from 1.
        action: called at that moment; by default it raises ``Interrupted``.
    """

    def __init__(self, moment: int | str, n: int = 1, action: Callable[[], None] = interrupt) -> None:
        self.moment, self.reports_left, self.action = moment, n, action

    def update(self, done: int, total: int, text: str) -> None:
        evaluates = text.startswith("evaluating")
        if (done == self.moment and not evaluates) if isinstance(self.moment, int) else text.startswith(self.moment):
            self.reports_left -= 1
            if self.reports_left == 0:
                self.action()


class ScriptedScores:
    """Makes evaluators that give each new set of weights the next score, and known weights their score again.

    ``frozen``: new weights are an error.
    """

    def __init__(self, *scores: float) -> None:
        self.scores, self.by_weights = scores, dict[str, float]()
        self.frozen = False

    def __call__(
        self, name: str, dataset: Dataset, *, on_batch: Callable[[int, int], None], **options: Any
    ) -> Evaluator:
        return ScriptedEvaluator(name, on_batch, self.score)

    def score(self, model: Mixer) -> float:
        digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
        if digest not in self.by_weights:
            assert not self.frozen, "weights that the uninterrupted run did not have"
            self.by_weights[digest] = self.scores[min(len(self.by_weights), len(self.scores) - 1)]
        return self.by_weights[digest]


class ScriptedEvaluator:
    """Evaluates a split, as if in two batches."""

    def __init__(self, name: str, on_batch: Callable[[int, int], None], score: Callable[[Mixer], float]) -> None:
        self.name, self.on_batch, self.score, self.result = name, on_batch, score, None

    def __call__(self, model: Mixer) -> dict[str, float]:
        self.on_batch(1, 2)
        top1 = self.score(model)
        self.on_batch(2, 2)
        self.result = SimpleNamespace(top1=top1, loss=1.0, unreadable={})
        return {f"{self.name}_top1": top1, f"{self.name}_loss": 1.0}


@pytest.fixture(autouse=True)
def images(monkeypatch: pytest.MonkeyPatch) -> dict[str, DatasetSplits]:
    """The data of all runs, under "data"; a test may replace it."""
    current = {"data": splits(train=24, val=6, test=6)}
    monkeypatch.setattr(build, "load_source", lambda *words, **options: current["data"])
    for module in (run, build):
        monkeypatch.setattr(module, "versions", lambda: {"all": "versions"})  # reading them takes 0.3 s each time
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # test_checkpoint.py tests that it is called
    return current


def train(
    settings: Recipe,
    out: Path,
    make_evaluator: Any = SplitEvaluator,
    progress: Any = None,
    resume: bool = True,
    **options: Any,
) -> RunResult[Any]:
    return run.train(settings, out, make_evaluator, progress or Silent(), RunOptions(resume=resume, **options))


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
    """All tensors of a checkpoint."""
    named = FileSystemReader(checkpoint).read_metadata().state_dict_metadata.items()
    found = {
        key: torch.empty(t.size, dtype=t.properties.dtype) for key, t in named if isinstance(t, TensorStorageMetadata)
    }
    read_tensors(checkpoint, found, SINGLE_PROCESS)
    return found


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def assert_same(out: Path, reference: Path) -> None:
    """Compares weights, moments, averages, metrics and consumed samples."""
    checkpoints, expected_checkpoints = (steps_in(folder / "checkpoints") for folder in (out, reference))
    assert list(checkpoints) == list(expected_checkpoints)
    for step in checkpoints:
        found = checkpoints[step], expected_checkpoints[step]
        assert same(*map(stored_tensors, found)), step
        state, expected = (json.loads((path / STATE).read_text()) for path in found)
        del state["seconds"], expected["seconds"]
        assert state == expected
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
    "plain": {},
    "epochs of 2 2/3 steps": {"global_batch_size": 9},
    "noisy": {**NOISY, "mix_group_size": 4, "randaugment": 10.0, "color_jitter": 0.4},
    "micro-batches": {"micro_batch_size": 4, "recompute": True, "dropout": 0.2},
    "sgd without momentum": {"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.0},
    "ema": {"ema_decay": 0.9},
    "ema of sgd": {"ema_decay": 0.5, "optimizer": "sgd", "learning_rate": 0.1, "keep": "best"},
    "float16": {"precision": "float16", "learning_rate": 0.05},
    "one checkpoint": {"keep_checkpoints": 1, "keep": "best"},
    "cosine, sigmoid": {"decay": "cosine", "loss": "sigmoid", "head_bias": -2.0, "warmup_steps": 0},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_a_run_stopped_within_an_epoch(changes: dict[str, Any], tmp_path: Path, uninterrupted: Uninterrupted) -> None:
    settings = recipe(save_every_steps=1, **changes)
    with pytest.raises(Interrupted):
        train(settings, tmp_path / "run", progress=InterruptAt(4))
    assert max(steps_in(tmp_path / "run" / "checkpoints")) == 3
    train(settings, tmp_path / "run")
    assert_same(tmp_path / "run", uninterrupted(settings))


def test_a_run_stopped_at_every_step(tmp_path: Path, uninterrupted: Uninterrupted) -> None:
    settings = recipe(save_every_steps=1, ema_decay=0.5, **NOISY)
    for at in range(2, 7):
        with pytest.raises(Interrupted):
            train(settings, tmp_path / "run", progress=InterruptAt(at))
        assert max(steps_in(tmp_path / "run" / "checkpoints")) == at - 1
    train(settings, tmp_path / "run")
    assert_same(tmp_path / "run", uninterrupted(settings))


def test_runs_with_different_seeds_differ(tmp_path: Path) -> None:
    """Shows that the comparison can fail."""
    for seed in (0, 1):
        train(recipe(seed=seed), tmp_path / str(seed))
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "0", tmp_path / "1")


MOMENTS = [(3, 1), (8, 1), *(("evaluating on val", n) for n in (2, 4, 7, 8)), ("evaluating on test", 2)]


@pytest.mark.parametrize(("moment", "n"), MOMENTS)
def test_patience_and_the_best_survive_any_interruption(moment: int | str, n: int, tmp_path: Path) -> None:
    """In a step, in an evaluation, after the run has stopped early, or while the best weights are evaluated again."""
    scores = ScriptedScores(0.2, 0.7, 0.7, 0.6, 0.9)
    settings = recipe(keep="best", patience=2, epochs=20, ema_decay=0.5, keep_checkpoints=1)
    done = train(settings, tmp_path / "uninterrupted", scores, resume=False)
    assert (done.summary["steps"], done.summary["kept_step"], done.summary["val_top1"]) == (8, 4, 0.7)
    scores.frozen = True
    with pytest.raises(Interrupted):
        train(settings, tmp_path / "run", scores, InterruptAt(moment, n))
    with pytest.raises(Interrupted):
        train(settings, tmp_path / "run", scores, InterruptAt("evaluating"))
    train(settings, tmp_path / "run", scores)
    assert_same(tmp_path / "run", tmp_path / "uninterrupted")
    assert list(steps_in(tmp_path / "run" / "checkpoints")) == [8, 4]


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path, uninterrupted: Uninterrupted) -> None:
    settings = recipe(save_every_steps=1)
    with pytest.raises(Interrupted):
        train(settings, tmp_path / "run", progress=InterruptAt(4))
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert metrics(tmp_path / "run")
    train(settings, tmp_path / "run")
    assert_same(tmp_path / "run", uninterrupted(settings))


def test_a_run_killed_while_its_folder_was_created_starts_again(tmp_path: Path) -> None:
    """The folder holds at most the lock, an empty folder, and a half-written file."""
    for number, leftovers in enumerate(([], [".lock"], [".lock", "checkpoints"], [".lock", ".recipe.json.a1b2c3d4"])):
        out = tmp_path / str(number)
        out.mkdir()
        for name in leftovers:
            (out / name).touch() if name.startswith(".") else (out / name).mkdir()
        assert train(recipe(steps=1), out).summary["steps"] == 1, leftovers


def test_an_error_before_the_first_checkpoint_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(recipe(), tmp_path / "runs" / "run", progress=InterruptAt(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{}, {"keep": "best", "ema_decay": 0.5}])
def test_a_run_that_lacks_only_its_report(
    changes: dict[str, Any], tmp_path: Path, uninterrupted: Uninterrupted
) -> None:
    settings = recipe(**changes)
    shutil.copytree(uninterrupted(settings), tmp_path / "run")
    train(settings, tmp_path / "run")
    assert_same(tmp_path / "run", uninterrupted(settings))


def test_a_run_is_finished_once_it_has_a_report(tmp_path: Path) -> None:
    settings, out = recipe(), tmp_path / "run"
    assert finished_summary(settings, out) is None
    done = train(settings, out, resume=False)
    assert finished_summary(settings, out) is None
    (out / "report.html").write_text("<html></html>")
    summary = finished_summary(settings, out)
    assert summary is not None
    assert (summary["steps"], summary["val_top1"]) == (6, done.summary["val_top1"])
    with pytest.raises(UserError, match=r"is a run with another --seed: repeat its options"):
        finished_summary(recipe(seed=1), out)


def test_a_new_run_refuses_an_existing_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"run exists: resume it with --resume .*run, name another folder with --out"):
        train(recipe(), tmp_path / "run", resume=False)


@pytest.mark.parametrize("content", ["notes.txt", "transfer.json"])
def test_a_folder_of_something_else_is_refused_and_not_changed(content: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / content).write_text("{}")
    with pytest.raises(UserError, match="exists and holds no run that can be resumed: name another folder with --out"):
        train(recipe(), tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} - {".lock"} == {content}


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises((UserError, RunError), match=r"run.* is a file: name a folder"):
        train(recipe(), tmp_path / "run")
    assert (tmp_path / "run").read_text() == "a file"


# Damaged checkpoints


def test_an_older_checkpoint_is_used_if_the_newest_are_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, uninterrupted: Uninterrupted
) -> None:
    settings = recipe(save_every_steps=1, keep_checkpoints=9)
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(settings, out, progress=InterruptAt(6))
    for step in (4, 5):
        (out / "checkpoints" / checkpoint_name(step) / STATE).unlink()
    with caplog.at_level(logging.INFO):
        train(settings, out)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("allmlp")]
    for step in (4, 5):
        assert any(f"{checkpoint_name(step)}/{STATE} cannot be read" in m and "older" in m for m in messages)
    assert any(message.startswith("resuming after step 3, from ") for message in messages)
    assert_same(out, uninterrupted(settings))
    assert sorted(path.name for path in (out / "checkpoints").glob("damaged-*")) == [
        f"damaged-{checkpoint_name(s)}" for s in (4, 5)
    ]


def test_without_a_sound_checkpoint_nothing_is_changed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(recipe(save_every_steps=1), out, progress=InterruptAt(4))
    for path in steps_in(out / "checkpoints").values():
        (path / STATE).write_text("{}")
    before = sorted(out.rglob("*"))
    with pytest.raises(RunError, match=r"all 2 checkpoints in .* are damaged"):
        train(recipe(save_every_steps=1), out)
    assert sorted(out.rglob("*")) == before


# Unreadable images


class DamagedStore(ArrayStore):
    """A store in which some images cannot be read."""

    def __init__(self, intact: ArrayStore, damaged: set[str]) -> None:
        self.intact, self.damaged = intact, damaged

    def open(self, name: str, *words: Any) -> Image.Image:
        if name in self.damaged:
            raise UnreadableImage(f"{name}: truncated")
        return self.intact.open(name, *words)


def test_unreadable_images_are_remembered(
    tmp_path: Path, images: dict[str, DatasetSplits], caplog: pytest.LogCaptureFixture
) -> None:
    data, order = images["data"], permutation(0, 2, 24)  # of the third epoch, whose first half is step 5
    damaged = {f"{i:03d}" for i in order[:2]}
    store = DamagedStore(data.splits["train"].store, damaged)  # pyright: ignore[reportArgumentType]
    train_split = dataclasses.replace(data.splits["train"], store=store)
    images["data"] = dataclasses.replace(data, splits=data.splits | {"train": train_split})
    settings = recipe(save_every_steps=1, max_unreadable_fraction=0.1)
    train(settings, tmp_path / "uninterrupted", resume=False)
    with pytest.raises(Interrupted):
        train(settings, tmp_path / "run", progress=InterruptAt(6))
    caplog.clear()
    done = train(settings, tmp_path / "run")
    assert sorted(done.summary["unreadable"]) == sorted(damaged)
    assert not any("left out of its batch" in message for message in caplog.messages)  # it was logged before
    assert_same(tmp_path / "run", tmp_path / "uninterrupted")


# What must not change


def stopped_run(out: Path, **changes: Any) -> Path:
    """Makes a run that was stopped after step 3."""
    with pytest.raises(Interrupted):
        train(recipe(save_every_steps=1, **changes), out, progress=InterruptAt(4))
    return out


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def assert_refused(settings: Recipe, out: Path, message: str) -> None:
    """Resuming is refused and changes nothing."""
    before = contents(out)
    with pytest.raises(UserError, match=message) as caught:
        train(settings, out)
    assert "\n" not in str(caught.value)
    assert contents(out) == before


FIELDS = [
    (section, field.name)
    for section in ("model", "data", "optimization", "run")
    for field in dataclasses.fields(getattr(Recipe(), section))
]
SIZES = ("patch_size", "num_blocks", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim")
FROM_WEIGHTS: dict[str, Any] = dict.fromkeys(SIZES) | {"weights": "weights.safetensors"}


def with_another(original: Recipe, section: str, field: str) -> Recipe:
    """The recipe with a valid but different value of a field."""
    for value in ("other", 1, 2, 0.5):
        with contextlib.suppress(UserError, TypeError):  # of limits that the value exceeds or has the wrong type for
            changed = dataclasses.replace(getattr(original, section), **{field: value})
            if changed != getattr(original, section):
                return dataclasses.replace(original, **{section: changed})
    raise AssertionError(f"no value for {section}.{field}")


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_fields_that_decide_the_result_must_not_change(section: str, field: str, tmp_path: Path) -> None:
    original = recipe(**FROM_WEIGHTS) if field in ("weights", "frozen") else recipe()
    (tmp_path / "recipe.json").write_text(json.dumps(to_json_object(original)))
    check_same_recipe(dataclasses.replace(original, name="another"), tmp_path)
    other = with_another(original, section, field)
    if field in FREE_FIELDS.get(section, ()):
        check_same_recipe(other, tmp_path)
    else:
        with pytest.raises(UserError, match=f"is a run with another {flag(field)}: repeat its options"):
            check_same_recipe(other, tmp_path)


def test_another_recipe_is_refused_and_its_changed_fields_are_named(tmp_path: Path) -> None:
    out = stopped_run(tmp_path / "run")
    assert_refused(
        recipe(epochs=5, dropout=0.5, seed=1), out, "is a run with another --dropout, --epochs, --seed: repeat"
    )
    assert_refused(recipe(patch_size=8), out, "another --patch-size: ")
    (out / "recipe.json").write_text("{")
    assert_refused(recipe(), out, "recipe.json is not a recipe")


def test_free_fields_may_change(tmp_path: Path) -> None:
    out = stopped_run(tmp_path / "run")
    settings = recipe(micro_batch_size=6, recompute=True, workers=1, log_every_steps=2, keep_checkpoints=5)
    done = train(settings, out)
    assert done.summary["steps"] == 6
    assert json.loads((out / "recipe.json").read_text()) == json.loads(json.dumps(to_json_object(settings)))


def changed_data(change: str) -> DatasetSplits:
    data = splits(train=24, val=6, test=6)
    train = data.splits["train"]
    changed = {
        "one less": lambda: train.subset(np.arange(23)),
        "one more": lambda: dataset(25, 0),
        "another name": lambda: dataclasses.replace(train, names=(*train.names[:-1], "023b")),
        "another order": lambda: train.subset(np.array([1, 0, *range(2, 24)])),
        "another label": lambda: dataclasses.replace(train, labels=np.array([1, *train.labels[1:]])),
    }[change]()
    return dataclasses.replace(data, splits=data.splits | {"train": changed})


@pytest.mark.parametrize("change", ["one less", "one more", "another name", "another order", "another label"])
def test_changed_data_is_refused(change: str, tmp_path: Path, images: dict[str, DatasetSplits]) -> None:
    out = stopped_run(tmp_path / "run")
    images["data"] = changed_data(change)
    counts = f"24 training images then, {len(images['data'].splits['train'])} now"
    assert_refused(
        recipe(save_every_steps=1, data="moved"),
        out,
        rf"the data is not that of .*step-00000003 \({counts}, or different ones\)",
    )
    images["data"] = splits(train=24, val=6, test=6)
    assert train(recipe(save_every_steps=1), out).summary["steps"] == 6


def test_changed_classes_are_refused(tmp_path: Path, images: dict[str, DatasetSplits]) -> None:
    out = stopped_run(tmp_path / "run")
    datasets = splits(train=24, val=6, test=6).splits
    for classes in (("a", "b", "d"), ("a", "c", "b"), ("a", "b", "c", "d")):
        changed = {name: dataclasses.replace(split, classes=classes) for name, split in datasets.items()}
        images["data"] = DatasetSplits(splits=changed, classes=classes, description="made")
        assert_refused(
            recipe(save_every_steps=1),
            out,
            "was trained on the classes a, b, c, and the data has others: restore the data",
        )


def test_the_data_may_move(tmp_path: Path, images: dict[str, DatasetSplits]) -> None:
    out = stopped_run(tmp_path / "run")
    moved = splits(train=24, val=6, test=6)
    images["data"] = dataclasses.replace(moved, description="elsewhere")
    assert train(recipe(save_every_steps=1, data="elsewhere"), out).summary["data"] == "elsewhere"


def test_a_fingerprint_depends_on_names_labels_and_order() -> None:
    def print_of(split: ImageDataset) -> dict[str, Any]:
        return fingerprint(DatasetSplits(splits={"train": split, "test": split}, classes=CLASSES, description="made"))

    plain = dataset(24, 0)
    assert print_of(plain) == print_of(dataset(24, 1))  # it does not depend on the pixels
    assert print_of(plain).keys() == {"train"}  # nor on the test images
    assert print_of(plain)["train"]["count"] == 24
    joined = dataclasses.replace(plain, names=("\0".join(plain.names[:2]), *plain.names[2:], ""))
    undecodable = dataclasses.replace(plain, names=("b\udc80", *plain.names[1:]))
    for other in (joined, undecodable, dataclasses.replace(plain, labels=plain.labels[::-1])):
        assert print_of(other)["train"]["sha256"] != print_of(plain)["train"]["sha256"]
    int32 = dataclasses.replace(plain, labels=plain.labels.astype(np.int32))
    assert print_of(int32) == print_of(plain)


def test_another_precision_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    state = {"classes": list(CLASSES), "images": fingerprint(splits()), "precision": "bfloat16"}
    check_same_data(Checkpoint(Path("c"), state), splits(), "float32")
    assert "the run used bfloat16 so far and continues in float32 (--precision)" in caplog.messages


# Runs of other users and other processes


def test_another_users_checkpoint_is_refused_unless_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Uninterrupted
) -> None:
    settings = recipe(save_every_steps=1)
    with monkeypatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
        out = stopped_run(tmp_path / "run")
    assert_refused(settings, out, "was not written by a run of yours on this machine.*--trust-checkpoint")
    train(settings, out, trust_checkpoint=True)
    assert_same(out, uninterrupted(settings))
    verify_checkpoint(max(steps_in(out / "checkpoints").items())[1])  # new checkpoints are signed by this user


def test_a_run_that_another_process_trains_is_refused(tmp_path: Path) -> None:
    out = stopped_run(tmp_path / "run")
    with locked_by_another_process(out):
        assert_refused(recipe(save_every_steps=1), out, "is being trained by another process: wait for it, or end it")
    assert train(recipe(save_every_steps=1), out).summary["steps"] == 6


# Signals


def send_signal(number: int) -> Callable[[], None]:
    def send() -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.05)  # until it has been received

    return send


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        (1, signal.SIGTERM),
        (3, signal.SIGINT),
        ("evaluating on val", signal.SIGINT),
        ("evaluating on test", signal.SIGTERM),
    ],
)
def test_a_run_that_a_signal_stopped_can_be_resumed(
    moment: int | str, number: signal.Signals, tmp_path: Path, uninterrupted: Uninterrupted
) -> None:
    settings, out, scores = recipe(), tmp_path / "run", ScriptedScores(0.5)
    status = 128 + number
    with pytest.raises(Stopped, match=rf"^stopped by {number.name} after step \d: resume with this command$") as caught:
        train(settings, out, scores, InterruptAt(moment, action=send_signal(number)), resume_command="this command")
    assert caught.value.status == status
    step = max(steps_in(out / "checkpoints"))
    assert f"after step {step}:" in str(caught.value)
    assert [json.loads(line)["step"] for line in (out / CONSUMED).read_text().splitlines()] == list(range(1, step + 1))
    train(settings, out, scores)
    assert same(*(load_file(folder / "model.safetensors") for folder in (out, uninterrupted(settings))))
    assert (out / CONSUMED).read_bytes() == (uninterrupted(settings) / CONSUMED).read_bytes()


def test_stopped_again_before_the_next_step_the_message_names_the_resumed_step(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(
            recipe(), out, ScriptedScores(0.5), InterruptAt("evaluating on val", 3)
        )  # the second evaluation, whose checkpoint is written
    with pytest.raises(Stopped, match=r"^stopped by SIGTERM after step 4: "):
        train(recipe(), out, ScriptedScores(0.5), InterruptAt("evaluating on val", action=send_signal(signal.SIGTERM)))


# The cadence of checkpoints


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, [6, 4, 2]),
        ({"save_every_steps": 3}, [6, 4, 3, 2]),
        ({"save_every_minutes": 1e-9}, [6, 5, 4, 3, 2, 1]),
        ({"evaluate_every_steps": 5}, [6, 5]),
        ({"save_every_minutes": 1e-9, "keep_checkpoints": 1}, [6, 2]),
        ({"save_every_minutes": 1e-9, "keep_checkpoints": 2, "save_in_background": False}, [6, 5, 2]),
    ],
)
def test_which_checkpoints_are_written_and_kept(changes: dict[str, Any], steps: list[int], tmp_path: Path) -> None:
    train(recipe(**{"keep_checkpoints": 99} | changes), tmp_path / "run", ScriptedScores(0.9, 0.5, 0.5, 0.5))
    assert list(steps_in(tmp_path / "run" / "checkpoints")) == steps


def test_a_diverged_run_diverges_again_at_the_same_step(tmp_path: Path) -> None:
    settings = recipe(learning_rate=1e30, warmup_steps=0, save_every_steps=1)
    with pytest.raises(Diverged) as first:
        train(settings, tmp_path / "run", resume=False)
    with pytest.raises(Diverged) as second:
        train(settings, tmp_path / "run")
    assert str(first.value) == str(second.value)


def test_a_run_from_weights_with_a_frozen_body(tmp_path: Path, uninterrupted: Uninterrupted) -> None:
    weights = tmp_path / "weights.safetensors"
    save(build_initializer(recipe())(CLASSES), weights)
    changes = FROM_WEIGHTS | {"weights": str(weights), "frozen": True, "ema_decay": 0.5}
    settings = recipe(save_every_steps=1, **changes)
    with pytest.raises(Interrupted):
        train(settings, tmp_path / "run", progress=InterruptAt(4))
    train(settings, tmp_path / "run")
    assert_same(tmp_path / "run", uninterrupted(settings))


# The training state


@pytest.mark.parametrize("changes", [{}, {"optimizer": "sgd"}, {"ema_decay": 0.9}], ids=str)
@pytest.mark.parametrize("float16", [False, True])
def test_the_whole_training_state_is_restored(changes: dict[str, Any], float16: bool, tmp_path: Path) -> None:
    def make(seed: int) -> TrainingState:
        settings = recipe(seed=seed, **changes)
        model = build_initializer(settings)(CLASSES)
        optimizer_step = OptimizerStep(build_optimizer(settings.optimization, model), 1.0, float16=float16)
        ema = None if settings.optimization.ema_decay is None else EMA(model, 0.9)
        return TrainingState(model, optimizer_step, ema)

    def step(state: TrainingState, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(4, 3, 8, 8, generator=generator)
        state.optimizer_step.set_learning_rate(0.01)
        loss = state.model(images).square().mean()
        state.optimizer_step.backward(loss)
        state.optimizer_step(number, loss.detach())
        state.update_ema()

    before = make(0)
    for number in (1, 2, 3):
        step(before, number)
    scaler = before.optimizer_step.scaler
    if float16:
        scaler.load_state_dict(scaler.state_dict() | {"scale": 1024.0})
    before.optimizer_step.overflows.fill_(5)
    write_checkpoint(tmp_path / "c", before.tensors(), before.numbers() | {"step": 3}, SINGLE_PROCESS)
    after = make(1)
    checkpoint = Checkpoint(tmp_path / "c", verify_checkpoint(tmp_path / "c"))
    assert checkpoint.state["step"] == 3
    after.load(checkpoint, SINGLE_PROCESS)
    assert same(before.tensors(), after.tensors())
    assert after.optimizer_step.scaler.state_dict() == scaler.state_dict()
    assert float(after.optimizer_step.overflows) == 5
    kinds = {"model", "optimizer"} | ({"ema"} if "ema_decay" in changes else set())
    assert {key.split(".")[0] for key in before.tensors()} == kinds
    for number in (4, 5):
        for state in (before, after):
            step(state, number)
    assert same(before.tensors(), after.tensors())
    assert after.numbers() == before.numbers()
