"""The run's steps from a recipe: averaging, keeping the best, stopping early, and what a failure leaves."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import (
    CPU,
    FROM_WEIGHTS,
    NOISY,
    Fitted,
    Watched,
    preemption_of,
    recipe,
    replace_data,
    same,
    state,
    train,
)

from allmlp.checkpointing.checkpoint import STATE
from allmlp.checkpointing.manager import checkpoints_by_step
from allmlp.data.loader import Batch
from allmlp.errors import RunError
from allmlp.evaluation.classification import classify
from allmlp.training import build
from allmlp.training.build import run_lengths
from allmlp.weights.load import load
from allmlp.weights.native import save


def watched(out: Path, top1: list[float] | None = None, **changes: Any) -> tuple[Watched, Fitted]:
    seen = Watched(out, recipe(**changes), top1)
    return seen, seen.fit()


def test_a_plain_run_ends_with_the_last_weights(tmp_path: Path) -> None:
    seen, fitted = watched(tmp_path / "run", steps=6, epochs=100)
    assert (fitted.steps, fitted.kept_step, fitted.warmup_steps, fitted.compiled) == (6, 6, 1, False)
    assert seen.messages == [(i, 6) for i in range(1, 7)]
    assert seen.splits == ["val"] * 3
    assert fitted.model is seen.model
    assert same(state(fitted.model), seen.steps[-1])
    assert same(state(load(tmp_path / "run/checkpoints/last.safetensors")), seen.steps[-1])
    assert all(same(shown, seen.steps[i]) for shown, i in zip(seen.shown, (1, 3, 5), strict=True))
    assert fitted.val.top1 > 0.5
    logged = [line for line in fitted.metrics if "loss" in line]
    assert [line["step"] for line in logged] == list(range(1, 7))
    rates = [line["learning_rate"] for line in logged]
    assert rates == pytest.approx([0, 0.01, 0.008, 0.006, 0.004, 0.002], rel=1e-4)
    for before, after, line in zip([seen.start, *seen.steps], seen.steps, logged, strict=False):
        change = torch.cat([(after[n] - before[n]).flatten() for n in after]).norm()
        assert line["update_norm"] == pytest.approx(float(change), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"steps": 100, "warmup_steps": 7}, (100, 7)),
        ({"steps": 20, "warmup_steps": 7}, (20, 4)),
        ({"steps": None, "epochs": 2.5, "warmup_steps": 0}, (5, 0)),
        ({"steps": None, "epochs": 0.01}, (1, 0)),
    ],
)
def test_lengths_of_run_and_warm_up(changes: dict[str, Any], expected: tuple[int, int]) -> None:
    assert run_lengths(recipe(**changes).optimization, 24) == expected


def test_the_average_is_evaluated_exported_and_kept_and_has_no_part_in_the_training(tmp_path: Path) -> None:
    seen, fitted = watched(tmp_path / "run", ema_decay=0.8, warmup_steps=0)
    plain, _ = watched(tmp_path / "plain", warmup_steps=0)
    assert all(same(a, b) for a, b in zip(seen.steps, plain.steps, strict=True))
    averages = [{name: w.double() for name, w in seen.steps[0].items()}]  # it starts at the first step's weights
    for weights in seen.steps[1:]:
        averages.append({name: 0.8 * averages[-1][name] + 0.2 * w.double() for name, w in weights.items()})
    last = state(load(tmp_path / "run/checkpoints/last.safetensors"))
    for found, step in zip([*seen.shown, state(fitted.model), last], (1, 3, 5, 5, 5), strict=True):
        assert all((found[name] - value).abs().max() < 1e-6 for name, value in averages[step].items()), step
    assert not same(last, seen.steps[-1])


@pytest.mark.parametrize("ema_decay", [None, 0.5])
@pytest.mark.parametrize(("keep", "step"), [("best", 4), ("last", 6)])
def test_the_best_or_the_last_is_kept(keep: str, step: int, ema_decay: float | None, tmp_path: Path) -> None:
    seen, fitted = watched(tmp_path / "run", [0.2, 0.7, 0.6, 0.7], keep=keep, ema_decay=ema_decay)
    assert (fitted.steps, fitted.kept_step) == (6, step)
    assert fitted.val.top1 == (0.7 if keep == "best" else 0.6)
    assert same(state(fitted.model), seen.shown[step // 2 - 1])
    assert not same(seen.shown[1], seen.shown[2])
    assert same(state(load(tmp_path / "run/checkpoints/best.safetensors")), seen.shown[1])
    assert same(state(load(tmp_path / "run/checkpoints/last.safetensors")), seen.shown[2])


@pytest.mark.parametrize(
    ("scores", "patience", "steps"),
    [
        ([0.5, 0.5, 0.4, 0.9], 2, 6),
        ([0.5, 0.4, 0.6, 0.6, 0.7], 2, 10),
        ([0.1, 0.2, 0.3, 0.4, 0.5], 1, 10),
    ],
)
def test_patience_ends_the_run_early(scores: list[float], patience: int, steps: int, tmp_path: Path) -> None:
    seen, fitted = watched(tmp_path / "run", scores, patience=patience, keep="best", epochs=5)
    best = 1 + int(np.argmax(scores[: steps // 2]))
    again = best != steps // 2  # the best weights are loaded, and evaluated once more
    assert fitted.steps == steps == 2 * (len(seen.shown) - again)
    assert fitted.kept_step == 2 * best
    assert same(state(fitted.model), seen.shown[best - 1])


def test_a_step_takes_its_own_micro_batches_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an image is loaded only when a step needs it, and a run that ends early waits for none."""
    taken: list[int] = []
    at_steps: list[int] = []
    build_batches = build.build_batches

    def counted(*args: Any) -> Iterator[Batch]:
        for i, batch in enumerate(build_batches(*args)):
            taken.append(i)
            yield batch

    monkeypatch.setattr(build, "build_batches", counted)
    seen = Watched(tmp_path / "run", recipe(micro_batch_size=4))
    preemption = preemption_of(seen.settings, seen.out)
    trainer = build.build(seen.settings, seen.data, seen.model, CPU, torch.float32, [], preemption, seen).trainer
    update = trainer.step.optimizer_step.update_weights
    trainer.step.optimizer_step.update_weights = lambda: (at_steps.append(len(taken)), update())[1]
    assert taken == []
    trainer.fit()
    assert at_steps == [3, 6, 9, 12, 15, 18]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_frozen_body_stays_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    trained, _ = watched(tmp_path / "first")
    save(trained.model, tmp_path / "weights.safetensors")
    changes = FROM_WEIGHTS | {"weights": str(tmp_path / "weights.safetensors"), "frozen": True} | {
        "dropout": 0.2, "stochastic_depth": 0.2, "ema_decay": 0.9, "recompute": True, "micro_batch_size": 6
    }  # fmt: skip
    _, fitted = watched(tmp_path / "run", **changes, optimizer=optimizer, weight_decay=0.5)
    before, after = state(trained.model), state(fitted.model)
    assert {n for n in before if not torch.equal(before[n], after[n])} == {"head.weight", "head.bias"}
    assert (after["head.weight"] != 0).any()


def test_micro_batches_and_recomputation_give_the_same_result(tmp_path: Path) -> None:
    settings = NOISY | {"optimizer": "sgd", "learning_rate": 0.1, "loss": "sigmoid", "head_bias": -2.0}
    whole, parts, recomputed = (
        watched(tmp_path / str(i), **settings | more)[0].steps
        for i, more in enumerate(({}, {"micro_batch_size": 3}, {"micro_batch_size": 6, "recompute": True}))
    )
    for steps in (parts, recomputed):
        assert len(steps) == len(whole) == 6
        assert max(float((steps[-1][name] - whole[-1][name]).abs().max()) for name in whole[-1]) < 1e-5


@pytest.mark.parametrize(("recompute", "times"), [(False, 1), (True, 2)])
def test_blocks_are_computed_again_where_the_recipe_says_so(recompute: bool, times: int, tmp_path: Path) -> None:
    seen = Watched(tmp_path / "run", recipe(recompute=recompute, ema_decay=0.5))
    calls = []
    for block in seen.model.blocks:
        block.get_submodule("norm2").register_forward_hook(lambda *words: calls.append(1))
    seen.fit()
    evaluations = 3  # of the average, a copy that has the hooks too and recomputes nothing
    assert len(calls) == (6 * times + evaluations) * len(seen.model.blocks)


def test_every_step_is_in_training_mode_after_evaluations_too(tmp_path: Path) -> None:
    seen, modes = Watched(tmp_path / "run", recipe(), [0.5]), []
    examine = seen.examine
    seen.examine = lambda model, name: examine(model.eval(), name)
    seen.model.register_forward_pre_hook(lambda model, inputs: modes.append(model.training))
    seen.fit()
    assert modes == [True] * 6


def test_float16_is_trained_with_scaled_gradients(tmp_path: Path) -> None:
    _, fitted = watched(tmp_path / "run", precision="float16")
    state_file = checkpoints_by_step(tmp_path / "run" / "checkpoints")[6] / STATE
    assert json.loads(state_file.read_text())["scaler"]["scale"] == 2**16
    assert fitted.val.top1 > 0.5


@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_run_of_everything_at_once(keep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_data(monkeypatch)
    noisy = NOISY | {"micro_batch_size": 6, "recompute": True, "randaugment": 10.0}
    done = train(recipe(**noisy, ema_decay=0.5, keep=keep, patience=2, steps=9), tmp_path / "run")
    assert done.results.keys() == {"val", "test"}
    assert done.summary["kept_step"] <= done.summary["steps"] <= 9
    saved = load(tmp_path / "run/model.safetensors")
    assert same(state(saved), state(done.model))
    assert not any("forward" in vars(module) for module in done.model.modules())  # nothing recomputed or compiled
    for split, result in done.results.items():
        again = classify(saved, done.data.splits[split], device=CPU, precision=torch.float32)
        assert again.top1 == done.summary[f"{split}_top1"] == result.top1


# What goes wrong


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_diverging_run_says_so_and_leaves_the_last_good_weights(ema_decay: float | None, tmp_path: Path) -> None:
    seen = Watched(tmp_path / "run", recipe(learning_rate=1e30, warmup_steps=0, ema_decay=ema_decay))
    with pytest.raises(RunError) as caught:
        seen.fit()
    path, good = tmp_path / "run/checkpoints/last.safetensors", len(seen.steps)  # the steps before the one that failed
    assert 1 <= good < 6
    for words in (f"step {good + 1}: loss ", "lower --learning-rate", "--warmup-steps", f"step {good}, ", str(path)):
        assert words in str(caught.value)
    left = load(path)
    assert all(p.isfinite().all() for p in left.parameters())
    assert left.metadata.provenance["step"] == good
    if ema_decay is None:
        assert same(state(left), seen.steps[-1])
        assert same(state(seen.model), seen.steps[-1])


PROGRAM = """
import pathlib, resource, sys
import torch.utils.tensorboard
sys.path.insert(0, {folder!r})
from small_runs import Watched, recipe
from allmlp.errors import RunError
sizes = dict(global_batch_size=1024, hidden_dim=1024, channels_mlp_dim=4096, patch_size=2, num_blocks=1, steps=2)
seen = Watched(pathlib.Path({out!r}), recipe(**sizes))
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {megabytes} * 2**20,) * 2)
try:
    seen.fit()
except RunError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_batch_that_does_not_fit_into_memory_is_told_what_to_do(tmp_path: Path) -> None:
    program = PROGRAM.format(folder=str(Path(__file__).parents[1]), out=str(tmp_path / "run"), megabytes=400)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    for words in ("1024 images at a time", "--micro-batch-size 512", "--recompute"):
        assert words in ended.stdout, ended.stderr[-2000:]
