"""What is done beside the steps of a run: the log, and on its cadence the evaluation and the exported weights."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from allmlp.config.recipe import Recipe
from allmlp.data.dataset import DatasetSplits
from allmlp.data.loader import Batch, UnreadableImages
from allmlp.distributed.context import DistributedContext
from allmlp.distributed.parallelize import full_model
from allmlp.model import Mixer
from allmlp.runs.provenance import peak_memory
from allmlp.runs.records import Records
from allmlp.training.loop import Step
from allmlp.weights.load import load
from allmlp.weights.native import save

log = logging.getLogger(__name__)


class Result(Protocol):
    """What a run needs to know of an evaluation."""

    @property
    def top1(self) -> float: ...
    @property
    def loss(self) -> float: ...
    @property
    def unreadable(self) -> dict[str, str]: ...


class Progress(Protocol):
    """Told how far the run is; the command line draws it."""

    def update(self, done: int, total: int, text: str) -> None: ...


R = TypeVar("R", bound=Result)


class Watch(Generic[R]):
    """Sees every step of a run.

    Args:
        recipe: its cadences, and what to keep.
        out: the run's folder.
        source: the images.
        model: the trained one.
        shown: within it, the model has the weights that are evaluated and exported.
        examine: evaluates a model on a part.
        progress: is told how far the run is.
        records: what is written down.
        steps: of the run.
        world: the processes.
        batches: which know how long was waited for them.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        source: DatasetSplits,
        model: Mixer,
        shown: Callable[[], AbstractContextManager[None]],
        examine: Callable[[Mixer, str], R],
        progress: Progress,
        records: Records,
        steps: int,
        context: DistributedContext,
        batches: "Waiting",
    ) -> None:
        self.model, self.shown, self.examine, self.progress, self.records = model, shown, examine, progress, records
        self.folder, self.run, self.steps = out / "checkpoints", recipe.run, steps
        self.context, self.batches = context, batches
        self.batch_size, images = recipe.optimization.global_batch_size, len(source.splits["train"])
        self.epochs_a_step, self.validates = self.batch_size / images, "val" in source.splits
        by_epochs = max(round(recipe.run.evaluate_every_epochs / self.epochs_a_step), 1)
        self.evaluate_every = recipe.run.evaluate_every_steps or by_epochs
        self.unreadable = UnreadableImages(source.splits["train"], recipe.data.max_unreadable_fraction)
        self.step, self.since_best, self.seconds, self.text = 0, 0, 0.0, "starting"
        self.loss: float | None = None
        self.val: R | None = None
        self.best: tuple[int, float] | None = None  # step and validation accuracy
        self.clock = Clock(batches)

    def state(self) -> dict[str, Any]:
        """What of this a checkpoint holds."""
        return {
            "step": self.step,
            "steps": self.steps,
            "samples": self.step * self.batch_size,
            "best": self.best,
            "since_best": self.since_best,
            "loss": self.loss,
            "seconds": self.step_seconds,
            "unreadable": {str(index): problem for index, problem in self.unreadable.problems.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint's state."""
        self.step, self.since_best, self.loss = state["step"], state["since_best"], state["loss"]
        self.best = None if state["best"] is None else (state["best"][0], state["best"][1])
        self.seconds = state["seconds"]
        self.unreadable.problems = {int(index): problem for index, problem in state["unreadable"].items()}

    @property
    def step_seconds(self) -> float:
        """Spent in steps, without evaluations."""
        return self.seconds + self.clock.seconds

    def evaluates(self, step: int) -> bool:
        return step > 0 and (step % self.evaluate_every == 0 or step == self.steps)

    def logs(self, step: int) -> bool:
        """Whether the step's numbers are read, for which a device must be waited for."""
        return step % self.run.log_every_steps == 0 or self.evaluates(step)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint of the step is to be written; before its evaluation, which may be interrupted."""
        every = self.run.save_every_steps
        return self.evaluates(step) or (every is not None and step % every == 0)

    @property
    def impatient(self) -> bool:
        """Whether validation has not become better for so long that the run is to end."""
        return self.run.patience is not None and self.since_best >= self.run.patience

    def see(self, step: Step) -> None:
        """Takes note of a step that is done."""
        self.step, epoch = step.step, step.step * self.epochs_a_step
        for problem in self.unreadable.add(step.problems):
            log.warning("%s (its place stays empty)", problem)
        self.records.consume(step.step, step.step * self.batch_size, step.consumed)
        if self.logs(step.step):
            record = read_step(step, epoch) | self.clock.read(step.step * self.batch_size, self.context.world_size)
            record["memory_bytes"] = peak_memory(self.model.stem.weight.device)
            self.loss = record["loss"]
            self.records.write(record)
            self.text = describe(record, self.steps * self.epochs_a_step)
        self.progress.update(step.step, self.steps, self.text)

    def evaluate(self) -> None:
        """The evaluation that is due after this step, and the weights as they are then, for use elsewhere."""
        self.seconds += self.clock.seconds
        epoch = self.step * self.epochs_a_step
        with self.shown():
            model = full_model(self.model)
            if self.validates:
                self.validate(model, epoch)
            self.export(model, "last.safetensors", epoch=epoch)
        self.clock = Clock(self.batches)

    def validate(self, model: Mixer, epoch: float) -> None:
        self.val = val = self.examine(self.model, "val")
        self.records.write({"step": self.step, "epoch": epoch, "val_top1": val.top1, "val_loss": val.loss})
        log.info("epoch %.4g: loss %.4f, val top-1 %.4f", epoch, self.loss or float("nan"), val.top1)
        self.since_best += 1
        if self.best is None or val.top1 > self.best[1]:
            self.best, self.since_best = (self.step, val.top1), 0
            self.export(model, "best.safetensors", epoch=epoch, val_top1=val.top1)
        if self.impatient:
            log.info("stopped early: no better validation accuracy in %d evaluations", self.since_best)

    def export(self, model: Mixer, name: str, **provenance: Any) -> None:
        if self.context.is_rank0:
            save(model, self.folder / name, step=self.step, **provenance)

    def keep(self, which: Literal["last", "best"]) -> tuple[Mixer, int, R | None]:
        """The model that is the run's result, the step whose weights it has, and what it reached on validation."""
        if which == "last" or self.best is None or self.best[0] == self.step:
            return full_model(self.model), self.step, self.val
        self.context.sum([0])  # all wait until the first rank has written the file
        best = load(self.folder / "best.safetensors").to(self.model.stem.weight.device)
        return best, best.metadata.provenance["step"], self.examine(best, "val")


class Clock:
    """Time since it was made, and what it was used for between two readings."""

    def __init__(self, batches: "Waiting") -> None:
        self.batches = batches
        self.start = time.perf_counter()
        self.last: tuple[float, float, int] | None = None  # when it was read, seconds waited until then, images

    def read(self, images: int, world_size: int) -> dict[str, float]:
        """Speed and share of time spent waiting for images since the last reading; at the first, which has the start-up
        in it, nothing."""
        now, before = (time.perf_counter(), self.batches.seconds, images), self.last
        self.last = now
        if before is None:
            return {}
        seconds, waited, done = (b - a for a, b in zip(before, now, strict=True))
        rate = done / seconds
        return {
            "images_per_second": rate,
            "images_per_second_per_device": rate / world_size,
            "data_wait": waited / seconds,
        }

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start


class Waiting:
    """Batches, and the seconds that were spent waiting for them."""

    def __init__(self, batches: Iterable[Batch], context: DistributedContext) -> None:
        self.batches, self.context, self.seconds = batches, context, 0.0

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.batches)
        while True:
            self.context.heartbeat("waiting for images")
            start = time.perf_counter()
            batch = next(batches, None)
            self.seconds += time.perf_counter() - start
            if batch is None:
                return
            self.context.heartbeat("computing a step")
            yield batch


def read_step(step: Step, epoch: float) -> dict[str, float]:
    """A line of metrics.jsonl."""
    return {
        "step": step.step,
        "epoch": epoch,
        "loss": float(step.loss),
        "learning_rate": step.learning_rate,
        "gradient_norm": float(step.gradient_norm),
        "update_norm": float(step.update_norm),
    }


def describe(record: dict[str, float], epochs: float) -> str:
    rate = f", {record['images_per_second']:,.0f} images/s" if "images_per_second" in record else ""
    return f"epoch {record['epoch']:.1f} of {epochs:.4g}, loss {record['loss']:.3f}{rate}"
