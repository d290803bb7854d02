"""A run on several ranks equals that of one process: weights, averages, losses, evaluations, and the weights kept.

In float64, so that the remaining differences come from the order of sums alone.
"""

import dataclasses
import functools
import itertools
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs
import torch
from PIL import Image
from ranks import rank_values
from small_runs import CLASSES, CPU, Silent, preemption_of

from allmlp.config.batch_size import check_world_size
from allmlp.config.recipe import Recipe
from allmlp.data.dataset import DatasetSplits, ImageDataset
from allmlp.data.decode import UnreadableImage
from allmlp.data.stores import ArrayStore
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.distributed.parallelize import full_model, shard
from allmlp.errors import UserError
from allmlp.evaluation.classification import Classification, classify
from allmlp.model import Mixer
from allmlp.training.build import build_initializer
from allmlp.weights.native import save

DTYPES = {"float64": torch.float64, "float32": torch.float32}


class PartlyUnreadable(ArrayStore):
    """Raises an error for some of its images."""

    def __init__(self, pixels: np.ndarray, names: tuple[str, ...], unreadable: tuple[int, ...]) -> None:
        super().__init__(pixels, names)
        self.unreadable = {names[i] for i in unreadable}

    def open(self, name: str, max_pixels: int, min_side: int | None = None) -> Image.Image:
        if name in self.unreadable:
            raise UnreadableImage(f"{name} is unreadable")
        return super().open(name, max_pixels, min_side)


def dataset(images: int, seed: int, unreadable: tuple[int, ...] = ()) -> ImageDataset:
    readable = small_runs.dataset(images, seed)
    assert isinstance(readable.store, ArrayStore)
    store = PartlyUnreadable(readable.store.pixels, readable.names, unreadable)
    return dataclasses.replace(readable, store=store)


def recipe(**changes: Any) -> Recipe:
    """Six steps of 12 images, two per epoch, of a model whose sizes two ranks cannot halve."""
    odd_sizes = {"hidden_dim": 7, "tokens_mlp_dim": 5, "channels_mlp_dim": 11}
    return small_runs.recipe(**{**odd_sizes, "max_unreadable_fraction": 1.0, **changes})


def train(
    context: DistributedContext,
    sharded: bool,
    out: Path,
    changes: dict[str, Any],
    unreadable: tuple[int, ...],
    kind: str,
) -> dict[str, Any]:
    """The results of a run, as arrays and numbers. ``kind``: float64, float32, or float16 with scaled gradients."""
    settings = recipe(**changes)
    check_world_size(settings, context.world_size)
    data = DatasetSplits(
        splits={"train": dataset(24, 0, unreadable), "val": dataset(7, 1)}, classes=CLASSES, description="made"
    )
    initializer = build_initializer(settings)
    model = initializer.build_meta(CLASSES).to(DTYPES.get(kind, torch.float32))
    if sharded:
        shard(model, context, CPU)
    initializer.init_weights(model.to_empty(device="cpu"))
    precision = torch.float16 if kind == "float16" else torch.float32
    evaluations: list[Classification] = []

    def examine(model: Mixer, name: str) -> Classification:
        dataset = data.splits[name]
        evaluations.append(
            classify(model, dataset, device=CPU, precision=precision, batch_size=3, workers=0, context=context)
        )
        return evaluations[-1]

    if context.is_rank0:
        (out / "checkpoints").mkdir(parents=True)
    context.sum([0])  # a barrier
    preemption = preemption_of(settings, out, context)
    fitted = small_runs.fit(settings, out, data, model, CPU, precision, examine, Silent(), preemption)
    return {
        "weights": {name: p.detach().numpy().copy() for name, p in fitted.model.named_parameters()},
        "trained": {name: p.detach().numpy().copy() for name, p in full_model(model).named_parameters()},
        "losses": [record["loss"] for record in fitted.metrics if "loss" in record],
        "norms": [[record["gradient_norm"], record["update_norm"]] for record in fitted.metrics if "loss" in record],
        "val": [(record["step"], record["val_top1"]) for record in fitted.metrics if "val_top1" in record],
        "val_loss": [record["val_loss"] for record in fitted.metrics if "val_loss" in record],
        "kept": (fitted.steps, fitted.kept_step),
        "unreadable": fitted.unreadable,
        "best": [result.best.tolist() for result in evaluations],
    }


def max_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype for name in a)
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def compare(found: dict[str, Any], expected: dict[str, Any], limit: float = 1e-10) -> None:
    assert max_difference(found["weights"], expected["weights"]) < limit
    assert max_difference(found["trained"], expected["trained"]) < limit
    for name in ("losses", "val_loss"):
        assert np.allclose(found[name], expected[name], rtol=1e-5, atol=limit), name  # logits are read in float32
    assert np.allclose(found["norms"], expected["norms"], rtol=1e-5, atol=limit)
    for name in ("val", "kept", "unreadable", "best"):
        assert found[name] == expected[name], name


MASKED = {"dropout": 0.2, "stochastic_depth": 0.4}
MIXED = {"mixup": 0.5, "cutmix": 1.0, "mix_group_size": 2}
SGD = {"optimizer": "sgd", "learning_rate": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip_norm": 0.05, **SGD},
    "not clipped": {"clip_norm": None, **SGD},
    "micro-batches": {"micro_batch_size": 2, **SGD},
    "micro-batches of one": {"micro_batch_size": 1, **MASKED, **SGD},
    "micro-batches of half a step": {"micro_batch_size": 6, **MASKED, **MIXED},
    "mixed": {**MASKED, **MIXED, "micro_batch_size": 2, "randaugment": 10.0, "color_jitter": 0.3, **SGD},
    "recomputed": {"recompute": True, "micro_batch_size": 2, **MASKED, **MIXED, **SGD},
    "sigmoid": {"loss": "sigmoid", "head_bias": -2.0, "label_smoothing": 0.1, **MIXED, **SGD},
    "smoothed": {"label_smoothing": 0.2, "decay": "cosine", **SGD},
    "unreadable": {**SGD},
    "unreadable, mixed": {"micro_batch_size": 2, **MIXED, **SGD},
    "all unreadable": {"steps": 2, **SGD},
    "EMA, the best kept": {"ema_decay": 0.5, "keep": "best", "patience": 2, "evaluate_every_steps": 1, **SGD},
}
UNREADABLE = (0, 1, 2, 5, 8, 9, 17)  # unevenly spread over ranks and micro-batches
UNREADABLE_OF = {"unreadable": UNREADABLE, "unreadable, mixed": UNREADABLE, "all unreadable": tuple(range(24))}


def settings_of(name: str) -> dict[str, Any]:
    return CASES[name] | ({"clip_norm": 1.0, "beta2": 0.5} if "optimizer" not in CASES[name] else {})


def train_all_cases(context: DistributedContext, sharded: bool, out: Path) -> dict[str, Any]:
    """The results of each case, or its traceback."""
    results: dict[str, Any] = {}
    for name in CASES:
        try:
            results[name] = train(
                context, sharded, out / name, settings_of(name), UNREADABLE_OF.get(name, ()), "float64"
            )
        except (NotImplementedError, ValueError, UserError):
            results[name] = traceback.format_exc()
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """All cases with one process, DDP or FSDP2; each mode runs once, when it is first asked for."""

    @functools.cache
    def run(mode: str) -> list[dict[str, Any]]:
        out = tmp_path_factory.mktemp("runs")
        return (
            [train_all_cases(SINGLE_PROCESS, False, out)]
            if mode == "single"
            else rank_values(train_all_cases, 2, mode == "FSDP2", out, timeout=120.0)
        )

    return run


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", ["DDP", "FSDP2"])
def test_two_ranks_train_like_one_process(name: str, mode: str, runs: Callable[[str], list[dict[str, Any]]]) -> None:
    (expected,) = (results[name] for results in runs("single"))
    assert len(expected["losses"]) == expected["kept"][0]
    assert expected["unreadable"] == [f"{i:03d}" for i in UNREADABLE_OF.get(name, ())]
    assert name != "all unreadable" or expected["losses"] == [0.0, 0.0]
    first, second = (results[name] for results in runs(mode))
    assert not isinstance(first, str), first
    compare(first, expected, 1e-10 if "optimizer" in CASES[name] else 1e-7)  # Adam amplifies rounding errors
    assert max_difference(first["weights"], second["weights"]) == 0
    assert {k: v for k, v in first.items() if isinstance(v, list)} == {
        k: v for k, v in second.items() if isinstance(v, list)
    }


def test_three_ranks_with_uneven_shards(tmp_path: Path) -> None:
    changes = {**MASKED, **MIXED, **SGD, "micro_batch_size": 2, "ema_decay": 0.9}
    expected = train(SINGLE_PROCESS, False, tmp_path / "single", changes, UNREADABLE, "float64")
    for found in rank_values(train, 3, True, tmp_path / "three", changes, UNREADABLE, "float64"):
        compare(found, expected)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_a_frozen_body_stays_bit_identical_on_all_ranks(sharded: bool, recompute: bool, tmp_path: Path) -> None:
    settings = recipe()
    model = build_initializer(settings)(CLASSES).double()
    path = tmp_path / "weights.safetensors"
    save(model, path)
    sizes = dict.fromkeys(("patch_size", "num_blocks", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim"))
    changes = {**sizes, "weights": str(path), "frozen": True, "recompute": recompute, "ema_decay": 0.5, **MASKED, **SGD}
    expected = train(SINGLE_PROCESS, False, tmp_path / "single", changes, (), "float64")
    before = {name: p.detach().numpy() for name, p in model.named_parameters()}
    for found in rank_values(train, 2, sharded, tmp_path / "two", changes, (), "float64"):
        compare(found, expected)
        changed = {name for name, array in found["weights"].items() if not np.array_equal(array, before[name])}
        assert changed == {"head.weight", "head.bias"}


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_float16_trains_with_scaled_gradients_on_two_ranks(sharded: bool, tmp_path: Path) -> None:
    changes = {"epochs": 20, "evaluate_every_epochs": 10}
    expected = train(SINGLE_PROCESS, False, tmp_path / "single", changes, (), "float16")
    first, second = rank_values(train, 2, sharded, tmp_path / "two", changes, (), "float16")
    assert max_difference(first["weights"], second["weights"]) == 0
    assert np.allclose(first["losses"][:5], expected["losses"][:5], rtol=0.02)
    assert first["losses"][-1] < 0.7 * first["losses"][0]
    assert first["val"][-1][1] > 0.5


# Evaluation


def evaluate(context: DistributedContext, images: int, unreadable: tuple[int, ...], batch_size: int) -> Any:
    """A classification, as bytes; or its error message."""
    model = build_initializer(recipe())(CLASSES)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    progress: list[tuple[int, int]] = []
    try:
        found = classify(
            model,
            dataset(images, 2, unreadable),
            device=CPU,
            precision=torch.float32,
            batch_size=batch_size,
            workers=0,
            on_progress=lambda *counts: progress.append(counts),
            context=context,
        )
    except UserError as error:
        return str(error)
    assert progress[-1] == (images, images)
    assert all(done <= total for done, total in progress)
    arrays = (found.indices, found.labels, found.best, found.probabilities)
    return [(a.dtype.str, a.shape, a.tobytes()) for a in arrays], found.loss.hex(), found.unreadable


Case = tuple[int, tuple[int, ...], int]  # arguments of ``evaluate``


def evaluate_all(context: DistributedContext, cases: list[Case]) -> list[Any]:
    return [evaluate(context, *case) for case in cases]


@pytest.mark.parametrize("world_size", [2, 3])
def test_an_evaluation_is_bit_identical_on_any_number_of_ranks(world_size: int) -> None:
    cases: list[Case] = []
    for images, batch_size in itertools.product([1, 2, 5, 16, 17], [1, 4, 256]):
        unreadable = [(), tuple(range(0, images - 1, 3)), tuple(range(images - 1)), tuple(range(images))]
        cases += [(images, indices, batch_size) for indices in unreadable]
    expected = evaluate_all(SINGLE_PROCESS, cases)
    assert {isinstance(outcome, str) for outcome in expected} == {False, True}
    for found in rank_values(evaluate_all, world_size, cases):
        for case, one, other in zip(cases, found, expected, strict=True):
            assert one == other, case
