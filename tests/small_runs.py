"""Training runs of a few steps on made-up images, for the tests of several folders."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from allmlp.config.recipe import DataRecipe, ModelRecipe, OptimizationRecipe, Recipe, RunRecipe
from allmlp.data.dataset import DatasetSplits, ImageDataset
from allmlp.data.loader import Batch
from allmlp.data.mixup import Mixing
from allmlp.data.stores import ArrayStore
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.evaluation.classification import SplitEvaluator, classify
from allmlp.metadata import Preprocessing
from allmlp.model import Mixer
from allmlp.runs.result import RunResult
from allmlp.runs.resume import Checkpoint
from allmlp.training import build as build_module
from allmlp.training import run as run_module
from allmlp.training.build import build, build_initializer, build_preemption
from allmlp.training.optimizer_step import OptimizerStep
from allmlp.training.preemption import Preemption, SignalState
from allmlp.training.run import RunOptions
from allmlp.training.step import Forward, InputPreparation, LossFunction, StepResult, TrainingStep
from allmlp.training.trainer import Progress

CLASSES = ("a", "b", "c")
CPU = torch.device("cpu")
SIZES = ("patch_size", "num_blocks", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim")
FROM_WEIGHTS: dict[str, Any] = dict.fromkeys(SIZES) | {"weights": "weights.safetensors"}  # changes of a recipe
NOISY = {"dropout": 0.2, "stochastic_depth": 0.4, "mixup": 0.5, "cutmix": 1.0, "mix_group_size": 3}


def dataset(images: int, seed: int) -> ImageDataset:
    """Noisy images, brighter by class."""
    labels = np.arange(images) % 3
    noise = np.random.default_rng(seed).integers(0, 120, (images, 8, 8, 3))
    pixels = (noise + 60 * labels[:, None, None, None]).astype(np.uint8)
    names = tuple(f"{i:03d}" for i in range(images))
    return ImageDataset(store=ArrayStore(pixels, names), names=names, labels=labels, classes=CLASSES)


def splits(**images: int) -> DatasetSplits:
    counts = images or {"train": 24, "val": 6}
    return DatasetSplits(
        splits={name: dataset(n, i) for i, (name, n) in enumerate(counts.items())},
        classes=CLASSES,
        description="made",
    )


def recipe(**changes: Any) -> Recipe:
    """A run of six steps, two for each of three epochs; ``changes`` go to the section that has such a field."""
    sections: dict[str, Any] = {
        "model": ModelRecipe(
            image_size=8, patch_size=4, num_blocks=2, hidden_dim=8, tokens_mlp_dim=6, channels_mlp_dim=16
        ),
        "data": DataRecipe(data="unused", crop_ratio=1.0, train_crop="none", flip=True, workers=0),
        "optimization": OptimizationRecipe(epochs=3, global_batch_size=12, learning_rate=0.01, warmup_steps=1),
        "run": RunRecipe(device="cpu", precision="float32", compile="off", log_every_steps=1),
    }
    by_section: dict[str, dict[str, Any]] = {name: {} for name in sections}
    for name, value in changes.items():
        (section,) = [key for key, held in sections.items() if name in {f.name for f in dataclasses.fields(held)}]
        by_section[section][name] = value
    return Recipe(**{name: dataclasses.replace(sections[name], **given) for name, given in by_section.items()})


def state(model: Mixer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Silent:
    def update(self, done: int, total: int, text: str) -> None:
        pass


EVEN = SimpleNamespace(name="a", top1=0.5, verdict=None)  # the majority of two classes with as many images


class FunctionEvaluator:
    """An evaluator of the validation split from a function of model and split."""

    def __init__(self, name: str, examine: Callable[[Mixer, str], Any]) -> None:
        self.name, self.examine, self.result = name, examine, None

    def __call__(self, model: Mixer) -> dict[str, float]:
        self.result = self.examine(model, self.name)
        return {f"{self.name}_top1": self.result.top1, f"{self.name}_loss": self.result.loss}


def evaluator_of(evaluate: Callable[..., Any]) -> Callable[..., FunctionEvaluator]:
    """What ``train`` makes evaluators with, from a function with the signature of ``classify``."""

    def make(name: str, dataset: Any, *, on_batch: Callable[[int, int], None], **options: Any) -> FunctionEvaluator:
        return FunctionEvaluator(name, lambda model, split: evaluate(model, dataset, on_progress=on_batch, **options))

    return make


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """How a training went, and the model it ends with."""

    model: Mixer
    steps: int
    kept_step: int
    warmup_steps: int
    compiled: bool
    metrics: list[dict[str, float]]
    unreadable: list[str]
    val: Any


def preemption_of(
    settings: Recipe,
    out: Path,
    context: DistributedContext = SINGLE_PROCESS,
    signals: SignalState | None = None,
    resume: str = "",
) -> Preemption:
    return build_preemption(settings, out, signals or SignalState(), resume, context)


def fit(
    settings: Recipe,
    out: Path,
    data: DatasetSplits,
    model: Mixer,
    device: torch.device,
    precision: torch.dtype,
    examine: Callable[[Mixer, str], Any],
    progress: Progress,
    preemption: Preemption | None = None,
    start: Checkpoint | None = None,
) -> Fitted:
    """Trains a model as ``training.run.train`` does once the model is made."""
    evaluators = [FunctionEvaluator("val", examine)] if "val" in data.splits else []
    preemption = preemption or preemption_of(settings, out)
    built = build(settings, data, model, device, precision, evaluators, preemption, progress)
    trainer = built.trainer
    if start is not None:
        trainer.load(start)
    trainer.fit()
    kept, kept_step = trainer.kept_model(settings.run.keep)
    return Fitted(
        model=kept,
        steps=trainer.steps_done,
        kept_step=kept_step,
        warmup_steps=built.warmup_steps,
        compiled=built.compiled,
        metrics=trainer.records.metrics,
        unreadable=trainer.batches.unreadable.names,
        val=evaluators[0].result if evaluators else None,
    )


class Watched:
    """A training, with the weights after each step and those that were shown to each evaluation."""

    def __init__(
        self, out: Path, settings: Recipe, top1: list[float] | None = None, data: DatasetSplits | None = None
    ) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.shown: list[dict[str, Tensor]] = []
        self.splits: list[str] = []
        self.messages: list[tuple[int, int]] = []
        self.scores = top1
        (out / "checkpoints").mkdir(parents=True)
        self.out, self.settings, self.data = out, settings, data or splits()
        self.model = build_initializer(settings)(CLASSES)
        self.start = state(self.model)

    def update(self, done: int, total: int, text: str) -> None:
        self.steps.append(state(self.model))
        self.messages.append((done, total))

    def examine(self, model: Mixer, name: str) -> Any:
        self.shown.append(state(model))
        self.splits.append(name)
        if self.scores is None:
            return classify(model, self.data.splits[name], device=CPU, precision=torch.float32)
        return SimpleNamespace(
            top1=self.scores[min(len(self.shown), len(self.scores)) - 1], loss=1.0, majority=EVEN, unreadable={}
        )

    def fit(self) -> Fitted:
        precision = {"float16": torch.float16}.get(self.settings.run.precision, torch.float32)
        return fit(self.settings, self.out, self.data, self.model, CPU, precision, self.examine, self)


def train_steps(
    model: Mixer,
    forward: Forward,
    batches: Iterable[Batch],
    optimizer_step: OptimizerStep,
    schedule: Callable[[int], float],
    loss: LossFunction,
    *,
    precision: torch.dtype = torch.float32,
    preprocessing: Preprocessing = Preprocessing(),  # noqa: B008
    seed: int = 0,
    mixing: Mixing | None = None,
    accumulate: int = 1,
    measure: Callable[[int], bool] = lambda step: False,
    context: DistributedContext = SINGLE_PROCESS,
    requests: Callable[[], Sequence[int]] = tuple,
) -> Iterator[StepResult]:
    """The steps that a list of micro-batches makes, one by one, on the CPU."""
    inputs = InputPreparation(CPU, preprocessing, seed, mixing)
    step = TrainingStep(forward, inputs, loss, optimizer_step, schedule, precision, accumulate, context)
    micro_batches = list(batches)
    for number in range(1, len(micro_batches) // accumulate + 1):
        model.train()
        group = micro_batches[(number - 1) * accumulate : number * accumulate]
        yield step(number, group, requests, measure=measure(number))


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


def replace_data(monkeypatch: pytest.MonkeyPatch) -> dict[str, DatasetSplits]:
    """Gives all runs made-up images, which the test may replace under "data", and makes them faster."""
    current = {"data": splits(train=24, val=6, test=6)}
    monkeypatch.setattr(build_module, "load_source", lambda *words, **options: current["data"])
    for module in (run_module, build_module):
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
    """``training.run.train`` without progress, resuming the run in the folder by default."""
    return run_module.train(settings, out, make_evaluator, progress or Silent(), RunOptions(resume=resume, **options))


def stopped_run(out: Path, **changes: Any) -> Path:
    """Makes a run that was stopped after step 3."""
    with pytest.raises(Interrupted):
        train(recipe(save_every_steps=1, **changes), out, progress=InterruptAt(4))
    return out
