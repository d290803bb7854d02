"""A run on several ranks is the run of one process: weights, averages, losses, evaluations, and what is kept.

In float64, so that what is left between them is the order of sums and nothing else.
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
import torch
from allmlp.training.fit import fit
from allmlp.training.signals import SignalState
from PIL import Image
from ranks import values

from allmlp.checkpointing.manager import CheckpointManager
from allmlp.config.checks import check_world_size
from allmlp.config.recipe import (
    DataRecipe,
    ModelRecipe,
    OptimizationRecipe,
    Recipe,
    RunRecipe,
)
from allmlp.data.dataset import DatasetSplits, ImageDataset
from allmlp.data.decode import UnreadableImage
from allmlp.data.stores import ArrayStore
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.distributed.parallelize import full_model, shard
from allmlp.errors import UserError
from allmlp.evaluation.classification import Classification, classify
from allmlp.model import Mixer
from allmlp.training.initialization import prepare
from allmlp.training.preemption import Control
from allmlp.weights.native import save

CLASSES = ("a", "b", "c")
CPU = torch.device("cpu")
DTYPES = {"float64": torch.float64, "float32": torch.float32}


class Spoilt(ArrayStore):
    """Some of its images cannot be read."""

    def __init__(self, pixels: np.ndarray, names: tuple[str, ...], bad: tuple[int, ...]) -> None:
        super().__init__(pixels, names)
        self.bad = {names[i] for i in bad}

    def open(self, name: str, max_pixels: int, min_side: int | None = None) -> Image.Image:
        if name in self.bad:
            raise UnreadableImage(f"{name} is spoilt")
        return super().open(name, max_pixels, min_side)


def part(images: int, seed: int, bad: tuple[int, ...] = ()) -> ImageDataset:
    """Noisy images, brighter by class."""
    labels = np.arange(images) % 3
    noise = np.random.default_rng(seed).integers(0, 120, (images, 8, 8, 3))
    pixels = (noise + 60 * labels[:, None, None, None]).astype(np.uint8)
    names = tuple(f"{i:03d}" for i in range(images))
    return ImageDataset(store=Spoilt(pixels, names, bad), names=names, labels=labels, classes=CLASSES)


def recipe(**changes: Any) -> Recipe:
    """Six steps of 12, two for each of three epochs; ``changes`` go to the section that has such a field."""
    sections: dict[str, Any] = {
        "model": ModelRecipe(
            image_size=8, patch_size=4, num_blocks=2, hidden_dim=7, tokens_mlp_dim=5, channels_mlp_dim=11
        ),
        "data": DataRecipe(
            data="unused", crop_ratio=1.0, train_crop="none", flip=True, workers=0, max_unreadable_fraction=1.0
        ),
        "optimization": OptimizationRecipe(epochs=3, global_batch_size=12, learning_rate=0.01, warmup_steps=1),
        "run": RunRecipe(device="cpu", precision="float32", compile="off", log_every_steps=1),
    }
    for name, value in changes.items():
        (section,) = [key for key, held in sections.items() if name in {f.name for f in dataclasses.fields(held)}]
        sections[section] = dataclasses.replace(sections[section], **{name: value})
    return Recipe(**sections)


class Silent:
    def update(self, done: int, total: int, text: str) -> None:
        pass


def trained(
    context: DistributedContext, shared: bool, out: Path, changes: dict[str, Any], bad: tuple[int, ...], kind: str
) -> dict[str, Any]:
    """What a run leaves, as arrays and numbers. ``kind``: float64, float32, or float16 with gradients scaled."""
    settings = recipe(**changes)
    check_world_size(settings, context.world_size)
    source = DatasetSplits(splits={"train": part(24, 0, bad), "val": part(7, 1)}, classes=CLASSES, description="made")
    begin = prepare(settings)
    model = begin.build_meta(CLASSES).to(DTYPES.get(kind, torch.float32))
    if shared:
        shard(model, context, CPU)
    begin.fill(model.to_empty(device="cpu"))
    precision = torch.float16 if kind == "float16" else torch.float32
    seen: list[Classification] = []

    def examine(model: Mixer, name: str) -> Classification:
        seen.append(
            classify(
                model, source.splits[name], device=CPU, precision=precision, batch_size=3, workers=0, context=context
            )
        )
        return seen[-1]

    if context.is_rank0:
        (out / "checkpoints").mkdir(parents=True)
    context.sum([0])
    control = Control(context, SignalState(), CheckpointManager(out / "checkpoints", context, 2), 600.0, "")
    done = fit(settings, out, source, model, CPU, precision, examine, Silent(), control)
    return {
        "weights": {name: p.detach().numpy().copy() for name, p in done.model.named_parameters()},
        "trained": {name: p.detach().numpy().copy() for name, p in full_model(model).named_parameters()},
        "losses": [record["loss"] for record in done.metrics if "loss" in record],
        "norms": [[record["gradient_norm"], record["update_norm"]] for record in done.metrics if "loss" in record],
        "val": [(record["step"], record["val_top1"]) for record in done.metrics if "val_top1" in record],
        "val_loss": [record["val_loss"] for record in done.metrics if "val_loss" in record],
        "kept": (done.steps, done.kept_step),
        "unreadable": done.unreadable,
        "best": [result.best.tolist() for result in seen],
    }


def gap(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype for name in a)
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def compare(found: dict[str, Any], expected: dict[str, Any], limit: float = 1e-10) -> None:
    assert gap(found["weights"], expected["weights"]) < limit
    assert gap(found["trained"], expected["trained"]) < limit
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
    "micro-batches as large as a share": {"micro_batch_size": 6, **MASKED, **MIXED},
    "mixed": {**MASKED, **MIXED, "micro_batch_size": 2, "randaugment": 10.0, "color_jitter": 0.3, **SGD},
    "recomputed": {"recompute": True, "micro_batch_size": 2, **MASKED, **MIXED, **SGD},
    "sigmoid": {"loss": "sigmoid", "head_bias": -2.0, "label_smoothing": 0.1, **MIXED, **SGD},
    "smoothed": {"label_smoothing": 0.2, "decay": "cosine", **SGD},
    "averaged, the best kept": {"ema_decay": 0.5, "keep": "best", "patience": 2, "evaluate_every_steps": 1, **SGD},
}
BAD = (0, 1, 2, 5, 8, 9, 17)  # unevenly among ranks and micro-batches


def settings_of(name: str) -> dict[str, Any]:
    return CASES[name] | ({"clip_norm": 1.0, "beta2": 0.5} if "optimizer" not in CASES[name] else {})


def every(context: DistributedContext, shared: bool, out: Path) -> dict[str, Any]:
    """What each case leaves, or how it failed."""
    left: dict[str, Any] = {}
    for name in CASES:
        try:
            left[name] = trained(context, shared, out / name, settings_of(name), (), "float64")
        except (NotImplementedError, ValueError, UserError):
            left[name] = traceback.format_exc()
    return left


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """Every case on one process, on replicas, on shares; each way is made once, when it is asked for."""

    @functools.cache
    def made(way: str) -> list[dict[str, Any]]:
        out = tmp_path_factory.mktemp("runs")
        return (
            [every(SINGLE_PROCESS, False, out)]
            if way == "alone"
            else values(every, 2, way == "shares", out, limit=120.0)
        )

    return made


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", ["replicas", "shares"])
def test_two_ranks_train_as_one_process_does(name: str, way: str, runs: Callable[[str], list[dict[str, Any]]]) -> None:
    (expected,) = (left[name] for left in runs("alone"))
    assert len(expected["losses"]) == expected["kept"][0]
    first, second = (left[name] for left in runs(way))
    assert not isinstance(first, str), first
    compare(first, expected, 1e-10 if "optimizer" in CASES[name] else 1e-7)  # Adam makes much of a rounding
    assert gap(first["weights"], second["weights"]) == 0
    assert {k: v for k, v in first.items() if isinstance(v, list)} == {
        k: v for k, v in second.items() if isinstance(v, list)
    }


@pytest.mark.parametrize("changes", [SGD, {"micro_batch_size": 2, **MIXED, **SGD}], ids=["plain", "mixed"])
@pytest.mark.parametrize("shared", [False, True], ids=["replicas", "shares"])
def test_the_loss_is_the_mean_over_the_readable_images_of_all_ranks(
    changes: dict[str, Any], shared: bool, tmp_path: Path
) -> None:
    expected = trained(SINGLE_PROCESS, False, tmp_path / "alone", changes, BAD, "float64")
    assert expected["unreadable"] == [f"{i:03d}" for i in BAD]
    for found in values(trained, 2, shared, tmp_path / "two", changes, BAD, "float64"):
        compare(found, expected)


@pytest.mark.parametrize("shared", [False, True], ids=["replicas", "shares"])
def test_a_step_of_unreadable_images_alone_moves_nothing_on_any_rank(shared: bool, tmp_path: Path) -> None:
    changes, bad = {"steps": 2, **SGD}, tuple(range(24))
    expected = trained(SINGLE_PROCESS, False, tmp_path / "alone", changes, bad, "float64")
    for found in values(trained, 2, shared, tmp_path / "two", changes, bad, "float64"):
        compare(found, expected)
        assert found["losses"] == [0.0, 0.0]


def test_three_ranks_with_shares_of_odd_sizes(tmp_path: Path) -> None:
    changes = {**MASKED, **MIXED, **SGD, "micro_batch_size": 2, "ema_decay": 0.9}
    expected = trained(SINGLE_PROCESS, False, tmp_path / "alone", changes, BAD, "float64")
    for found in values(trained, 3, True, tmp_path / "three", changes, BAD, "float64"):
        compare(found, expected)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shared", [False, True], ids=["replicas", "shares"])
def test_a_frozen_body_stays_bit_for_bit_on_all_ranks(shared: bool, recompute: bool, tmp_path: Path) -> None:
    settings = recipe()
    model = prepare(settings)(CLASSES).double()
    path = tmp_path / "weights.safetensors"
    save(model, path)
    sizes = dict.fromkeys(("patch_size", "num_blocks", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim"))
    changes = {**sizes, "weights": str(path), "frozen": True, "recompute": recompute, "ema_decay": 0.5, **MASKED, **SGD}
    expected = trained(SINGLE_PROCESS, False, tmp_path / "alone", changes, (), "float64")
    before = {name: p.detach().numpy() for name, p in model.named_parameters()}
    for found in values(trained, 2, shared, tmp_path / "two", changes, (), "float64"):
        compare(found, expected)
        moved = {name for name, array in found["weights"].items() if not np.array_equal(array, before[name])}
        assert moved == {"head.weight", "head.bias"}


@pytest.mark.parametrize("shared", [False, True], ids=["replicas", "shares"])
def test_float16_is_trained_with_scaled_gradients_on_two_ranks(shared: bool, tmp_path: Path) -> None:
    changes = {"epochs": 20, "evaluate_every_epochs": 10}
    expected = trained(SINGLE_PROCESS, False, tmp_path / "alone", changes, (), "float16")
    first, second = values(trained, 2, shared, tmp_path / "two", changes, (), "float16")
    assert gap(first["weights"], second["weights"]) == 0
    assert np.allclose(first["losses"][:5], expected["losses"][:5], rtol=0.02)
    assert first["losses"][-1] < 0.7 * first["losses"][0]
    assert first["val"][-1][1] > 0.5


# Evaluation


def evaluated(context: DistributedContext, images: int, bad: tuple[int, ...], batch_size: int) -> Any:
    """Everything of a classification, to the last bit."""
    model = prepare(recipe())(CLASSES)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    told: list[tuple[int, int]] = []
    try:
        found = classify(
            model,
            part(images, 2, bad),
            device=CPU,
            precision=torch.float32,
            batch_size=batch_size,
            workers=0,
            on_progress=lambda *words: told.append(words),
            context=context,
        )
    except UserError as error:
        return str(error)
    assert told[-1] == (images, images)
    assert all(done <= total for done, total in told)
    arrays = (found.indices, found.labels, found.best, found.probabilities)
    return [(a.dtype.str, a.shape, a.tobytes()) for a in arrays], found.loss.hex(), found.unreadable


@pytest.mark.parametrize("world_size", [2, 3])
def test_an_evaluation_is_the_same_to_the_last_bit_on_any_number_of_ranks(world_size: int) -> None:
    asked = []
    for images, batch_size in itertools.product([1, 2, 5, 16, 17], [1, 4, 256]):
        spoilt = [(), tuple(range(0, images - 1, 3)), tuple(range(images - 1)), tuple(range(images))]
        asked += [(images, bad, batch_size) for bad in spoilt]
    expected = each_evaluated(SINGLE_PROCESS, asked)
    assert {isinstance(outcome, str) for outcome in expected} == {False, True}
    for found in values(each_evaluated, world_size, asked):
        for words, one, other in zip(asked, found, expected, strict=True):
            assert one == other, words


def each_evaluated(context: DistributedContext, asked: list[tuple[int, tuple[int, ...], int]]) -> list[Any]:
    return [evaluated(context, *words) for words in asked]
