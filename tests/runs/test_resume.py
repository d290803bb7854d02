"""A run is resumed only with its own recipe and data, from an intact checkpoint, and refusals change nothing."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import locked_by_another_process
from small_runs import (
    CLASSES,
    FROM_WEIGHTS,
    InterruptAt,
    Interrupted,
    dataset,
    recipe,
    replace_data,
    splits,
    stopped_run,
    train,
)

from allmlp.checkpointing.checkpoint import MANIFEST, STATE, with_digest
from allmlp.checkpointing.manager import checkpoints_by_step
from allmlp.config.limits import flag
from allmlp.config.recipe import Recipe
from allmlp.config.serialize import to_json_object
from allmlp.data.dataset import DatasetSplits, ImageDataset
from allmlp.errors import RunError, UserError
from allmlp.runs.folder import claimed_folder, create_new_folder
from allmlp.runs.resume import (
    FREE_FIELDS,
    Checkpoint,
    check_same_data,
    check_same_recipe,
    fingerprint,
    finished_summary,
)
from allmlp.training import run as run_module


@pytest.fixture(autouse=True)
def images(monkeypatch: pytest.MonkeyPatch) -> dict[str, DatasetSplits]:
    """The data of all runs, under "data"; a test may replace it."""
    return replace_data(monkeypatch)


# The folder


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


def test_runs_that_start_at_the_same_time_have_different_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with claimed_folder(None, "a") as first, claimed_folder(None, "a") as second, claimed_folder(first, "b") as given:
        assert len({first, second}) == len(list(Path("runs").iterdir())) == 2
        assert given == first
        train(recipe(steps=1), first, resume=False)
    assert list(Path("runs").iterdir()) == [first], "a folder in which nothing was written is removed"
    (tmp_path / "runs" / "name").mkdir()
    assert [create_new_folder("name").name for _ in range(2)] == ["name-2", "name-3"]


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


def test_a_folder_of_something_else_is_refused_and_not_changed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for name in ("notes.txt", "transfer.json"):
        (out / name).write_text("{}")
        with pytest.raises(UserError, match=r"run exists: resume it with --resume .*run, name another .* with --out"):
            train(recipe(), out, resume=False)
        with pytest.raises(UserError, match="holds no run that can be resumed: name another folder with --out"):
            train(recipe(), out)
        assert {path.name for path in out.iterdir()} - {".lock"} == {name}
        (out / name).unlink()
    (tmp_path / "file").write_text("a file")
    with pytest.raises((UserError, RunError), match=r"file.* is a file: name a folder"):
        train(recipe(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "a file"


def test_without_a_sound_checkpoint_nothing_is_changed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    stopped_run(out)
    for path in checkpoints_by_step(out / "checkpoints").values():
        (path / STATE).write_text("{}")
    before = sorted(out.rglob("*"))
    with pytest.raises(RunError, match=r"no checkpoint in .* is intact \(2 damaged: "):
        train(recipe(save_every_steps=1), out)
    assert sorted(out.rglob("*")) == before


# What must not change


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


def with_another(original: Recipe, section: str, field: str) -> Recipe:
    """The recipe with a valid but different value of a field."""
    for value in ("other", 1, 2, 0.5):
        with contextlib.suppress(UserError, TypeError):  # the value has the wrong type or exceeds a limit
            changed = dataclasses.replace(getattr(original, section), **{field: value})
            if changed != getattr(original, section):
                return dataclasses.replace(original, **{section: changed})
    raise AssertionError(f"no value for {section}.{field}")


def test_fields_that_decide_the_result_must_not_change(tmp_path: Path) -> None:
    for section, field in FIELDS:
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


def test_changed_data_and_classes_are_refused_but_data_may_move(
    tmp_path: Path, images: dict[str, DatasetSplits]
) -> None:
    out = stopped_run(tmp_path / "run")
    settings = recipe(save_every_steps=1, data="moved")
    for change in ("one less", "one more", "another name", "another order", "another label"):
        images["data"] = changed_data(change)
        counts = f"24 training images then, {len(images['data'].splits['train'])} now"
        assert_refused(settings, out, rf"the data is not that of .*step-00000003 \({counts}, or different ones\)")
    datasets = splits(train=24, val=6, test=6).splits
    for classes in (("a", "b", "d"), ("a", "c", "b"), ("a", "b", "c", "d")):
        changed = {name: dataclasses.replace(split, classes=classes) for name, split in datasets.items()}
        images["data"] = DatasetSplits(splits=changed, classes=classes, description="made")
        assert_refused(settings, out, "was trained on the classes a, b, c, and the data has others: restore the data")
    images["data"] = splits(train=24, val=6, test=6)
    done = train(settings, out)
    assert (done.summary["steps"], done.summary["data"]) == (6, "moved")


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


# Runs of earlier versions and of other processes


def test_a_run_with_pickled_checkpoints_is_refused_before_any_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = stopped_run(tmp_path / "run")
    for path in checkpoints_by_step(out / "checkpoints").values():
        for file in path.glob("shard-*"):
            file.rename(path / "__0_0.distcp")
        (path / ".metadata").write_bytes(b"pickled")
        (path / MANIFEST).write_text(with_digest({"format": 2, "files": {}, "signature": None}))
    (out / "checkpoints" / ".step-00000004.partial").mkdir()  # it would be cleaned up in a run that is resumed
    monkeypatch.setattr(run_module, "build_data", None)
    message = r"step-00000003 has checkpoint format 2, and this version reads 3: .*start a new run from its weights"
    assert_refused(recipe(save_every_steps=1), out, message)
    assert (out / "checkpoints" / ".step-00000004.partial").is_dir()


def test_a_run_that_another_process_trains_is_refused(tmp_path: Path) -> None:
    out = stopped_run(tmp_path / "run")
    with locked_by_another_process(out):
        assert_refused(recipe(save_every_steps=1), out, "is being trained by another process: wait for it, or end it")
    assert train(recipe(save_every_steps=1), out).summary["steps"] == 6
