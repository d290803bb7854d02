"""``mixer vtab`` on stand-ins of all 19 tasks, read with the real readers and trained on for two steps each."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vtab_folders import USUAL_NAMES, write_task, write_vtab

import allmlp
from allmlp.config.vtab import TASKS

FAST = ("--steps", 2, "--batch-size", 8, "--image-size", 16, "--device", "cpu", "--workers", 0)
ONCE = ("--learning-rate", 0.05, "--seeds", 1)


@pytest.fixture(autouse=True)
def own_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ALLMLP_DATA", str(tmp_path / "store"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    sizes = {"patch_size": 8, "num_blocks": 1, "hidden_dim": 8, "tokens_mlp_dim": 4, "channels_mlp_dim": 8}
    allmlp.save(allmlp.create(num_classes=2, image_size=8, **sizes), path, classes=["a", "b"])
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vtab(tmp_path_factory.mktemp("vtab") / "vtab")


def times_of(out: Path) -> dict[str, int]:
    """When the report, the last file, of each complete task was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("*/report.html")}


def test_all_tasks_with_an_interruption(mixer, weights, tasks, tmp_path) -> None:
    """Stopped in one of the first tasks, as by a scheduler; the same command goes on, and repeats no complete task."""
    out = tmp_path / "out"
    words = [str(word) for word in ("vtab", weights, "--data", tasks, "--out", out, *FAST, *ONCE)]
    process = subprocess.Popen(
        [sys.executable, "-m", "allmlp.cli", *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 120
    while len(times_of(out)) < 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    assert (process.returncode, printed) == (143, ""), errors
    before = times_of(out)
    assert 2 <= len(before) < 19
    partial = json.loads((out / "vtab.json").read_text())
    assert (partial["vtab_top1"], partial["all"]["complete"]) == (None, False)

    answer = mixer(*words)
    assert answer.status == 0, answer.err
    assert {task: times_of(out)[task] for task in before} == before
    assert answer.err.count("is complete: nothing is left to do") == len(before)
    result = json.loads((out / "vtab.json").read_text())
    assert list(result["tasks"]) == list(TASKS)
    summaries = {task: json.loads((out / task / "summary.json").read_text()) for task in TASKS}
    assert {task: row["top1"] for task, row in result["tasks"].items()} == {
        task: summary["test_top1"] for task, summary in summaries.items()
    }
    mean = statistics.fmean(summary["test_top1"] for summary in summaries.values())
    assert result["vtab_top1"] == pytest.approx(mean)
    assert result["all"] == {
        "top1": pytest.approx(mean), "std": None, "tasks": 19, "of": 19, "complete": True, "commonest_class_top1": 0.5,
    }  # fmt: skip
    natural = [summaries[task]["test_top1"] for task in list(TASKS)[:7]]
    assert result["groups"]["natural"]["top1"] == pytest.approx(statistics.fmean(natural))
    assert [summary["data"] for summary in summaries.values()] == [str(tasks / name) for name in USUAL_NAMES]
    assert all(summary["images"] == {"train": 12, "test": 6} for summary in summaries.values())
    for shown in (*TASKS, "mean of 19", f"{mean:.4f}", "commonest class", str(out / "vtab.json")):
        assert shown in answer.out
    assert "incomplete" not in answer.out
    assert answer.err.count("is not VTAB-1k's") >= 19  # the stand-ins are not its images
    again = mixer(*words, "--json")
    assert json.loads(again.out)["vtab_top1"] == result["vtab_top1"]
    assert again.err.count("is complete: nothing is left to do") == 19


def test_rates_are_chosen_on_the_tasks_own_images_and_seeds_reported(mixer, weights, tasks, tmp_path) -> None:
    out = tmp_path / "out"
    words = ("vtab", weights, "--data", tasks, "--out", out, "--tasks", "clevr_dist", "DTD", *FAST)
    words = (*words, "--learning-rates", 0.01, 0.1, "--seeds", 2)
    answer = mixer(*words)
    assert answer.status == 0, answer.err
    for task in ("dtd", "clevr-distance"):
        for rate in (0.01, 0.1):
            tried = json.loads((out / task / "search" / f"rate-{rate}" / "summary.json").read_text())
            assert tried["images"] == {"train": 8, "val": 4}
            assert tried["split"].endswith("its own 4 images held out to choose by")
    result = json.loads((out / "vtab.json").read_text())
    assert list(result["tasks"]) == ["dtd", "clevr-distance"]
    assert len(result["not_selected"]) == 17
    row = result["tasks"]["dtd"]
    assert row["seeds"] == [0, 1]
    assert (row["top1"], row["std"]) == (pytest.approx(statistics.fmean(row["top1s"])), statistics.stdev(row["top1s"]))
    of_seeds = [statistics.fmean(pair) for pair in zip(*(r["top1s"] for r in result["tasks"].values()), strict=True)]
    assert (result["all"]["top1"], result["all"]["std"]) == (
        pytest.approx(statistics.fmean(of_seeds)), pytest.approx(statistics.stdev(of_seeds)),
    )  # fmt: skip
    assert result["vtab_top1"] is None
    assert "mean of 2 of 19" in answer.out
    assert "incomplete: the score of VTAB is the mean of all 19 tasks, and these are 2 of them" in answer.out
    assert f"{row['top1']:.4f} ± {row['std']:.4f}" in answer.out
    other = mixer(*words[:-1], 3)
    assert (other.status, "holds another fine-tuning (seeds differ)" in other.last) == (2, True)


def test_two_processes(weights, tasks, tmp_path) -> None:
    words = ("vtab", weights, "--data", tasks, "--out", tmp_path / "out", "--tasks", "svhn", *FAST, *ONCE, "--json")
    command = [sys.executable, "-m", "allmlp.cli", *map(str, words), "--processes", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tasks"]["svhn"]["images"] == {"train": 12, "test": 6}


def test_missing_tasks_are_one_list_before_any_training(mixer, weights, tmp_path) -> None:
    root = write_vtab(tmp_path / "vtab", ["dtd", "kitti"])
    words = ("vtab", weights, "--data", root, "--out", tmp_path / "out", *FAST, *ONCE)
    answer = mixer(*words, "--tasks", "dtd", "svhn", "dmlab")
    assert answer.status == 2
    assert len(answer.errors) == 1
    store = tmp_path / "store"
    assert f"2 of 3 tasks have no data: put svhn in {root / 'svhn'} or torchvision's copy, {store}" in answer.last
    assert f"dmlab in {root / 'dmlab'}" in answer.last
    assert not (tmp_path / "out").exists()
    answer = mixer(*words, "--skip-missing", "--json")
    assert answer.status == 0, answer.err
    result = json.loads(answer.out)
    assert (result["vtab_top1"], result["all"]["tasks"], result["all"]["complete"]) == (None, 2, False)
    assert len(result["missing"]) == 17
    assert answer.err.count("was skipped: no data in") == 17
    nothing = mixer(*words, "--skip-missing", "--tasks", "dmlab")
    assert (nothing.status, "1 of 1 tasks have no data" in nothing.last) == (2, True)


def test_each_task_has_its_image_size_schedule_and_data() -> None:
    from allmlp.api.vtab import plan_tasks

    given: dict[str, dict[str, Any]] = {section: {} for section in ("search", "model", "data", "optimization", "run")}
    plans = plan_tasks("w.npz", {task: f"vtab/{task}" for task in TASKS}, "bit", given)
    small = {task for task, plan in plans.items() if plan.recipe.model.image_size == 224}
    assert small == {"cifar100", "svhn", "eurosat", "dsprites-location", "dsprites-orientation"}
    assert {plan.recipe.model.image_size for plan in plans.values()} == {224, 448}
    assert {task: plan.recipe.data.data for task, plan in plans.items()} == {task: f"vtab/{task}" for task in TASKS}
    given["optimization"] = {"steps": 7}
    given["model"] = {"image_size": (32,)}
    for plan in plan_tasks("w.npz", {"dtd": "a", "svhn": "b"}, "vit", given).values():
        assert (plan.recipe.optimization.steps, plan.recipe.optimization.decay) == (7, "cosine")
        assert (plan.recipe.model.image_size, plan.search.learning_rates) == (32, (0.003, 0.01, 0.03))


def unlist(root: Path) -> None:
    (root / "dtd" / "val200.txt").unlink()


def spoil(root: Path) -> None:
    (root / "svhn" / "test.txt").write_text("images/test/0000.png\n")


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        (None, ("--tasks", "svnh"), "--tasks svnh: VTAB has no such task; did you mean svhn?"),
        (None, ("--data", "ROOT/dtd"), "is one task's folder: give the folder around it"),
        (None, ("--data", "ROOT/empty"), "has no folder of any VTAB task (it holds no folders)"),
        (None, ("--image-size", 20), "dtd: image size 20×20 is not a multiple of the patch size 8×8"),
        (None, ("--out", "WEIGHTS"), "is a file: name another folder with --out"),
        (None, ("--learning-rates", 0.1, "--learning-rate", 0.1), "both --learning-rate and --learning-rates"),
        (None, ("--search-fraction", 0.1), "unknown option --search-fraction"),
        (unlist, (), "has no val200.txt: a VTAB task's folder holds"),
        (spoil, (), "test.txt, line 1, 'images/test/0000.png': has no label"),
    ],
)
def test_mistakes(change: Callable[[Path], None] | None, words, said, mixer, weights, tmp_path) -> None:
    """Each is reported before any training."""
    root = write_vtab(tmp_path / "vtab", ["dtd", "svhn"])
    (root / "empty").mkdir()
    if change is not None:
        change(root)
    named = {"WEIGHTS": weights, "ROOT/dtd": root / "dtd", "ROOT/empty": root / "empty"}
    given = ["--data", root, "--tasks", "dtd", "svhn", "--out", tmp_path / "out", *FAST, "--seeds", 1]
    answer = mixer("vtab", weights, *given, *(named.get(word, word) for word in words))
    assert answer.status == 2
    assert len(answer.errors) == 1
    assert said in answer.last
    assert not (tmp_path / "out").exists()


def test_no_weights(mixer, tasks) -> None:
    assert "no weights: name a file" in mixer("vtab", "--data", tasks).last


def test_one_task_is_a_source(mixer, weights, tmp_path) -> None:
    folder = write_task(tmp_path / "dtd")
    words = ("finetune", weights, "--data", folder, "--out", tmp_path / "out", *FAST, "--learning-rates", 0.01, 0.1)
    answer = mixer(*words, "--json")
    assert answer.status == 0, answer.err
    assert json.loads(answer.out)["images"] == {"train": 12, "test": 6}
    tried = json.loads((tmp_path / "out" / "search" / "rate-0.1" / "summary.json").read_text())
    assert tried["images"] == {"train": 8, "val": 4}
