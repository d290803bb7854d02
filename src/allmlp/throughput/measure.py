"""Measures models side by side: throughput swept over batch sizes, latency, training, memory."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from allmlp.errors import UserError
from allmlp.factory import Model
from allmlp.flops import cost
from allmlp.throughput.memory import available_memory
from allmlp.throughput.rounds import Clock, Stopwatch, Timing, run_rounds, run_sweeps
from allmlp.throughput.subject import MakeTrainingStep, ModelSubject, OutOfMemory

LEAST_SECONDS = 1.0  # of the budget, for each model
TRAIN_BATCHES = (2, 4, 8, 16, 32, 64, 128, 256, 512)  # batch normalization needs two images
TRAINING_STATE = 4  # weights, gradients and two moments of AdamW
PERCENTILES = {"p50": 50, "p90": 90, "p99": 99}
LATENCIES = 200  # at most, of each model
TOGETHER = 0.5  # share of the memory that the weights of models that alternate may take


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured of one model. Rates are medians over rounds, None where nothing could be measured."""

    name: str
    image_size: tuple[int, int]
    parameters: int
    macs: int  # multiply-accumulates of one image's forward pass
    batch_size: int | None = None  # with which the most images per second were computed
    images_per_second: float | None = None
    images_per_second_range: tuple[float, float] | None = None  # minimum and maximum over rounds
    rates: tuple[float, ...] = ()  # images per second of each round
    ratio: float | None = None  # to the first model: median over rounds, or of medians if they did not alternate
    sweep: dict[int, float | None] = field(default_factory=dict)  # batch size → images per second; None: out of memory
    latency_ms: dict[str, float] | None = None  # "p50", "p90" and "p99" at batch size 1
    train_batch_size: int | None = None
    train_images_per_second: float | None = None
    train_images_per_second_range: tuple[float, float] | None = None
    peak_memory_bytes: int | None = None  # weights and a forward pass at the best batch size
    alternated: bool = True  # with the other models; else measured by itself, since not all fit into memory
    problem: str | None = None  # why something is missing, in one line

    def to_json_object(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def measure(
    models: Mapping[str, Callable[[], Model]],
    *,
    device: torch.device,
    precision: torch.dtype,
    budget_seconds: float,
    configs: Mapping[str, Callable[[], Model]] | None = None,
    batch_sizes: Sequence[int] | None = None,
    latency: bool = True,
    make_training_step: MakeTrainingStep | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
    clock: Clock = time.perf_counter,
) -> list[Measurement]:
    """Measures models in alternating rounds, within a budget of time.

    Models whose weights fit into memory together alternate in every round; the others follow one by one.

    Args:
        models: name → creates or loads the model, on the CPU.
        device, precision: those of the computation.
        budget_seconds: for everything; the loading of models counts.
        configs: name → the model on the meta device, for its cost; None: as ``models``, in that context.
        batch_sizes: those of the sweep; None: 1, 2, 4, … as far as it helps.
        latency: measure the latency of single images.
        make_training_step: prepares training; None: no training.
        on_progress: receives what is being measured.
        clock: the time in seconds.

    Raises:
        UserError: a budget of less than a second for each model, or a batch size below 1.
    """
    if budget_seconds < LEAST_SECONDS * len(models):
        least = f"{LEAST_SECONDS * len(models):g} s"
        raise UserError(
            f"--budget {budget_seconds:g} s for {len(models)} models: give at least {least}, or fewer models"
        )
    if bad := [size for size in batch_sizes or () if size < 1]:
        raise UserError(f"--batch-sizes {bad[0]}: must be at least 1")
    bench = Bench(device, precision, batch_sizes, latency, make_training_step, on_progress)
    watch = Stopwatch(budget_seconds, clock)
    on_progress("counting operations")
    rows = {}
    for name in models:
        with torch.device("meta"):
            rows[name] = describe(name, (configs or models)[name]())
    groups = grouped({name: row.parameters for name, row in rows.items()}, available_memory(device))
    left = len(models)
    for group in groups:
        subjects = [ModelSubject(name, models[name], device, precision, make_training_step) for name in group]
        share = watch.part(len(group) / left)
        left -= len(group)
        for measured in bench.run(subjects, [rows[name] for name in group], share, len(group) > 1 or len(models) == 1):
            rows[measured.name] = measured
    return with_ratios(list(rows.values()))


def describe(name: str, model: Model) -> Measurement:
    counted = cost(model)
    return Measurement(name=name, image_size=model.image_size, parameters=counted.parameters, macs=counted.macs)


def grouped(parameters: Mapping[str, int], room: int | None) -> list[list[str]]:
    """Models that are in memory together, the small ones first; the order within a group is that given."""
    if room is None:
        return [list(parameters)]
    together: list[str] = []
    used = 0
    for name in sorted(parameters, key=lambda name: parameters[name]):
        if used + 4 * parameters[name] <= TOGETHER * room:
            used += 4 * parameters[name]
            together.append(name)
    alone = [[name] for name in parameters if name not in together]
    return [[name for name in parameters if name in together], *alone] if together else alone


class Bench:
    """Measures a group of models that fit into memory together.

    Args:
        device, precision, batch_sizes, latency, make_training_step, on_progress: as for ``measure``.
    """

    def __init__(
        self,
        device: torch.device,
        precision: torch.dtype,
        batch_sizes: Sequence[int] | None,
        latency: bool,
        make_training_step: MakeTrainingStep | None,
        on_progress: Callable[[str], None],
    ) -> None:
        self.device, self.precision, self.batch_sizes = device, precision, batch_sizes
        self.latency, self.trains, self.on_progress = latency, make_training_step is not None, on_progress

    def run(
        self, subjects: Sequence[ModelSubject], rows: Sequence[Measurement], watch: Stopwatch, alternated: bool
    ) -> list[Measurement]:
        found: dict[str, dict[str, Any]] = {subject.name: {"alternated": alternated} for subject in subjects}
        ready = [subject for subject in subjects if self.load(subject, found[subject.name])]
        try:
            self.throughput(ready, found, watch.part(0.55 if self.trains else 0.8))
            if self.latency:
                self.latencies(ready, found, watch.part(0.2 if self.trains else 0.9))
            for subject in ready:
                if (size := found[subject.name].get("batch_size")) is not None and watch.left > 0:
                    found[subject.name]["peak_memory_bytes"] = peak_of(subject, size)
            if self.trains:
                self.training(ready, {row.name: row for row in rows}, found, watch)
        finally:
            for subject in subjects:
                subject.unload()
        return [replaced(row, found[row.name]) for row in rows]

    def load(self, subject: ModelSubject, found: dict[str, Any]) -> bool:
        """Loads the model; False: it does not fit into memory."""
        self.on_progress(f"loading {subject.name}")
        try:
            subject.load()
        except OutOfMemory:
            found["problem"] = "the weights do not fit into memory"
            return False
        return True

    def throughput(self, subjects: list[ModelSubject], found: dict[str, dict[str, Any]], watch: Stopwatch) -> None:
        self.on_progress("throughput")
        timings = [Timing() for _ in subjects]
        calls = [partial(noting_memory, subject) for subject in subjects]
        run_sweeps(calls, timings, watch.part(0.6), self.batch_sizes)
        best = [timing.best for timing in timings]
        rounds: list[list[float]] = [[] for _ in subjects]
        repeated = [
            None if size is None else partial(subject.forward, size)
            for subject, size in zip(subjects, best, strict=True)
        ]
        if any(timing.seconds for timing in timings):
            run_rounds(repeated, rounds, watch)
        for subject, timing, size, seconds in zip(subjects, timings, best, rounds, strict=True):
            row = found[subject.name]
            row["sweep"] = timing.sweep
            if size is None:
                row["problem"] = "not even one image fits into memory"
                continue
            rates = [size / value for value in seconds] or timing.rates(size)
            row |= {"batch_size": size, "rates": tuple(rates)}

    def latencies(self, subjects: list[ModelSubject], found: dict[str, dict[str, Any]], watch: Stopwatch) -> None:
        self.on_progress("latency")
        able = [subject for subject in subjects if found[subject.name].get("batch_size") is not None]
        calls = [partial(subject.forward, 1) for subject in able]
        results: list[list[float]] = [[] for _ in able]
        run_rounds(calls, [[] for _ in able], watch, rounds=1, slice_seconds=0.0)  # warm up
        run_rounds(calls, results, watch, rounds=LATENCIES, slice_seconds=0.0)
        for subject, seconds in zip(able, results, strict=True):
            values = {name: float(np.percentile(seconds, q)) * 1000 for name, q in PERCENTILES.items()}
            found[subject.name]["latency_ms"] = values if seconds else None

    def training(
        self,
        subjects: list[ModelSubject],
        rows: Mapping[str, Measurement],
        found: dict[str, dict[str, Any]],
        watch: Stopwatch,
    ) -> None:
        """In groups whose optimizers fit into memory together."""
        room = available_memory(self.device)
        state = {subject.name: TRAINING_STATE * rows[subject.name].parameters for subject in subjects}
        named, left = {subject.name: subject for subject in subjects}, len(subjects)
        for group in grouped(state, room):
            self.on_progress(f"training {', '.join(group)}")
            share = watch.part(len(group) / left)
            left -= len(group)
            if room is not None and len(group) == 1 and 4 * state[group[0]] > room:
                timings = [Timing(seconds={1: None})]
            else:
                timings = self.training_of([named[name] for name in group], share)
            for name, timing in zip(group, timings, strict=True):
                if (size := timing.best) is None:
                    problem = "training does not fit into memory" if timing.seconds else "no time was left for training"
                    found[name].setdefault("problem", problem)
                else:
                    found[name] |= {"train_batch_size": size, "train_rates": timing.rates(size)}

    def training_of(self, subjects: list[ModelSubject], watch: Stopwatch) -> list[Timing]:
        timings = [Timing() for _ in subjects]
        run_sweeps([subject.train for subject in subjects], timings, watch.part(0.6), TRAIN_BATCHES)
        best = [timing.best for timing in timings]
        calls = [
            None if size is None else partial(subject.train, size) for subject, size in zip(subjects, best, strict=True)
        ]
        rounds: list[list[float]] = [[] for _ in subjects]
        run_rounds(calls, rounds, watch, rounds=5)
        for subject, timing, size, seconds in zip(subjects, timings, best, rounds, strict=True):
            if size is not None and seconds:
                timing.seconds[size] = seconds
            subject.end_training()
        return timings


def noting_memory(subject: ModelSubject, batch_size: int) -> None:
    """A forward pass; the first of each size notes the memory that it takes, by which larger ones are refused."""
    if batch_size not in subject.sizes_run:
        subject.peak_memory(batch_size)
    else:
        subject.forward(batch_size)


def peak_of(subject: ModelSubject, batch_size: int) -> int | None:
    try:
        return subject.peak_memory(batch_size)
    except OutOfMemory:
        return None


def replaced(row: Measurement, found: dict[str, Any]) -> Measurement:
    """The row with what was found: medians and ranges of the rates of the rounds."""
    values = dict(found)
    train_rates = values.pop("train_rates", None)
    for rates, name in ((values.get("rates"), "images_per_second"), (train_rates, "train_images_per_second")):
        if rates:
            values |= {name: statistics.median(rates), f"{name}_range": (min(rates), max(rates))}
    return replace(row, **values)


def with_ratios(rows: Sequence[Measurement]) -> list[Measurement]:
    """The rows with their ratio to the first."""
    first = rows[0]
    return [replace(row, ratio=ratio_to(first, row)) for row in rows]


def ratio_to(first: Measurement, row: Measurement) -> float | None:
    if first.images_per_second is None or row.images_per_second is None:
        return None
    paired = zip(row.rates, first.rates, strict=False)
    if row.alternated and first.alternated and len(row.rates) == len(first.rates):
        return statistics.median(ours / theirs for ours, theirs in paired)
    return row.images_per_second / first.images_per_second
