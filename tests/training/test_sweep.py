"""Fine-tuning: rates tried on held-out training images, the best used on all, and a folder that is resumed."""

import dataclasses
import json
import logging
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from allmlp.config.recipe import (
    DataRecipe,
    FinetuneRecipe,
    ModelRecipe,
    OptimizationRecipe,
    Recipe,
    RunRecipe,
    SearchRecipe,
)
from allmlp.config.serialize import from_json, to_json_object
from allmlp.data.dataset import DatasetSplits
from allmlp.data.sources import load_source
from allmlp.data.stores import FolderStore
from allmlp.errors import RunError, UserError
from allmlp.evaluation.classification import SplitEvaluator
from allmlp.evaluation.run_report import write_run_report
from allmlp.files import to_json
from allmlp.runs.folder import run_folder
from allmlp.training.build import build_data
from allmlp.training.run import RunOptions, train
from allmlp.training.sweep import mean_and_std, sweep
from allmlp.training.trainer import Diverged
from allmlp.weights.load import load

RATES = (0.03, 0.003, 0.01)
HELD_OUT = {0.03: 0.5, 0.003: 0.25, 0.01: 0.75}  # top-1 of each rate's search
TEST = {5: 0.5, 6: 0.7, 7: 0.9}  # of each seed's run
ORDER = ["search/rate-0.03", "search/rate-0.003", "search/rate-0.01", "seed-5", "seed-6", "seed-7"]
COPIED = ("recipe.json", "model.safetensors", "report.html")


def plan(
    *, rates: tuple[float, ...] = RATES, fraction: float = 0.3, seeds: int = 3, **optimization: Any
) -> FinetuneRecipe:
    recipe = Recipe(
        name="moved",
        model=ModelRecipe(weights="w.npz", image_size=None),
        data=DataRecipe(data="photos", val_fraction=0.0),
        optimization=OptimizationRecipe(**{"learning_rate": 0.2, "optimizer": "sgd"} | optimization),
        run=RunRecipe(seed=5),
    )
    return FinetuneRecipe(
        recipe=recipe, search=SearchRecipe(learning_rates=rates, search_fraction=fraction, seeds=seeds)
    )


class Runs:
    """A ``run_one`` that trains nothing: it keeps what it was asked for, and leaves a folder as a run does.

    Args:
        out: the folder.
        held_out: top-1 by learning rate, of runs with images held out; a rate without one diverges.
        test: top-1 by seed, of the others; None for a source without test images; a seed without one diverges.
        stop: at which run (from 0) to raise what, and whether it has saved a checkpoint by then.
    """

    def __init__(
        self,
        out: Path,
        held_out: dict[float, float] = HELD_OUT,
        test: dict[int, float] | None = TEST,
        stop: tuple[int, BaseException, bool] | None = None,
    ) -> None:
        self.out, self.held_out, self.test, self.stop = out, held_out, test, stop
        self.recipes: list[Recipe] = []
        self.folders: list[str] = []

    def __call__(self, recipe: Recipe, folder: Path) -> dict[str, Any]:
        number = len(self.recipes)
        self.recipes.append(recipe)
        self.folders.append(folder.relative_to(self.out).as_posix())
        with run_folder(folder):  # and goes on with what is there, as train() does
            (folder / "checkpoints").mkdir(exist_ok=True)
            if self.stop and self.stop[0] == number:
                if self.stop[2]:
                    (folder / "checkpoints" / "last.safetensors").write_text("half")
                raise self.stop[1]
            (folder / "checkpoints" / "last.safetensors").write_text("weights")
            rate, seed, searches = recipe.optimization.learning_rate, recipe.run.seed, recipe.data.holdout > 0
            known = self.held_out.get(rate) if searches else 0.0 if self.test is None else self.test.get(seed)
            if known is None:
                raise Diverged(f"step 2: loss nan: diverged at {rate:g}")
            (folder / "recipe.json").write_text(to_json(to_json_object(recipe)))
            (folder / "model.safetensors").write_text(f"weights of {folder.name} by {rate:g}")
            scores = {"val_top1": known, "test_top1": None}
            if not searches:
                scores = {"val_top1": None, "test_top1": None if self.test is None else known}
            summary = scores | {"seed": seed, "train_seconds": 2.0, "data": recipe.data.data, "steps": 9}
            (folder / "summary.json").write_text(to_json(summary))
            (folder / "examples").mkdir(exist_ok=True)
            (folder / "examples" / "0-a.png").write_text(folder.name)
            (folder / "report.html").write_text(f"<html>{folder.name}</html>")
        (folder / "checkpoints" / "last.safetensors").unlink()  # a complete run keeps none
        return summary


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The runs


def test_the_rates_are_tried_in_order_and_then_each_seed_trains_with_the_best(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "out")
    sweep(plan(), tmp_path / "out", runs)
    assert runs.folders == ORDER
    assert [(r.optimization.learning_rate, r.run.seed, r.data.holdout) for r in runs.recipes] == [
        *((rate, 5, 0.3) for rate in RATES),
        *((0.01, seed, 0.0) for seed in (5, 6, 7)),
    ]


def test_nothing_else_of_the_recipe_changes(tmp_path: Path) -> None:
    runs, given = Runs(tmp_path / "out"), plan().recipe
    sweep(plan(), tmp_path / "out", runs)
    for recipe in runs.recipes:
        back = dataclasses.replace(
            recipe,
            data=dataclasses.replace(recipe.data, holdout=0.0),
            optimization=dataclasses.replace(recipe.optimization, learning_rate=0.2),
            run=dataclasses.replace(recipe.run, seed=5),
        )
        assert back == given


@pytest.mark.parametrize(
    ("held_out", "chosen"),
    [
        ({0.03: 0.9, 0.003: 0.1, 0.01: 0.2}, 0.03),
        ({0.03: 0.1, 0.003: 0.9, 0.01: 0.2}, 0.003),
        ({0.03: 0.9, 0.003: 0.1, 0.01: 0.9}, 0.01),
        ({0.03: 0.5, 0.003: 0.5, 0.01: 0.5}, 0.003),
        ({0.03: 0.0, 0.003: 0.0, 0.01: 0.0}, 0.003),
        ({0.01: 0.0}, 0.01),
        ({0.03: 0.4, 0.01: 0.3}, 0.03),
    ],
    ids=str,
)
def test_the_best_held_out_accuracy_chooses_the_smaller_rate_on_ties(
    held_out: dict[float, float], chosen: float, tmp_path: Path
) -> None:
    """A rate that is not there diverges: it is no accuracy of 0, which wins where it is the only one."""
    runs = Runs(tmp_path / "out", held_out)
    assert sweep(plan(), tmp_path / "out", runs)["learning_rate"] == chosen
    assert {recipe.optimization.learning_rate for recipe in runs.recipes[3:]} == {chosen}


def test_without_rates_there_is_no_search(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "out")
    summary = sweep(plan(rates=()), tmp_path / "out", runs)
    assert runs.folders == ["seed-5", "seed-6", "seed-7"]
    assert {recipe.optimization.learning_rate for recipe in runs.recipes} == {0.2}
    assert (summary["learning_rate"], summary["search"]) == (0.2, {})
    assert not (tmp_path / "out" / "search").exists()


# The summary


def test_the_summary_is_the_first_seeds_with_the_rates_and_all_seeds(tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = sweep(plan(), out, Runs(out))
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["test_top1_mean"] == pytest.approx(0.7)
    assert summary["test_top1_std"] == pytest.approx(0.2)  # (0.2² + 0² + 0.2²) / (3 − 1)
    assert {key: value for key, value in summary.items() if key not in ("test_top1_mean", "test_top1_std")} == {
        **json.loads((out / "seed-5" / "summary.json").read_text()),
        "test_top1": 0.5,
        "learning_rate": 0.01,
        "search": {"0.03": 0.5, "0.003": 0.25, "0.01": 0.75},
        "seeds": [5, 6, 7],
        "test_top1s": [0.5, 0.7, 0.9],
        "total_train_seconds": 12.0,
    }


def test_the_folder_holds_the_first_seeds_weights_report_and_examples(tmp_path: Path) -> None:
    out = tmp_path / "out"
    sweep(plan(), out, Runs(out))
    assert {path.name for path in out.iterdir()} == {
        *(*COPIED, "examples", "summary.json", "transfer.json", "search", "seed-5", "seed-6", "seed-7")
    }
    for name in (*COPIED, "examples/0-a.png"):
        assert (out / name).read_bytes() == (out / "seed-5" / name).read_bytes()
        for other in ("search/rate-0.01", "seed-6"):
            assert (out / name).read_bytes() != (out / other / name).read_bytes()
    assert from_json(out / "recipe.json").optimization.learning_rate == 0.01
    assert from_json(out / "recipe.json").data.holdout == 0


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_run_has_no_deviation(seeds: int, tmp_path: Path) -> None:
    summary = sweep(plan(seeds=seeds), tmp_path / "out", Runs(tmp_path / "out"))
    assert summary["test_top1s"] == [0.5, 0.7][:seeds]
    assert summary["test_top1_mean"] == pytest.approx(0.5 if seeds == 1 else 0.6)
    assert summary["test_top1_std"] == (None if seeds == 1 else pytest.approx(0.02**0.5))
    assert ('"test_top1_std": null' in (tmp_path / "out" / "summary.json").read_text()) == (seeds == 1)


def test_a_source_without_test_images_has_no_accuracies(tmp_path: Path) -> None:
    summary = sweep(plan(), tmp_path / "out", Runs(tmp_path / "out", test=None))
    assert summary["test_top1s"] == [None, None, None]
    assert (summary["test_top1"], summary["test_top1_mean"], summary["test_top1_std"]) == (None, None, None)
    assert summary["learning_rate"] == 0.01  # it was chosen all the same


def test_spread_is_that_of_a_sample() -> None:
    accuracies = [0.25, 0.5, 0.875, 0.375]
    assert mean_and_std([*accuracies]) == {
        "test_top1_mean": statistics.fmean(accuracies),
        "test_top1_std": pytest.approx(torch.tensor(accuracies, dtype=torch.float64).std(correction=1).item()),
    }
    assert mean_and_std([]) == mean_and_std([None]) == {"test_top1_mean": None, "test_top1_std": None}


# A rate that diverges


def test_a_rate_that_diverges_counts_as_none_and_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    runs = Runs(out, {0.003: 0.1, 0.01: 0.2})
    with caplog.at_level(logging.INFO, "allmlp"):
        summary = sweep(plan(), out, runs)
    assert runs.folders == ORDER
    assert summary["search"] == {"0.03": None, "0.003": 0.1, "0.01": 0.2}
    (said,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert said.getMessage() == "step 2: loss nan: diverged at 0.03"
    failed = json.loads((out / "search" / "rate-0.03" / "summary.json").read_text())
    assert failed == {"val_top1": None, "test_top1": None, "failed": "step 2: loss nan: diverged at 0.03"}
    again = Runs(out, {})
    assert sweep(plan(), out, again) == summary
    assert again.folders == []  # it would only diverge again


def test_all_rates_diverging_is_a_run_error(tmp_path: Path) -> None:
    out = tmp_path / "out"
    runs = Runs(out, {})
    with pytest.raises(
        RunError, match=r"diverged at every learning rate \(0\.03, 0\.003, 0\.01\): give lower --learning-ra"
    ):
        sweep(plan(), out, runs)
    assert runs.folders == ORDER[:3]
    assert not (out / "summary.json").exists()
    assert (out / "search" / "rate-0.01" / "checkpoints" / "last.safetensors").exists()  # as its message said


def test_a_last_run_that_diverges_is_a_run_error(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RunError, match=r"diverged at 0\.01"):
        sweep(plan(), out, Runs(out, test={5: 0.5, 7: 0.9}))
    assert not (out / "summary.json").exists()
    assert (out / "seed-5" / "report.html").exists()


# Stopped, and gone on with


@pytest.mark.parametrize("saved", [False, True], ids=["before a checkpoint", "after a checkpoint"])
@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RunError])
def test_called_again_it_goes_on_where_it_was_stopped(
    number: int, saved: bool, kind: type[BaseException], tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "new" / "out"
    expected = sweep(plan(), whole, Runs(whole))
    stopped, then = Runs(out, stop=(number, kind("stopped"), saved)), Runs(out)
    with pytest.raises(kind, match="stopped"):
        sweep(plan(), out, stopped)
    assert stopped.folders == ORDER[: number + 1]
    kept = number > 0 or saved
    assert out.exists() == kept  # of a first run without a checkpoint nothing is kept, nor of the folders on the way
    assert (tmp_path / "new").exists() == kept
    before = {name: content for name, content in tree(out).items() if not name.startswith(ORDER[number])}
    assert sweep(plan(), out, then) == expected
    assert then.folders == ORDER[number:]  # those before are not repeated
    assert tree(out) == tree(whole)
    assert before.items() <= tree(out).items()


@pytest.mark.parametrize("number", range(6))
def test_a_run_killed_while_its_report_was_written_is_gone_on_with(number: int, tmp_path: Path) -> None:
    """With no chance to take anything away: all is there but the report, which comes last."""
    out = tmp_path / "out"
    expected = sweep(plan(), out, Runs(out))
    whole = tree(out)
    for folder in ORDER[number + 1 :]:
        for path in sorted((out / folder).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (out / folder).rmdir()
    (out / ORDER[number] / "report.html").unlink()
    (out / ORDER[number] / "model.safetensors").write_text("half")
    then = Runs(out)
    assert sweep(plan(), out, then) == expected
    assert then.folders == ORDER[number:]
    assert tree(out) == whole


def test_a_whole_transfer_is_not_repeated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    expected, before = sweep(plan(), out, Runs(out)), tree(out)
    again = Runs(out)
    with caplog.at_level(logging.INFO, "allmlp"):
        assert sweep(plan(), out, again) == expected
    assert again.folders == []
    assert tree(out) == before
    assert f"resuming the fine-tuning in {out}" in caplog.messages


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"recipe": null}', '{"recipe": []}', "null"])
def test_a_damaged_plan_is_refused_and_left_alone(text: str, tmp_path: Path) -> None:
    (tmp_path / "transfer.json").write_text(text)
    with pytest.raises(UserError, match=r"transfer\.json is damaged \(.*\): name another folder with --out"):
        sweep(plan(), tmp_path, Runs(tmp_path))
    assert tree(tmp_path) == {"transfer.json": text.encode()}


def test_a_plan_of_the_earlier_version_is_named_as_such(tmp_path: Path) -> None:
    stored = json.loads(to_json(dataclasses.asdict(plan())))
    stored["recipe"]["optimization"]["polyak"] = stored["recipe"]["optimization"].pop("ema_decay")
    (tmp_path / "transfer.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"made by an earlier version .* cannot be resumed"):
        sweep(plan(), tmp_path, Runs(tmp_path))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (plan(rates=(0.03, 0.003)), "learning_rates"),
        (plan(rates=(0.003, 0.03, 0.01)), "learning_rates"),
        (plan(seeds=2), "seeds"),
        (plan(fraction=0.2), "search_fraction"),
        (plan(learning_rate=0.1), "learning_rate"),
        (plan(global_batch_size=8, epochs=3), "epochs, global_batch_size"),
        (plan(steps=7), "steps"),
        (plan(clip_norm=None), "clip_norm"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_plan_in_the_folder_is_refused_with_the_difference(
    other: FinetuneRecipe, named: str, finished: bool, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if finished:
        sweep(plan(), out, Runs(out))
    else:
        with pytest.raises(KeyboardInterrupt):
            sweep(plan(), out, Runs(out, stop=(2, KeyboardInterrupt(), True)))
    before, runs = tree(out), Runs(out)
    with pytest.raises(UserError, match=rf"holds another fine-tuning \({named} differ\): .* or name another --out"):
        sweep(other, out, runs)
    assert runs.folders == []
    assert tree(out) == before


@pytest.mark.parametrize("name", ["notes.txt", "summary.json", "recipe.json", "transfer.json/file"])
def test_a_folder_of_something_else_is_refused_and_left(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("precious")
    runs = Runs(out)
    with pytest.raises(
        UserError, match="holds no unfinished fine-tuning: name another folder with --out, or remove it"
    ):
        sweep(plan(), out, runs)
    assert runs.folders == []
    assert tree(out) == {name: b"precious"}


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    sweep(plan(), tmp_path, Runs(tmp_path))
    assert (tmp_path / "summary.json").exists()


# Mistakes


@pytest.mark.parametrize("kind", [UserError, RunError, OSError, ValueError])
def test_a_mistake_in_the_first_run_leaves_nothing(kind: type[Exception], tmp_path: Path) -> None:
    out = tmp_path / "new" / "deeper" / "out"
    with pytest.raises(RunError if kind is OSError else kind):  # of the disk, it is told as a failed run
        sweep(plan(), out, Runs(out, stop=(0, kind("wrong"), False)))
    assert list(tmp_path.iterdir()) == []


def test_folders_that_were_there_stay(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    out = tmp_path / "runs" / "deeper" / "out"
    with pytest.raises(UserError):
        sweep(plan(), out, Runs(out, stop=(0, UserError("wrong"), False)))
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]


@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_mistake_in_a_later_run_keeps_the_finished_ones(number: int, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with pytest.raises(UserError):
        sweep(plan(), out, Runs(out, stop=(number, UserError("wrong"), False)))
    for folder in ORDER[:number]:
        assert (out / folder / "report.html").exists()
    assert not (out / ORDER[number]).exists()
    then = Runs(out)
    sweep(plan(), out, then)
    assert then.folders == ORDER[number:]


@pytest.mark.parametrize("wrong", [{"rates": (0.1, -1.0)}, {"seeds": 0}, {"fraction": 1.0}, {"learning_rate": 0.0}])
def test_a_plan_out_of_range_is_refused_before_a_folder_is_made(wrong: dict[str, Any], tmp_path: Path) -> None:
    runs = Runs(tmp_path / "out")
    with pytest.raises(UserError, match="--"):
        sweep(plan(**wrong), tmp_path / "out", runs)
    assert runs.folders == []
    assert list(tmp_path.iterdir()) == []


# Real runs, tiny


class Bar:
    """A progress bar that presses control-C at its ``stop``-th word."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.told = stop, 0

    def update(self, done: int, total: int, text: str) -> None:
        self.told += 1
        if self.told == self.stop:
            raise KeyboardInterrupt


class Real:
    """``run_one`` as the command's, and the images of each run."""

    def __init__(self, out: Path, bar: Bar | None = None, watch: Callable[[str], None] = lambda _: None) -> None:
        self.out, self.bar, self.watch = out, bar or Bar(), watch
        self.sources: dict[str, DatasetSplits] = {}

    def __call__(self, recipe: Recipe, folder: Path) -> dict[str, Any]:
        self.watch(folder.relative_to(self.out).as_posix())
        done = train(recipe, folder, SplitEvaluator, self.bar, RunOptions(resume=True))
        write_run_report(done)
        self.sources[folder.relative_to(self.out).as_posix()] = done.data
        return done.summary


def real(weights: Path, data: Path, **search: Any) -> FinetuneRecipe:
    recipe = Recipe(
        name="moved",
        model=ModelRecipe(weights=str(weights), image_size=None),
        data=DataRecipe(data=str(data), crop=None, crop_ratio=None, interpolation=None, val_fraction=0.0, workers=0),
        optimization=OptimizationRecipe(
            optimizer="sgd", steps=4, global_batch_size=8, weight_decay=0.0, warmup_steps=0, decay="cosine"
        ),
        run=RunRecipe(device="cpu", precision="float32", compile="off", log_every_steps=1),
    )
    return FinetuneRecipe(recipe=recipe, search=SearchRecipe(search_fraction=0.25, **search))


@pytest.fixture
def photographs(pictures: Callable[[Path, dict[str, int]], Path], tmp_path: Path) -> Path:
    """Training and test images, and validation images that nobody asks for."""
    counts = {"train/red": 12, "train/blue": 8, "test/red": 3, "test/blue": 3, "val/red": 2, "val/blue": 2}
    return pictures(tmp_path / "data", counts)


def test_the_search_sees_no_test_image_and_the_last_runs_all_training_images(
    color_weights: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, opened = tmp_path / "out", dict[str, set[str]]()
    at: list[str] = []
    original = FolderStore.open

    def recorded(self: FolderStore, name: str, *args: Any) -> Any:
        opened.setdefault(at[-1], set()).add(name)
        return original(self, name, *args)

    monkeypatch.setattr(FolderStore, "open", recorded)
    one = Real(out, watch=at.append)
    summary = sweep(real(color_weights, photographs, learning_rates=(0.1, 0.01), seeds=2), out, one)
    given = load_source(str(photographs))
    training = set(given.split("train").names)
    assert at == ["search/rate-0.1", "search/rate-0.01", "seed-0", "seed-1"]
    for run in at[:2]:
        parts = one.sources[run].splits
        assert set(parts) == {"train", "val"}
        assert len(parts["val"]) == 5  # a quarter of each class
        assert {*parts["train"].names, *parts["val"].names} == training
        assert not {*parts["train"].names} & {*parts["val"].names}
        assert opened[run] <= training
        assert opened[run] >= {*parts["val"].names}
        assert parts["val"].names == one.sources[at[0]].splits["val"].names  # all rates are compared on the same images
        assert json.loads((out / run / "summary.json").read_text())["test_top1"] is None
    for run in at[2:]:
        assert set(one.sources[run].split("train").names) == training
        assert opened[run] >= training  # 32 images are drawn, of 20
        assert opened[run] >= set(given.split("test").names)
    assert summary["images"] == {"train": 20, "val": 4, "test": 6}
    assert len(summary["test_top1s"]) == 2


@pytest.mark.parametrize("val_fraction", [0.0, 0.2])
def test_images_are_held_out_in_place_of_validation_not_beside_it(val_fraction: float) -> None:
    """Whatever --val-fraction says of the runs after the search."""
    whole = build_data(Recipe(data=DataRecipe(data="digits", val_fraction=0.0)))
    held = build_data(Recipe(data=DataRecipe(data="digits", val_fraction=val_fraction, holdout=0.3)))
    assert set(held.splits) == {"train", "val"}
    assert {*held.split("train").names, *held.split("val").names} == set(whole.split("train").names)
    assert len(held.split("val")) == pytest.approx(0.3 * len(whole.split("train")), abs=10)


def test_interrupted_amid_training_it_ends_with_the_same_weights(
    color_weights: Path, photographs: Path, tmp_path: Path
) -> None:
    """Control-C in the second run, after its first step, and in the last, after its last."""
    settings = real(color_weights, photographs, learning_rates=(0.1, 0.01))
    whole, out = tmp_path / "whole", tmp_path / "out"
    bar = Bar()
    expected = sweep(settings, whole, Real(whole, bar))
    words = bar.told // 3
    for stop in (words + 2, 2 * words):
        with pytest.raises(KeyboardInterrupt):
            sweep(settings, out, Real(out, Bar(stop)))
    found = sweep(settings, out, Real(out))
    measured = ("learning_rate", "search", "seeds", "test_top1s", "val_top1", "steps", "images", "parameters")
    assert {key: found[key] for key in measured} == {key: expected[key] for key in measured}
    one, other = (load(folder / "model.safetensors").state_dict() for folder in (whole, out))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert torch.count_nonzero(one["head.weight"])


def test_a_rate_that_diverges_in_truth(
    color_weights: Path, pictures: Callable[[Path, dict[str, int]], Path], tmp_path: Path
) -> None:
    """The two classes have the same images, so that no step, however long, ends in peace."""
    data = pictures(tmp_path / "data", {"train/grey": 8, "train/gray": 8})
    settings = real(color_weights, data, learning_rates=(1e30, 0.01))
    summary = sweep(settings, tmp_path / "out", Real(tmp_path / "out"))
    assert summary["learning_rate"] == 0.01
    assert summary["search"]["1e+30"] is None
    assert summary["search"]["0.01"] is not None
    assert summary["test_top1s"] == [None]
    assert load(tmp_path / "out/search/rate-1e+30/checkpoints/last.safetensors").metadata.classes == ("gray", "grey")
