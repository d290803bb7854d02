"""What is done beside the steps of a run: the log, and on its cadence the evaluation and the checkpoints."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeVar

from mlp_mixer.data.loading import Unreadable
from mlp_mixer.data.parts import Source
from mlp_mixer.model import Mixer
from mlp_mixer.training.loop import Step
from mlp_mixer.training.recipe import Recipe
from mlp_mixer.weights.load import load
from mlp_mixer.weights.own import save

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
        model: what is evaluated and saved: the trained one, or its Polyak average.
        examine: evaluates a model on a part.
        progress: is told how far the run is.
        write: adds a line to metrics.jsonl.
        steps: of the run.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        source: Source,
        model: Mixer,
        examine: Callable[[Mixer, str], R],
        progress: Progress,
        write: Callable[[dict[str, float]], None],
        steps: int,
    ) -> None:
        self.model, self.examine, self.progress, self.write = model, examine, progress, write
        self.folder, self.run, self.steps = out / "checkpoints", recipe.run, steps
        self.batch_size, images = recipe.optimization.global_batch_size, len(source.parts["train"])
        self.epochs_a_step, self.validates = self.batch_size / images, "val" in source.parts
        by_epochs = max(round(recipe.run.evaluate_every_epochs / self.epochs_a_step), 1)
        self.evaluate_every = recipe.run.evaluate_every_steps or by_epochs
        self.unreadable = Unreadable(source.parts["train"], recipe.data.max_unreadable_fraction)
        self.step, self.since_best, self.step_seconds, self.text = 0, 0, 0.0, "starting"
        self.val: R | None = None
        self.best: tuple[int, R] | None = None
        self.clock = Clock()

    def evaluates(self, step: int) -> bool:
        return step % self.evaluate_every == 0 or step == self.steps

    def logs(self, step: int) -> bool:
        """Whether the step's numbers are read, for which a device must be waited for."""
        return step % self.run.log_every_steps == 0 or self.evaluates(step)

    @property
    def impatient(self) -> bool:
        """Whether validation has not become better for so long that the run is to end."""
        return self.run.patience is not None and self.since_best >= self.run.patience

    def see(self, step: Step) -> None:
        """Takes note of a step that is done."""
        self.step, epoch = step.step, step.step * self.epochs_a_step
        for problem in self.unreadable.add(step.problems):
            log.warning("%s (its place stays empty)", problem)
        if self.logs(step.step):
            record = read_step(step, epoch, self.clock.rate(step.step * self.batch_size))
            self.write(record)
            self.text = describe(record, self.steps * self.epochs_a_step)
        self.progress.update(step.step, self.steps, self.text)
        if self.evaluates(step.step):
            self.step_seconds += self.clock.stop()
            if self.validates:
                self.validate(step, epoch)
            save(self.model, self.folder / "last.safetensors", step=step.step, epoch=epoch)
            self.clock = Clock()

    def validate(self, step: Step, epoch: float) -> None:
        self.val = val = self.examine(self.model, "val")
        self.write({"step": step.step, "epoch": epoch, "val_top1": val.top1, "val_loss": val.loss})
        log.info("epoch %.4g: loss %.4f, val top-1 %.4f", epoch, float(step.loss), val.top1)
        self.since_best += 1
        if self.best is None or val.top1 > self.best[1].top1:
            self.best, self.since_best = (step.step, val), 0
            save(self.model, self.folder / "best.safetensors", step=step.step, epoch=epoch, val_top1=val.top1)
        if self.impatient:
            log.info("stopped early: no better validation accuracy in %d evaluations", self.since_best)

    def keep(self, which: Literal["last", "best"]) -> tuple[int, R | None]:
        """The step whose weights the model then has, and what they reached on validation."""
        if which == "last" or self.best is None:
            return self.step, self.val
        self.model.load_state_dict(load(self.folder / "best.safetensors").state_dict())
        return self.best


class Clock:
    """Seconds since it was made, and images per second between two readings."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.images: int | None = None

    def rate(self, images: int) -> float | None:
        """Images per second since the last call; None at the first, which has the start-up in it."""
        now, before = time.perf_counter(), self.images
        rate = None if before is None else (images - before) / (now - self.last)
        self.last, self.images = now, images
        return rate

    def stop(self) -> float:
        return time.perf_counter() - self.start


def read_step(step: Step, epoch: float, images_per_second: float | None) -> dict[str, float]:
    """A line of metrics.jsonl."""
    record = {
        "step": step.step,
        "epoch": epoch,
        "loss": float(step.loss),
        "learning_rate": step.learning_rate,
        "gradient_norm": float(step.gradient_norm),
        "update_norm": float(step.update_norm),
    }
    return record if images_per_second is None else record | {"images_per_second": images_per_second}


def describe(record: dict[str, float], epochs: float) -> str:
    rate = f", {record['images_per_second']:,.0f} images/s" if "images_per_second" in record else ""
    return f"epoch {record['epoch']:.1f} of {epochs:.4g}, loss {record['loss']:.3f}{rate}"
