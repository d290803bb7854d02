"""The training loop, and what happens between its steps: logging, evaluation, checkpoints, exported weights."""

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from allmlp.data.loader import Batch, UnreadableImages
from allmlp.distributed.context import DistributedContext
from allmlp.distributed.parallelize import full_model
from allmlp.errors import RunError
from allmlp.factory import Model
from allmlp.runs.records import Records
from allmlp.runs.resume import Checkpoint
from allmlp.training.memory import memory_errors, peak_memory
from allmlp.training.preemption import Preemption
from allmlp.training.state import TrainingState
from allmlp.training.step import StepResult, TrainingStep
from allmlp.weights.load import load
from allmlp.weights.native import save

log = logging.getLogger(__name__)


class Diverged(RunError):
    """The loss or gradient of a step was not finite."""


class Progress(Protocol):
    """Shows the progress of a run."""

    def update(self, done: int, total: int, text: str) -> None: ...


class Evaluator(Protocol):
    """Measures a model whenever an evaluation is due.

    The trainer calls its evaluators in order. The first metric of the first one decides which weights are the best.
    """

    @property
    def name(self) -> str: ...
    @property
    def result(self) -> Any:
        """The complete result of the last call; None before the first."""

    def __call__(self, model: Model) -> dict[str, float]:
        """The metrics to log, the main one first."""
        ...


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """The steps, counted from 1, at which a run logs, evaluates and saves."""

    steps: int  # of the run
    evaluate_every: int
    log_every: int
    save_every: int | None = None  # in addition to the steps with an evaluation
    patience: int | None = None  # evaluations without improvement after which the run ends

    def evaluates(self, step: int) -> bool:
        return step > 0 and (step % self.evaluate_every == 0 or step == self.steps)

    def logs(self, step: int) -> bool:
        """Whether the step's numbers are read, which waits for the device."""
        return step % self.log_every == 0 or self.evaluates(step)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is written: also at each evaluation, before it, since it may be interrupted."""
        return self.evaluates(step) or (self.save_every is not None and step % self.save_every == 0)


class Trainer:
    """Trains a model, and logs, evaluates and saves on its cadence.

    Args:
        state: what changes during training.
        step: makes one optimizer step.
        batches: the training images.
        cadence: when to log, evaluate and save.
        evaluators: called at each evaluation.
        records: metrics and consumed samples, written as they come.
        preemption: signals, checkpoints, and the ranks that share them.
        progress: shows the progress of the run.
    """

    def __init__(
        self,
        state: TrainingState,
        step: TrainingStep,
        batches: "TrainingBatches",
        cadence: Cadence,
        evaluators: Sequence[Evaluator],
        records: Records,
        preemption: Preemption,
        progress: Progress,
    ) -> None:
        self.state, self.step, self.batches, self.cadence = state, step, batches, cadence
        self.evaluators, self.records, self.preemption, self.progress = evaluators, records, preemption, progress
        self.context, self.checkpoints = preemption.context, preemption.checkpoints
        self.steps_done, self.evaluations_since_best = 0, 0
        self.best: tuple[int, float] | None = None  # step and the first evaluator's main metric
        self.loss: float | None = None  # the last one logged
        self.progress_text = "starting"
        self.clock = StepClock(batches)

    def fit(self) -> None:
        """Trains until the last step, or until validation has stopped improving.

        Raises:
            Diverged: a step is not finite; the weights of the last good one are in checkpoints/last.safetensors.
            RunError: a batch that does not fit into memory, or a checkpoint that cannot be written.
            Stopped: by a signal; the checkpoint is written.
        """
        with self.records.open(self.steps_done), self.checkpoints, memory_errors(self.batches.micro_batch_size):
            self.clock.start()
            if self.cadence.evaluates(self.steps_done):  # the evaluation after the checkpoint was interrupted
                self.evaluate()
            batches = self.batches.after(self.steps_done)
            while not self.finished:
                step, micro_batches = self.steps_done + 1, itertools.islice(batches, self.step.accumulate)
                self.state.model.train()
                result = self.step(step, micro_batches, self.preemption.requests, measure=self.cadence.logs(step))
                self.complete_step(result)
                if self.cadence.evaluates(step):
                    self.evaluate()
            self.state.adopt_ema_weights()

    @property
    def finished(self) -> bool:
        return self.steps_done == self.cadence.steps or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether validation has not improved for so long that the run ends."""
        return self.cadence.patience is not None and self.evaluations_since_best >= self.cadence.patience

    def complete_step(self, result: StepResult) -> None:
        """Logs the step, saves if the cadence or a rank requires it, and stops if a rank requests it."""
        saves = self.cadence.saves(result.step) or self.preemption.wants_checkpoint(result.requests)
        if self.step.inputs.device.type == "cpu" or self.cadence.logs(result.step) or saves:  # waits for the device
            self.raise_if_diverged()
        self.state.update_ema()
        self.steps_done = result.step
        self.log(result)
        if saves:
            self.records.sync()
            self.preemption.save(result.step, self.state.tensors(), self.state_dict(), self.best)
        self.preemption.raise_if_requested(result.requests)

    def log(self, result: StepResult) -> None:
        for problem in self.batches.unreadable.add(result.problems):
            log.warning("%s (left out of its batch)", problem)
        samples = result.step * self.batches.global_batch_size
        self.records.log_samples(result.step, samples, result.samples_digest)
        if self.cadence.logs(result.step):
            self.loss = float(result.loss)
            record = {
                "step": result.step,
                "epoch": self.epoch,
                "loss": self.loss,
                "learning_rate": result.learning_rate,
                "gradient_norm": float(result.gradient_norm),
                "update_norm": float(result.update_norm),
                **self.clock.rates(samples, self.context.world_size),
                "memory_bytes": peak_memory(self.step.inputs.device),
            }
            self.records.log_metrics(record)
            rate = f", {record['images_per_second']:,.0f} images/s" if "images_per_second" in record else ""
            epochs = self.cadence.steps * self.batches.epochs_per_step
            self.progress_text = f"epoch {self.epoch:.1f} of {epochs:.4g}, loss {self.loss:.3f}{rate}"
        self.progress.update(result.step, self.cadence.steps, self.progress_text)

    def evaluate(self) -> None:
        """Runs the evaluators and exports the weights, both with the averaged weights if there is an average."""
        with self.clock.paused(), self.state.ema_weights():
            model = full_model(self.state.model)
            for evaluator in self.evaluators:
                metrics = evaluator(self.state.model)
                self.records.log_metrics({"step": self.steps_done, "epoch": self.epoch, **metrics})
                name, value = next(iter(metrics.items()))
                label = name.replace("_", " ").replace("top1", "top-1")
                log.info("epoch %.4g: loss %.4f, %s %.4f", self.epoch, self.loss or float("nan"), label, value)
                if evaluator is self.evaluators[0]:
                    self.select(model, name, value)
            self.export(model, "last.safetensors")

    def select(self, model: Model, name: str, value: float) -> None:
        """Exports the model if it is the best so far."""
        self.evaluations_since_best += 1
        if self.best is None or value > self.best[1]:
            self.best, self.evaluations_since_best = (self.steps_done, value), 0
            self.export(model, "best.safetensors", **{name: value})
        if self.stopped_early:
            log.info("stopped early: no improvement in %d evaluations", self.evaluations_since_best)

    def export(self, model: Model, file: str, **provenance: Any) -> None:
        if self.context.is_rank0:
            save(model, self.checkpoints.folder / file, step=self.steps_done, epoch=self.epoch, **provenance)

    def raise_if_diverged(self) -> None:
        """Raises Diverged after saving the weights, which the step that was not finite has not changed."""
        step, loss, norm = self.state.optimizer_step.failure.tolist()
        if step:
            path = self.checkpoints.folder / "last.safetensors"
            with self.state.ema_weights():
                model = full_model(self.state.model)
                self.context.broadcast_from_rank0(lambda: save(model, path, step=int(step) - 1))
            raise Diverged(
                f"step {step:.0f}: loss {loss:g}, gradient norm {norm:g}: training has diverged; lower --learning-rate "
                f"or lengthen --warmup-steps; the weights of step {step - 1:.0f}, the last good one, are in {path}"
            )

    def kept_model(self, which: Literal["last", "best"]) -> tuple[Model, int]:
        """The model that the run keeps and the step of its weights; the first evaluator's result is then for it."""
        if which == "last" or self.best is None or self.best[0] == self.steps_done:
            return full_model(self.state.model), self.steps_done
        self.context.sum([0])  # a barrier: rank 0 has written the file
        best = load(self.checkpoints.folder / "best.safetensors").to(self.step.inputs.device)
        with memory_errors(self.batches.micro_batch_size):
            for evaluator in self.evaluators:
                evaluator(best)
        return best, best.metadata.provenance["step"]

    @property
    def epoch(self) -> float:
        return self.steps_done * self.batches.epochs_per_step

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors, as JSON values."""
        return self.state.json_state() | {
            "step": self.steps_done,
            "steps": self.cadence.steps,
            "samples": self.steps_done * self.batches.global_batch_size,
            "best": self.best,
            "evaluations_since_best": self.evaluations_since_best,
            "loss": self.loss,
            "seconds": self.clock.seconds,
            "unreadable": {str(index): problem for index, problem in self.batches.unreadable.problems.items()},
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Restores everything from a checkpoint. Collective."""
        self.state.load(checkpoint, self.context)
        state = checkpoint.state
        self.steps_done, self.evaluations_since_best = state["step"], state["evaluations_since_best"]
        self.best = None if state["best"] is None else (state["best"][0], state["best"][1])
        self.loss, self.clock.completed_seconds = state["loss"], state["seconds"]
        self.batches.unreadable.problems = {int(index): problem for index, problem in state["unreadable"].items()}


class TrainingBatches:
    """The micro-batches of a run, and the seconds spent waiting for them.

    Args:
        load: returns this process's micro-batches from a number of steps to the end of the run.
        images: number of training images.
        global_batch_size: images of a step, on all ranks.
        micro_batch_size: images of a micro-batch.
        unreadable: counts images that cannot be read.
        context: receives the heartbeats.
    """

    def __init__(
        self,
        load: Callable[[int], Iterable[Batch]],
        images: int,
        global_batch_size: int,
        micro_batch_size: int,
        unreadable: UnreadableImages,
        context: DistributedContext,
    ) -> None:
        self.load, self.unreadable, self.context = load, unreadable, context
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.epochs_per_step = global_batch_size / images
        self.seconds_waited = 0.0

    def after(self, steps: int) -> Iterator[Batch]:
        """The micro-batches after the first ``steps`` steps; loading starts when the first one is requested."""
        batches = iter(self.load(steps))
        while True:
            self.context.heartbeat("waiting for images")
            start = time.perf_counter()
            batch = next(batches, None)
            self.seconds_waited += time.perf_counter() - start
            if batch is None:
                return
            self.context.heartbeat("computing a step")
            yield batch


class StepClock:
    """Measures the time spent in steps, without evaluations, and the share of it spent waiting for images."""

    def __init__(self, batches: TrainingBatches) -> None:
        self.batches = batches
        self.completed_seconds = 0.0  # up to the last evaluation, or up to the checkpoint of a resumed run
        self.start()

    def start(self) -> None:
        self.started_at = time.perf_counter()
        self.last_reading: tuple[float, float, int] | None = None  # time, seconds waited for images, images so far

    @property
    def seconds(self) -> float:
        return self.completed_seconds + time.perf_counter() - self.started_at

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.completed_seconds = self.seconds
        yield
        self.start()

    def rates(self, images: int, world_size: int) -> dict[str, float]:
        """Speed and share of time spent waiting for images since the last reading; nothing at the first one, since
        it would include the start-up."""
        now, before = (time.perf_counter(), self.batches.seconds_waited, images), self.last_reading
        self.last_reading = now
        if before is None:
            return {}
        seconds, waited, done = (b - a for a, b in zip(before, now, strict=True))
        rate = done / seconds
        return {
            "images_per_second": rate,
            "images_per_second_per_device": rate / world_size,
            "data_wait": waited / seconds,
        }
