"""The run's steps from a recipe: averaging, keeping the best, stopping early, and what a failure leaves."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import CPU, NOISY, Fitted, Silent, Watched, preemption_of, recipe, same, splits, state
from torch import Tensor

from allmlp.data.loader import Batch
from allmlp.errors import RunError
from allmlp.evaluation.classification import SplitEvaluator, classify
from allmlp.training import build
from allmlp.training.build import run_lengths
from allmlp.training.run import train
from allmlp.weights.load import load
from allmlp.weights.native import save


def watched(out: Path, top1: list[float] | None = None, **changes: Any) -> tuple[Watched, Fitted]:
    seen = Watched(out, recipe(**changes), top1)
    return seen, seen.fit()


def test_a_plain_run_ends_with_the_last_weights(tmp_path: Path) -> None:
    seen, fitted = watched(tmp_path / "run")
    assert (fitted.steps, fitted.kept_step, fitted.warmup_steps, fitted.compiled) == (6, 6, 1, False)
    assert seen.messages == [(i, 6) for i in range(1, 7)]
    assert seen.splits == ["val"] * 3
    assert fitted.model is seen.model
    assert same(state(fitted.model), seen.steps[-1])
    assert same(state(load(tmp_path / "run/checkpoints/last.safetensors")), seen.steps[-1])
    assert all(same(shown, seen.steps[i]) for shown, i in zip(seen.shown, (1, 3, 5), strict=True))
    assert fitted.val is not None
    assert fitted.val.top1 > 0.5
    logged = [line for line in fitted.metrics if "loss" in line]
    assert [line["step"] for line in logged] == list(range(1, 7))
    for before, after, line in zip([seen.start, *seen.steps], seen.steps, logged, strict=False):
        change = torch.cat([(after[n] - before[n]).flatten() for n in after]).norm()
        assert line["update_norm"] == pytest.approx(float(change), rel=1e-4)


@pytest.mark.parametrize("decay", [0.5, 0.0])
def test_the_average_is_the_one_by_hand(decay: float, tmp_path: Path) -> None:
    seen, fitted = watched(tmp_path / "run", ema_decay=decay)
    plain, _ = watched(tmp_path / "plain")
    assert all(same(a, b) for a, b in zip(seen.steps, plain.steps, strict=True))  # it has no part in the training
    average = {name: w.double() for name, w in seen.steps[0].items()}  # it starts at the first step's weights
    by_step = [average]
    for weights in seen.steps[1:]:
        average = {name: decay * average[name] + (1 - decay) * w.double() for name, w in weights.items()}
        by_step.append(average)
    last = state(load(tmp_path / "run/checkpoints/last.safetensors"))
    shown = [*zip(seen.shown, (1, 3, 5), strict=True), (state(fitted.model), 5), (last, 5)]
    for found, step in shown:
        for name, expected in by_step[step].items():
            assert (found[name] - expected).abs().max() < 1e-6, (step, name)
    assert decay == 0 or not same(state(fitted.model), seen.steps[-1])


@pytest.mark.parametrize("ema_decay", [None, 0.5])
@pytest.mark.parametrize(("keep", "step"), [("best", 4), ("last", 6)])
def test_the_best_or_the_last_is_kept(keep: str, step: int, ema_decay: float | None, tmp_path: Path) -> None:
    seen, fitted = watched(tmp_path / "run", [0.2, 0.7, 0.6, 0.7], keep=keep, ema_decay=ema_decay)
    assert (fitted.steps, fitted.kept_step) == (6, step)
    assert fitted.val is not None
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


def test_steps_override_epochs(tmp_path: Path) -> None:
    seen, fitted = watched(tmp_path / "run", steps=3, epochs=100)
    assert fitted.steps == 3
    assert len(seen.steps) == 3
    assert seen.splits == ["val"] * 2  # after an epoch, and at the end
    rates = [line["learning_rate"] for line in fitted.metrics if "learning_rate" in line]
    assert rates == pytest.approx([0.01, 0.01 * 2 / 3, 0.01 / 3], rel=1e-4)  # the schedule has their length


def test_a_step_takes_its_own_micro_batches_and_no_more(tmp_path: Path) -> None:
    """So that an image is loaded only when a step needs it, and a run that ends early waits for none."""
    taken: list[int] = []
    at_steps: list[int] = []

    def load(steps_done: int) -> Iterator[Batch]:
        for i, batch in enumerate(build.build_batches(settings, seen.data, seen.model, 6, steps_done)):
            taken.append(i)
            yield batch

    settings = recipe(micro_batch_size=4)
    seen = Watched(tmp_path / "run", settings)
    preemption = preemption_of(settings, seen.out)
    trainer = build.build(settings, seen.data, seen.model, CPU, torch.float32, [], preemption, seen).trainer
    trainer.batches.load = load
    step = trainer.step.optimizer_step.update_weights
    trainer.step.optimizer_step.update_weights = lambda: (at_steps.append(len(taken)), step())[1]
    assert taken == []
    trainer.fit()
    assert at_steps == [3, 6, 9, 12, 15, 18]


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


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_frozen_body_stays_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    trained, _ = watched(tmp_path / "first")
    save(trained.model, tmp_path / "weights.safetensors")
    sizes = ("patch_size", "num_blocks", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim")
    changes: dict[str, Any] = dict.fromkeys(sizes) | {"weights": str(tmp_path / "weights.safetensors"), "frozen": True}
    options = {"dropout": 0.2, "stochastic_depth": 0.2, "ema_decay": 0.9, "recompute": True, "optimizer": optimizer}
    _, fitted = watched(tmp_path / "run", **changes | options)
    before, after = state(trained.model), state(fitted.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}
    assert (after["head.weight"] != 0).any()


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("changes", [NOISY, NOISY | {"loss": "sigmoid", "head_bias": -2.0, "label_smoothing": 0.1}])
def test_micro_batches_and_recomputation_give_the_same_result(changes: dict[str, Any], tmp_path: Path) -> None:
    settings = changes | {"optimizer": "sgd", "learning_rate": 0.1}
    found = {
        name: watched(tmp_path / name, **settings | more)[0]
        for name, more in {
            "whole": {},
            "parts": {"micro_batch_size": 3},
            "recomputed": {"micro_batch_size": 6, "recompute": True},
            "seed": {"seed": 1},
        }.items()
    }
    whole = found["whole"].steps[-1]
    for name in ("parts", "recomputed"):
        assert far(found[name].steps[-1], whole) < 1e-5, name
        assert len(found[name].steps) == 6
    assert far(found["seed"].steps[-1], whole) > 1e-2


@pytest.mark.parametrize(("recompute", "times"), [(False, 1), (True, 2)])
def test_blocks_are_computed_again_where_the_recipe_says_so(recompute: bool, times: int, tmp_path: Path) -> None:
    seen = Watched(tmp_path / "run", recipe(recompute=recompute, ema_decay=0.5))
    calls = []
    for block in seen.model.blocks:
        block.get_submodule("norm2").register_forward_hook(lambda *words: calls.append(1))
    seen.fit()
    evaluations = 3  # of the average, a copy that has the hooks too and recomputes nothing
    assert len(calls) == (6 * times + evaluations) * len(seen.model.blocks)


def test_float16_is_trained_with_scaled_gradients(tmp_path: Path) -> None:
    _, fitted = watched(tmp_path / "run", precision="float16", epochs=20)
    assert fitted.val is not None
    assert fitted.val.top1 > 0.5


# What goes wrong


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_diverging_run_says_so_and_leaves_the_last_good_weights(ema_decay: float | None, tmp_path: Path) -> None:
    seen = Watched(tmp_path / "run", recipe(learning_rate=1e30, warmup_steps=0, ema_decay=ema_decay))
    with pytest.raises(RunError) as caught:
        seen.fit()
    path = tmp_path / "run/checkpoints/last.safetensors"
    good = len(seen.steps)  # the steps before the one that failed
    assert 1 <= good < 6
    told = str(caught.value)
    assert f"step {good + 1}: loss " in told
    assert "diverged; lower --learning-rate or lengthen --warmup-steps" in told
    assert f"the weights of step {good}, the last good one, are in {path}" in told
    left = load(path)
    assert all(p.isfinite().all() for p in left.parameters())
    assert left.metadata.provenance["step"] == good
    if ema_decay is None:
        assert same(state(left), seen.steps[-1])
        assert same(state(seen.model), seen.steps[-1])


def test_a_whole_run_of_everything_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "load_source", lambda *words, **options: splits(train=24, val=6, test=6))
    settings = recipe(
        **NOISY, micro_batch_size=6, recompute=True, ema_decay=0.5, keep="best", patience=2, randaugment=10.0, steps=9
    )
    done = train(settings, tmp_path / "run", SplitEvaluator, Silent())
    assert done.results.keys() == {"val", "test"}
    assert done.summary["kept_step"] <= done.summary["steps"] <= 9
    assert done.summary["val_top1"] == done.results["val"].top1
    assert same(state(load(tmp_path / "run/model.safetensors")), state(done.model))
    again = classify(
        load(tmp_path / "run/model.safetensors"), done.data.splits["val"], device=CPU, precision=torch.float32
    )
    assert again.top1 == done.summary["val_top1"]


def raising(error: Exception) -> Callable[[Tensor, Tensor], Tensor]:
    def forward(images: Tensor, keys: Tensor) -> Tensor:
        raise error

    return forward


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ],
    ids=["cuda", "python", "cpu", "another"],
)
def test_a_batch_that_does_not_fit_into_memory(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Watched(tmp_path / "run", recipe(micro_batch_size=6))
    monkeypatch.setattr(seen.model, "forward", raising(error))
    with pytest.raises((RunError, RuntimeError)) as caught:
        seen.fit()
    if "multiplied" in str(error):
        assert caught.value is error
    else:
        assert isinstance(caught.value, RunError)
        assert all(words in str(caught.value) for words in ("6 images", "--micro-batch-size 3", "--recompute"))
        assert caught.value.__cause__ is error


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
def test_a_batch_that_really_does_not_fit_is_told_what_to_do(tmp_path: Path) -> None:
    program = PROGRAM.format(folder=str(Path(__file__).parents[1]), out=str(tmp_path / "run"), megabytes=400)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    told = "1024 images at a time do not fit into memory: give --micro-batch-size 512 or less"
    assert ended.stdout.startswith(told), ended.stderr[-2000:]
