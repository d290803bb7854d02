"""A run that was stopped anywhere and gone on with ends as the one that was not: to the bit, line by line."""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import signal
import time
import types
import typing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from allmlp.training.fit import Diverged, make_optimizer
from PIL import Image
from safetensors.torch import load_file
from test_fit import CLASSES, NOISY, Silent, part, recipe, same, source
from test_status import hold as hold_lock
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from allmlp.checkpointing.checkpoint import STATE, read, verify, write
from allmlp.checkpointing.manager import name, steps_in
from allmlp.config.limits import flag
from allmlp.config.recipe import ModelRecipe, Recipe
from allmlp.config.serialize import to_json_object
from allmlp.data.dataset import DatasetSplits, ImageDataset
from allmlp.data.decode import UnreadableImage
from allmlp.data.loader import permutation
from allmlp.data.stores import ArrayStore
from allmlp.distributed.context import SINGLE_PROCESS
from allmlp.errors import RunError, Stopped, UserError
from allmlp.evaluation.classification import classify
from allmlp.model import Mixer
from allmlp.runs.records import CONSUMED, METRICS
from allmlp.runs.result import RunResult
from allmlp.runs.resume import FREE, check_same, fingerprint, finished, hold
from allmlp.training import fit, run
from allmlp.training.ema import EMA
from allmlp.training.initialization import prepare
from allmlp.training.optimizer_step import OptimizerStep
from allmlp.training.state import Checkpoint, TrainingState
from allmlp.weights.native import save

CLOCK = ("images_per_second", "images_per_second_per_device", "data_wait", "memory_bytes")


class Ended(Exception):
    """What a run is ended by, at a place of its own."""


class Ends:
    """Ends the run once it is told of a step, or for the so-manieth time of something else.

    Args:
        at: the step, or the beginning of the text.
        nth: of such texts, from 1.
        by: what to do there; by default to raise.
    """

    def __init__(self, at: int | str, nth: int = 1, by: Callable[[], Any] | None = None) -> None:
        self.at, self.left, self.by = at, nth, by

    def update(self, done: int, total: int, text: str) -> None:
        evaluates = text.startswith("evaluating")
        if (done == self.at and not evaluates) if isinstance(self.at, int) else text.startswith(self.at):
            self.left -= 1
            if self.left == 0:
                if self.by is None:
                    raise Ended
                self.by()


class Scored:
    """An evaluation that gives each new set of weights the next score, and the same ones the same again."""

    def __init__(self, *scores: float) -> None:
        self.scores, self.known = scores, dict[str, float]()
        self.closed = False

    def __call__(
        self, model: Mixer, part: ImageDataset, *, on_progress: Callable[[int, int], None], **options: Any
    ) -> Any:
        digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
        on_progress(1, 2)
        if digest not in self.known:
            assert not self.closed, "weights that the run before did not have"
            self.known[digest] = self.scores[min(len(self.known), len(self.scores) - 1)]
        on_progress(2, 2)
        return SimpleNamespace(top1=self.known[digest], loss=1.0, unreadable={})


@pytest.fixture(autouse=True)
def images(monkeypatch: pytest.MonkeyPatch) -> dict[str, DatasetSplits]:
    """The data of all runs; a test may change it."""
    held = {"source": source(train=24, val=6, test=6)}
    monkeypatch.setattr(run, "load_source", lambda *words, **options: held["source"])
    for module in (run, fit):
        monkeypatch.setattr(module, "versions", lambda: {"all": "known"})  # a third of a second each time
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # test_checkpoint.py holds that it is called
    return held


def train(
    settings: Recipe, out: Path, evaluate: Any = classify, progress: Any = None, resume: bool = True, **options: Any
) -> RunResult[Any]:
    return run.train(settings, out, evaluate, progress or Silent(), resume=resume, **options)


Whole = Callable[[Recipe], Path]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The run of a recipe that nothing has stopped, made once."""
    made: dict[Recipe, Path] = {}

    def of(settings: Recipe) -> Path:
        if settings not in made:
            made[settings] = tmp_path_factory.mktemp("whole") / "run"
            train(settings, made[settings], resume=False)
        return made[settings]

    return of


def stored(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    told = FileSystemReader(checkpoint).read_metadata().state_dict_metadata.items()
    found = {
        key: torch.empty(t.size, dtype=t.properties.dtype) for key, t in told if isinstance(t, TensorStorageMetadata)
    }
    read(checkpoint, found, SINGLE_PROCESS)
    return found


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def assert_same(out: Path, reference: Path) -> None:
    """Weights, moments, averages, what was measured and what was consumed."""
    ours, theirs = (steps_in(folder / "checkpoints") for folder in (out, reference))
    assert list(ours) == list(theirs)
    for step in ours:
        assert same(stored(ours[step]), stored(theirs[step])), step
        state, expected = (json.loads((found[step] / STATE).read_text()) for found in (ours, theirs))
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
def test_stopped_inside_an_epoch_and_gone_on_with(changes: dict[str, Any], tmp_path: Path, whole: Whole) -> None:
    settings = recipe(save_every_steps=1, **changes)
    with pytest.raises(Ended):
        train(settings, tmp_path / "run", progress=Ends(4))
    assert max(steps_in(tmp_path / "run" / "checkpoints")) == 3
    train(settings, tmp_path / "run")
    assert_same(tmp_path / "run", whole(settings))


def test_stopped_at_every_step_one_after_the_other(tmp_path: Path, whole: Whole) -> None:
    settings = recipe(save_every_steps=1, ema_decay=0.5, **NOISY)
    for at in range(2, 7):
        with pytest.raises(Ended):
            train(settings, tmp_path / "run", progress=Ends(at))
        assert max(steps_in(tmp_path / "run" / "checkpoints")) == at - 1
    train(settings, tmp_path / "run")
    assert_same(tmp_path / "run", whole(settings))


def test_another_seed_is_not_the_same(tmp_path: Path) -> None:
    """So that the comparison can fail."""
    for seed in (0, 1):
        train(recipe(seed=seed), tmp_path / str(seed))
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "0", tmp_path / "1")


PLACES = [(3, 1), (8, 1), *(("evaluating on val", n) for n in (2, 4, 7, 8)), ("evaluating on test", 2)]


@pytest.mark.parametrize(("at", "nth"), PLACES)
def test_patience_and_the_best_outlive_any_stop(at: int | str, nth: int, tmp_path: Path) -> None:
    """Stopped in a step, in an evaluation, after the run has ended early, or while the best is evaluated again."""
    scores = Scored(0.2, 0.7, 0.7, 0.6, 0.9)
    settings = recipe(keep="best", patience=2, epochs=20, ema_decay=0.5, keep_checkpoints=1)
    done = train(settings, tmp_path / "whole", scores, resume=False)
    assert (done.summary["steps"], done.summary["kept_step"], done.summary["val_top1"]) == (8, 4, 0.7)
    scores.closed = True
    with pytest.raises(Ended):
        train(settings, tmp_path / "run", scores, Ends(at, nth))
    with pytest.raises(Ended):
        train(settings, tmp_path / "run", scores, Ends("evaluating"))
    train(settings, tmp_path / "run", scores)
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert list(steps_in(tmp_path / "run" / "checkpoints")) == [8, 4]


def test_killed_before_its_first_checkpoint_it_begins_anew(tmp_path: Path, whole: Whole) -> None:
    settings = recipe(save_every_steps=1)
    with pytest.raises(Ended):
        train(settings, tmp_path / "run", progress=Ends(4))
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert metrics(tmp_path / "run")
    train(settings, tmp_path / "run")
    assert_same(tmp_path / "run", whole(settings))


def test_killed_while_its_folder_was_being_made_it_begins_anew(tmp_path: Path) -> None:
    """Nothing is there yet but the lock, empty folders, and a file that was being written."""
    for number, rests in enumerate(([], [".lock"], [".lock", "checkpoints"], [".lock", ".recipe.json.a1b2c3d4"])):
        out = tmp_path / str(number)
        out.mkdir()
        for rest in rests:
            (out / rest).touch() if rest.startswith(".") else (out / rest).mkdir()
        assert train(recipe(steps=1), out).summary["steps"] == 1, rests


def test_an_error_before_the_first_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Ended):
        train(recipe(), tmp_path / "runs" / "run", progress=Ends(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{}, {"keep": "best", "ema_decay": 0.5}])
def test_a_run_that_is_complete_but_for_its_report(changes: dict[str, Any], tmp_path: Path, whole: Whole) -> None:
    settings = recipe(**changes)
    shutil.copytree(whole(settings), tmp_path / "run")
    train(settings, tmp_path / "run")
    assert_same(tmp_path / "run", whole(settings))


def test_when_a_run_is_finished(tmp_path: Path) -> None:
    settings, out = recipe(), tmp_path / "run"
    assert finished(settings, out) is None
    done = train(settings, out, resume=False)
    assert finished(settings, out) is None
    (out / "report.html").write_text("<html></html>")
    told = finished(settings, out)
    assert told is not None
    assert (told["steps"], told["val_top1"]) == (6, done.summary["val_top1"])
    with pytest.raises(UserError, match=r"is a run with another --seed: repeat its options"):
        finished(recipe(seed=1), out)


def test_a_new_run_takes_no_folder_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"run exists: go on with it by --resume .*run, name another folder with --out"):
        train(recipe(), tmp_path / "run", resume=False)


@pytest.mark.parametrize("content", ["notes.txt", "transfer.json"])
def test_a_folder_of_something_else_is_refused_and_left_alone(content: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / content).write_text("{}")
    with pytest.raises(UserError, match="exists and holds no run to go on with: name another folder with --out"):
        train(recipe(), tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} - {".lock"} == {content}


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises((UserError, RunError), match=r"run.* is a file: name a folder"):
        train(recipe(), tmp_path / "run")
    assert (tmp_path / "run").read_text() == "a file"


# damage


def test_from_an_older_one_where_the_newest_are_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, whole: Whole
) -> None:
    settings = recipe(save_every_steps=1, keep_checkpoints=9)
    out = tmp_path / "run"
    with pytest.raises(Ended):
        train(settings, out, progress=Ends(6))
    for step in (4, 5):
        (out / "checkpoints" / name(step) / STATE).unlink()
    with caplog.at_level(logging.INFO):
        train(settings, out)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("allmlp")]
    for step in (4, 5):
        assert any(f"{name(step)}/{STATE} cannot be read" in line and "older" in line for line in said)
    assert any(line.startswith("going on after step 3, from ") for line in said)
    assert_same(out, whole(settings))
    assert sorted(path.name for path in (out / "checkpoints").glob("damaged-*")) == [
        f"damaged-{name(s)}" for s in (4, 5)
    ]


def test_with_no_sound_one_nothing_is_touched(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Ended):
        train(recipe(save_every_steps=1), out, progress=Ends(4))
    for path in steps_in(out / "checkpoints").values():
        (path / STATE).write_text("{}")
    before = sorted(out.rglob("*"))
    with pytest.raises(RunError, match=r"none of the 2 checkpoints in .* is sound"):
        train(recipe(save_every_steps=1), out)
    assert sorted(out.rglob("*")) == before


# unreadable images


class Spoilt(ArrayStore):
    """Some of its images cannot be read."""

    def __init__(self, whole: ArrayStore, bad: set[str]) -> None:
        self.whole, self.bad = whole, bad

    def open(self, name: str, *words: Any) -> Image.Image:
        if name in self.bad:
            raise UnreadableImage(f"{name}: truncated")
        return self.whole.open(name, *words)


def test_images_that_could_not_be_read_are_remembered(
    tmp_path: Path, images: dict[str, DatasetSplits], caplog: pytest.LogCaptureFixture
) -> None:
    whole = images["source"]
    order = permutation(0, 2, 24)  # of the third epoch, whose first half is step 5
    bad = {f"{i:03d}" for i in order[:2]}
    spoilt = dataclasses.replace(whole.splits["train"], store=Spoilt(whole.splits["train"].store, bad))  # pyright: ignore[reportArgumentType]
    images["source"] = dataclasses.replace(whole, splits=whole.splits | {"train": spoilt})
    settings = recipe(save_every_steps=1, max_unreadable_fraction=0.1)
    train(settings, tmp_path / "whole", resume=False)
    with pytest.raises(Ended):
        train(settings, tmp_path / "run", progress=Ends(6))
    caplog.clear()
    done = train(settings, tmp_path / "run")
    assert sorted(done.summary["unreadable"]) == sorted(bad)
    assert not any("its place stays empty" in line for line in caplog.messages)  # that was said before
    assert_same(tmp_path / "run", tmp_path / "whole")


# what must be the same


def begun(out: Path, **changes: Any) -> Path:
    """A run that was stopped after step 3."""
    with pytest.raises(Ended):
        train(recipe(save_every_steps=1, **changes), out, progress=Ends(4))
    return out


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def refused(settings: Recipe, out: Path, message: str) -> None:
    """And nothing is changed by it: the run can still be gone on with."""
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


def another(value: Any, hint: Any) -> Any:
    """Another valid value of a recipe's field."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    choices = [choice for kind in kinds if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]
    if choices:
        return next(choice for choice in choices if choice != value)
    if bool in kinds:
        return not value
    if str in kinds:
        return "other"
    if float in kinds:
        return 0.5 if value is None else value / 2 + 0.03
    return 1 if value is None else value + 1


def test_every_field_that_decides_the_result_is_held(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    plain = recipe()
    from_weights = dataclasses.replace(plain, model=ModelRecipe(weights="w.npz", image_size=8))
    for section, field in FIELDS:
        before = from_weights if field in ("weights", "frozen") else plain
        (out / "recipe.json").write_text(json.dumps(to_json_object(before)))
        hold(dataclasses.replace(before, name="another"), out)
        settings = getattr(before, section)
        value = another(getattr(settings, field), typing.get_type_hints(type(settings))[field])
        other = dataclasses.replace(before, **{section: dataclasses.replace(settings, **{field: value})})
        if field in FREE.get(section, ()):
            hold(other, out)
        else:
            with pytest.raises(UserError, match=f"is a run with another {flag(field)}: repeat its options"):
                hold(other, out)


def test_another_recipe_is_refused_by_the_names_of_its_fields(tmp_path: Path) -> None:
    out = begun(tmp_path / "run")
    refused(recipe(epochs=5, dropout=0.5, seed=1), out, "is a run with another --dropout, --epochs, --seed: repeat")
    refused(recipe(patch_size=8), out, "another --patch-size: ")
    (out / "recipe.json").write_text("{")
    refused(recipe(), out, "recipe.json is not a recipe")


def test_what_may_differ_is_taken_over(tmp_path: Path) -> None:
    out = begun(tmp_path / "run")
    settings = recipe(micro_batch_size=6, recompute=True, workers=1, log_every_steps=2, keep_checkpoints=5)
    done = train(settings, out)
    assert done.summary["steps"] == 6
    assert json.loads((out / "recipe.json").read_text()) == json.loads(json.dumps(to_json_object(settings)))


def other_source(how: str) -> DatasetSplits:
    whole = source(train=24, val=6, test=6)
    train = whole.splits["train"]
    changed = {
        "one less": lambda: train.subset(np.arange(23)),
        "one more": lambda: part(25, 0),
        "another name": lambda: dataclasses.replace(train, names=(*train.names[:-1], "023b")),
        "another order": lambda: train.subset(np.array([1, 0, *range(2, 24)])),
        "another label": lambda: dataclasses.replace(train, labels=np.array([1, *train.labels[1:]])),
    }[how]()
    return dataclasses.replace(whole, splits=whole.splits | {"train": changed})


@pytest.mark.parametrize("how", ["one less", "one more", "another name", "another order", "another label"])
def test_other_data_is_refused(how: str, tmp_path: Path, images: dict[str, DatasetSplits]) -> None:
    out = begun(tmp_path / "run")
    images["source"] = other_source(how)
    counts = f"24 training images then, {len(images['source'].splits['train'])} now"
    refused(
        recipe(save_every_steps=1, data="moved"),
        out,
        rf"the data is not that of .*step-00000003 \({counts}, or others\)",
    )
    images["source"] = source(train=24, val=6, test=6)
    assert train(recipe(save_every_steps=1), out).summary["steps"] == 6


def test_other_classes_are_refused(tmp_path: Path, images: dict[str, DatasetSplits]) -> None:
    out = begun(tmp_path / "run")
    for classes in (("a", "b", "d"), ("a", "c", "b"), ("a", "b", "c", "d")):
        parts = {k: dataclasses.replace(v, classes=classes) for k, v in source(train=24, val=6, test=6).splits.items()}
        images["source"] = DatasetSplits(splits=parts, classes=classes, description="made")
        refused(recipe(save_every_steps=1), out, "was trained on the classes a, b, c: the data has others")


def test_the_pixels_and_the_place_of_the_data_may_move(tmp_path: Path, images: dict[str, DatasetSplits]) -> None:
    out = begun(tmp_path / "run")
    moved = source(train=24, val=6, test=6)
    images["source"] = dataclasses.replace(moved, description="elsewhere")
    assert train(recipe(save_every_steps=1, data="elsewhere"), out).summary["data"] == "elsewhere"


def test_a_fingerprint_is_of_names_labels_and_order() -> None:
    def told(part: ImageDataset) -> dict[str, Any]:
        return fingerprint(DatasetSplits(splits={"train": part, "test": part}, classes=CLASSES, description="made"))

    plain = part(24, 0)
    assert told(plain) == told(part(24, 1))  # pixels are not looked at
    assert told(plain).keys() == {"train"}  # nor test images
    assert told(plain)["train"]["count"] == 24
    init_distributed = dataclasses.replace(plain, names=("\0".join(plain.names[:2]), *plain.names[2:], ""))
    odd = dataclasses.replace(plain, names=("b\udc80", *plain.names[1:]))
    for other in (init_distributed, odd, dataclasses.replace(plain, labels=plain.labels[::-1])):
        assert told(other)["train"]["sha256"] != told(plain)["train"]["sha256"]
    small = dataclasses.replace(plain, labels=plain.labels.astype(np.int32))
    assert told(small) == told(plain)


def test_another_precision_is_said(caplog: pytest.LogCaptureFixture) -> None:
    state = {"classes": list(CLASSES), "images": fingerprint(source()), "precision": "bfloat16"}
    check_same(state, source(), "float32", Path("c"))
    assert "the run was in bfloat16 until here and goes on in float32 (--precision)" in caplog.messages


# whose it is


def test_a_strangers_checkpoint_is_refused_and_taken_with_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Whole
) -> None:
    settings = recipe(save_every_steps=1)
    with monkeypatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
        out = begun(tmp_path / "run")
    refused(settings, out, "was not written by a run of yours on this machine.*--trust-checkpoint")
    train(settings, out, trusted=True)
    assert_same(out, whole(settings))
    verify(max(steps_in(out / "checkpoints").items())[1])  # from here on it is one's own


def test_a_run_that_another_process_trains_is_left_alone(tmp_path: Path) -> None:
    out = begun(tmp_path / "run")
    holder = hold_lock(out)
    next(holder)
    refused(recipe(save_every_steps=1), out, "is being trained by another process: wait for it, or end it")
    next(holder, None)
    assert train(recipe(save_every_steps=1), out).summary["steps"] == 6


# signals


def interrupt(number: int) -> Callable[[], None]:
    def kill() -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.05)  # until it is noted

    return kill


@pytest.mark.parametrize(
    ("at", "number"),
    [
        (1, signal.SIGTERM),
        (3, signal.SIGINT),
        ("evaluating on val", signal.SIGINT),
        ("evaluating on test", signal.SIGTERM),
    ],
)
def test_a_signal_ends_a_run_that_can_be_gone_on_with(
    at: int | str, number: signal.Signals, tmp_path: Path, whole: Whole
) -> None:
    settings, out, scores = recipe(), tmp_path / "run", Scored(0.5)
    status = 128 + number
    with pytest.raises(Stopped, match=rf"^stopped by {number.name} after step \d: resume with these words$") as caught:
        train(settings, out, scores, Ends(at, by=interrupt(number)), again="these words")
    assert caught.value.status == status
    step = max(steps_in(out / "checkpoints"))
    assert f"after step {step}:" in str(caught.value)
    assert [json.loads(line)["step"] for line in (out / CONSUMED).read_text().splitlines()] == list(range(1, step + 1))
    train(settings, out, scores)
    assert same(*(load_file(folder / "model.safetensors") for folder in (out, whole(settings))))
    assert (out / CONSUMED).read_bytes() == (whole(settings) / CONSUMED).read_bytes()


def test_stopped_again_before_a_step_the_message_has_the_step_it_stands_at(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Ended):
        train(recipe(), out, Scored(0.5), Ends("evaluating on val", 3))  # the second, whose checkpoint is there
    with pytest.raises(Stopped, match=r"^stopped by SIGTERM after step 4: "):
        train(recipe(), out, Scored(0.5), Ends("evaluating on val", by=interrupt(signal.SIGTERM)))


# when


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
def test_when_checkpoints_are_written_and_which_stay(changes: dict[str, Any], steps: list[int], tmp_path: Path) -> None:
    train(recipe(**{"keep_checkpoints": 99} | changes), tmp_path / "run", Scored(0.9, 0.5, 0.5, 0.5))
    assert list(steps_in(tmp_path / "run" / "checkpoints")) == steps


def test_a_diverged_run_diverges_again_at_the_same_step(tmp_path: Path) -> None:
    settings = recipe(learning_rate=1e30, warmup_steps=0, save_every_steps=1)
    with pytest.raises(Diverged) as first:
        train(settings, tmp_path / "run", resume=False)
    with pytest.raises(Diverged) as second:
        train(settings, tmp_path / "run")
    assert str(first.value) == str(second.value)


def test_from_weights_with_a_frozen_body(tmp_path: Path, whole: Whole) -> None:
    save(prepare(recipe())(CLASSES), tmp_path / "weights.safetensors")
    sizes = ("patch_size", "num_blocks", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim")
    changes = dict.fromkeys(sizes) | {
        "weights": str(tmp_path / "weights.safetensors"),
        "frozen": True,
        "ema_decay": 0.5,
    }
    settings = recipe(save_every_steps=1, **changes)
    with pytest.raises(Ended):
        train(settings, tmp_path / "run", progress=Ends(4))
    train(settings, tmp_path / "run")
    assert_same(tmp_path / "run", whole(settings))


# the state itself


@pytest.mark.parametrize("changes", [{}, {"optimizer": "sgd"}, {"ema_decay": 0.9}], ids=str)
@pytest.mark.parametrize("half", [False, True])
def test_all_that_changes_from_step_to_step_comes_back(changes: dict[str, Any], half: bool, tmp_path: Path) -> None:
    def make(seed: int) -> TrainingState:
        settings = recipe(seed=seed, **changes)
        model = prepare(settings)(CLASSES)
        update = OptimizerStep(make_optimizer(settings.optimization, model), 1.0, half=half)
        average = None if settings.optimization.ema_decay is None else EMA(model, 0.9)
        return TrainingState(model, update, average)

    def step(state: TrainingState, number: int, loud: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(number)
        images = loud * torch.randn(4, 3, 8, 8, generator=generator)
        for group in state.update.optimizer.param_groups:
            group["lr"] = 0.01
        loss = state.model(images).square().mean()
        state.update.backward(loss * loud)
        state.update(number, loss.detach())
        state.follow()

    before = make(0)
    for number in (1, 2, 3):
        step(before, number)
    before.update.scaler.load_state_dict(before.update.scaler.state_dict() | {"scale": 1024.0}) if half else None
    before.update.overflows.fill_(5)
    write(tmp_path / "c", before.tensors(), before.numbers() | {"step": 3}, SINGLE_PROCESS)
    after = make(1)
    assert after.load(Checkpoint(tmp_path / "c", verify(tmp_path / "c")), SINGLE_PROCESS) == 3
    assert same(before.tensors(), after.tensors())
    assert after.update.scaler.state_dict() == before.update.scaler.state_dict()
    assert float(after.update.overflows) == 5
    kinds = {"model", "optimizer"} | ({"average"} if "ema_decay" in changes else set())
    assert {key.split(".")[0] for key in before.tensors()} == kinds
    for number in (4, 5):
        for state in (before, after):
            step(state, number)
    assert same(before.tensors(), after.tensors())
    assert after.numbers() == before.numbers()
