"""Fine-tuning: rates tried on held-out training images, the best used on all, and a folder that is resumed."""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from small_runs import FROM_WEIGHTS
from small_runs import recipe as small_recipe

from allmlp.config.recipe import FinetuneRecipe, Recipe, SearchRecipe
from allmlp.config.serialize import from_json, to_json_object
from allmlp.data.sources import load_source
from allmlp.errors import RunError, UserError
from allmlp.files import to_json
from allmlp.runs.folder import run_folder
from allmlp.training.build import build_data
from allmlp.training.sweep import mean_and_std, sweep
from allmlp.training.trainer import Diverged

RATES = (0.03, 0.003, 0.01)
HELD_OUT = {0.03: 0.5, 0.003: 0.25, 0.01: 0.75}  # top-1 of each rate's search
TEST = {5: 0.5, 6: 0.7, 7: 0.9}  # of each seed's run
ORDER = ["search/rate-0.03", "search/rate-0.003", "search/rate-0.01", "seed-5", "seed-6", "seed-7"]
COPIED = ("recipe.json", "model.safetensors", "report.html")

Moment = Literal["start", "checkpoint", "report"]  # of a run


def plan(rates: tuple[float, ...] = RATES, fraction: float = 0.3, seeds: int = 3, **changes: Any) -> FinetuneRecipe:
    recipe = small_recipe(**FROM_WEIGHTS | {"learning_rate": 0.2, "seed": 5} | changes)
    return FinetuneRecipe(
        recipe=recipe, search=SearchRecipe(learning_rates=rates, search_fraction=fraction, seeds=seeds)
    )


class FakeRuns:
    """Trains nothing: keeps the recipes that it was called with, and leaves folders as runs do.

    ``held_out`` is the top-1 by learning rate of runs with images held out, ``test`` that by seed of the others; where
    there is none, the run diverges. ``stop`` says at which run (from 0) and moment to raise what.
    """

    def __init__(
        self,
        out: Path,
        held_out: dict[float, float] = HELD_OUT,
        test: dict[int, float] = TEST,
        stop: tuple[int, Moment, BaseException] | None = None,
    ) -> None:
        self.out, self.held_out, self.test, self.stop = out, held_out, test, stop
        self.recipes: list[Recipe] = []
        self.folders: list[str] = []

    def __call__(self, recipe: Recipe, folder: Path) -> dict[str, Any]:
        at = len(self.recipes)
        self.recipes.append(recipe)
        self.folders.append(folder.relative_to(self.out).as_posix())

        def reach(moment: Moment) -> None:
            if self.stop and self.stop[:2] == (at, moment):
                raise self.stop[2]

        with run_folder(folder):
            checkpoint = folder / "checkpoints" / "last.safetensors"
            checkpoint.parent.mkdir(exist_ok=True)
            reach("start")
            checkpoint.write_text("weights")
            reach("checkpoint")
            rate, searches = recipe.optimization.learning_rate, recipe.data.holdout > 0
            top1 = self.held_out.get(rate) if searches else self.test.get(recipe.run.seed)
            if top1 is None:
                raise Diverged(f"step 2: loss nan: diverged at {rate:g}")
            summary = {"val_top1": None, "test_top1": None, "seed": recipe.run.seed, "train_seconds": 2.0, "steps": 9}
            summary["val_top1" if searches else "test_top1"] = top1
            (folder / "recipe.json").write_text(to_json(to_json_object(recipe)))
            (folder / "model.safetensors").write_text(f"weights of {folder.name} by {rate:g}")
            (folder / "summary.json").write_text(to_json(summary))
            (folder / "examples").mkdir(exist_ok=True)
            (folder / "examples" / "0-a.png").write_text(folder.name)
            reach("report")
            (folder / "report.html").write_text(f"<html>{folder.name}</html>")
        checkpoint.unlink()  # a complete run keeps none
        return summary


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "out"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_rates_are_tried_in_order_and_then_each_seed_trains_with_the_best(out: Path) -> None:
    runs, given = FakeRuns(out), plan().recipe
    sweep(plan(), out, runs)
    assert runs.folders == ORDER
    changes = [*((rate, 5, 0.3) for rate in RATES), *((0.01, seed, 0.0) for seed in (5, 6, 7))]
    assert runs.recipes == [
        dataclasses.replace(
            given,
            data=dataclasses.replace(given.data, holdout=holdout),
            optimization=dataclasses.replace(given.optimization, learning_rate=rate),
            run=dataclasses.replace(given.run, seed=seed),
        )
        for rate, seed, holdout in changes
    ]


@pytest.mark.parametrize(
    ("held_out", "chosen"),
    [
        ({0.03: 0.9, 0.003: 0.1, 0.01: 0.2}, 0.03),
        ({0.03: 0.9, 0.003: 0.1, 0.01: 0.9}, 0.01),
        ({0.03: 0.5, 0.003: 0.5, 0.01: 0.5}, 0.003),
        ({0.01: 0.0}, 0.01),
        ({0.03: 0.4, 0.01: 0.3}, 0.03),
    ],
    ids=str,
)
def test_the_best_rate_that_does_not_diverge_is_chosen_the_smaller_on_ties(
    held_out: dict[float, float], chosen: float, out: Path
) -> None:
    runs = FakeRuns(out, held_out)
    assert sweep(plan(), out, runs)["learning_rate"] == chosen
    assert {recipe.optimization.learning_rate for recipe in runs.recipes[3:]} == {chosen}


def test_without_rates_there_is_no_search(out: Path) -> None:
    runs = FakeRuns(out)
    summary = sweep(plan(rates=()), out, runs)
    assert runs.folders == ORDER[3:]
    assert {recipe.optimization.learning_rate for recipe in runs.recipes} == {0.2}
    assert (summary["learning_rate"], summary["search"]) == (0.2, {})
    assert not (out / "search").exists()


# What is in the folder


def test_the_folder_holds_the_first_seeds_run_and_the_summary_of_all(out: Path) -> None:
    out.mkdir(parents=True)  # an empty folder is as good as none
    summary = sweep(plan(), out, FakeRuns(out))
    assert {path.name for path in out.iterdir()} == {
        *(*COPIED, "examples", "summary.json", "transfer.json", "search", "seed-5", "seed-6", "seed-7")
    }
    for name in (*COPIED, "examples/0-a.png"):
        assert (out / name).read_bytes() == (out / "seed-5" / name).read_bytes()
    assert from_json(out / "recipe.json").optimization.learning_rate == 0.01
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary == json.loads((out / "seed-5" / "summary.json").read_text()) | {
        "learning_rate": 0.01,
        "search": {"0.03": 0.5, "0.003": 0.25, "0.01": 0.75},
        "seeds": [5, 6, 7],
        "test_top1s": [0.5, 0.7, 0.9],
        "test_top1_mean": pytest.approx(0.7),
        "test_top1_std": pytest.approx(0.2),  # (0.2² + 0² + 0.2²) / (3 − 1)
        "total_train_seconds": 12.0,
    }


@pytest.mark.parametrize(
    ("accuracies", "mean", "std"),
    [([], None, None), ([None], None, None), ([0.5], 0.5, None), ([0.5, 0.7, None], 0.6, 0.02**0.5)],
    ids=str,
)
def test_mean_and_deviation_of_a_sample(accuracies: list[float | None], mean: float | None, std: float | None) -> None:
    assert mean_and_std(accuracies) == {"test_top1_mean": pytest.approx(mean), "test_top1_std": pytest.approx(std)}


# Runs that diverge


def test_a_rate_that_diverges_counts_as_none(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    summary = sweep(plan(), out, FakeRuns(out, {0.003: 0.1, 0.01: 0.2}))
    message = "step 2: loss nan: diverged at 0.03"
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [message]
    assert summary["search"] == {"0.03": None, "0.003": 0.1, "0.01": 0.2}
    failed = json.loads((out / "search" / "rate-0.03" / "summary.json").read_text())
    assert failed == {"val_top1": None, "test_top1": None, "failed": message}


@pytest.mark.parametrize(
    ("held_out", "test", "message", "tried"),
    [
        ({}, TEST, r"0\.03, 0\.003, 0\.01.* --learning-rates .* --out", ORDER[:3]),
        (HELD_OUT, {5: 0.5, 7: 0.9}, r"diverged at 0\.01", ORDER),
    ],
    ids=["every rate", "a seed"],
)
def test_where_every_rate_or_a_seed_diverges_the_fine_tuning_fails(
    held_out: dict[float, float], test: dict[int, float], message: str, tried: list[str], out: Path
) -> None:
    runs = FakeRuns(out, held_out, test)
    with pytest.raises(RunError, match=message):
        sweep(plan(), out, runs)
    assert runs.folders == tried
    assert not (out / "summary.json").exists()
    assert (out / "search/rate-0.01/checkpoints/last.safetensors").exists() == (not held_out)  # as the message says


# Interrupted and resumed


@pytest.mark.parametrize("moment", ["start", "checkpoint", "report"])
@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("kind", [KeyboardInterrupt, UserError, OSError])
def test_called_again_it_resumes_where_it_was_stopped(
    number: int, moment: Moment, kind: type[BaseException], tmp_path: Path, out: Path
) -> None:
    """Of a first run without a checkpoint nothing is kept, and none of the folders that were created for it."""
    whole = tmp_path / "whole"
    expected = sweep(plan(), whole, FakeRuns(whole))
    stopped, then = FakeRuns(out, stop=(number, moment, kind("stopped"))), FakeRuns(out)
    with pytest.raises(RunError if kind is OSError else kind, match="stopped"):
        sweep(plan(), out, stopped)
    assert stopped.folders == ORDER[: number + 1]
    assert out.parent.exists() == out.exists() == (number > 0 or moment != "start")
    finished = {name: content for name, content in tree(out).items() if not name.startswith(ORDER[number])}
    assert sweep(plan(), out, then) == expected
    assert then.folders == ORDER[number:]
    assert tree(out) == tree(whole)
    assert finished.items() <= tree(out).items()


def test_a_complete_fine_tuning_is_not_repeated(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nor is a rate that diverged tried again."""
    expected, again = sweep(plan(), out, FakeRuns(out, {0.01: 0.2})), FakeRuns(out)
    before = tree(out)
    with caplog.at_level(logging.INFO, "allmlp"):
        assert sweep(plan(), out, again) == expected
    assert again.folders == []
    assert tree(out) == before
    assert f"resuming the fine-tuning in {out}" in caplog.messages


# Folders that are refused, and left as they are


def earlier_plan() -> str:
    stored = json.loads(to_json(dataclasses.asdict(plan())))
    stored["recipe"]["optimization"]["polyak"] = stored["recipe"]["optimization"].pop("ema_decay")
    return json.dumps(stored)


DAMAGED = r"transfer\.json is damaged .* --out"
OTHER = r"holds no unfinished fine-tuning.* --out"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        *(("transfer.json", text, DAMAGED) for text in ("", "[]", "{}", '{"recipe": null}', '{"recipe": []}', "null")),
        ("transfer.json", earlier_plan(), "earlier version .* cannot be resumed"),
        *((name, "precious", OTHER) for name in ("notes.txt", "summary.json", "transfer.json/file")),
    ],
)
def test_a_folder_of_something_else_is_refused(name: str, text: str, message: str, out: Path) -> None:
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text(text)
    runs = FakeRuns(out)
    with pytest.raises(UserError, match=message):
        sweep(plan(), out, runs)
    assert runs.folders == []
    assert tree(out) == {name: text.encode()}


@pytest.mark.parametrize("finished", [True, False])
def test_another_plan_in_the_folder_is_refused_with_the_difference(finished: bool, out: Path) -> None:
    if finished:
        sweep(plan(), out, FakeRuns(out))
    else:
        with pytest.raises(KeyboardInterrupt):
            sweep(plan(), out, FakeRuns(out, stop=(2, "checkpoint", KeyboardInterrupt())))
    before, runs = tree(out), FakeRuns(out)
    others = {
        "learning_rates": plan(rates=(0.003, 0.03, 0.01)),
        "seeds": plan(seeds=2),
        "search_fraction": plan(fraction=0.2),
        "epochs, global_batch_size": plan(global_batch_size=8, epochs=4),
        "clip_norm": plan(clip_norm=None),
    }
    for fields, other in others.items():
        with pytest.raises(UserError, match=rf"another fine-tuning \({fields} differ\): .* --out"):
            sweep(other, out, runs)
    assert runs.folders == []
    assert tree(out) == before


def test_a_mistake_in_the_first_run_leaves_the_folders_that_were_there(out: Path) -> None:
    out.parent.mkdir()
    with pytest.raises(UserError):
        sweep(plan(), out, FakeRuns(out, stop=(0, "start", UserError("wrong"))))
    assert list(out.parent.iterdir()) == []


# The images of the runs; test_weights_commands.py has whole fine-tunings


def test_the_search_sees_no_test_image_and_the_last_runs_all_training_images(
    pictures: Callable[..., Path], tmp_path: Path
) -> None:
    counts = {"train/red": 12, "train/blue": 8, "test/red": 3, "test/blue": 3, "val/red": 2, "val/blue": 2}
    data, runs = pictures(tmp_path / "data", counts), FakeRuns(tmp_path / "out")
    sweep(plan(fraction=0.25, data=str(data), val_fraction=0.0), runs.out, runs)
    given = {name: set(split.names) for name, split in load_source(str(data)).splits.items()}
    found = [{name: set(split.names) for name, split in build_data(recipe).splits.items()} for recipe in runs.recipes]
    for search in found[:3]:
        assert search.keys() == {"train", "val"}
        assert search["train"] | search["val"] == given["train"]
        assert len(search["train"]) + len(search["val"]) == 20
        assert len(search["val"]) == 5  # a quarter of each class
        assert search["val"] == found[0]["val"]  # all rates are compared on the same images
    assert found[3:] == [given] * 3


@pytest.mark.parametrize("val_fraction", [0.0, 0.2])
def test_images_are_held_out_in_place_of_validation_not_beside_it(val_fraction: float) -> None:
    whole = build_data(small_recipe(data="digits", val_fraction=0.0))
    held = build_data(small_recipe(data="digits", val_fraction=val_fraction, holdout=0.3))
    assert set(held.splits) == {"train", "val"}
    assert {*held.split("train").names, *held.split("val").names} == set(whole.split("train").names)
    assert len(held.split("val")) == pytest.approx(0.3 * len(whole.split("train")), abs=10)
