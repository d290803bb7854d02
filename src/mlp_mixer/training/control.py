"""What any process of a run may ask of all (to stop, to save, to give up), and how all do it at the same step."""

import signal
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from mlp_mixer.errors import Stopped
from mlp_mixer.training.recipe import Recipe
from mlp_mixer.training.saver import Saver
from mlp_mixer.training.signals import Signals
from mlp_mixer.training.world import ALONE, World

REQUESTS = 4  # numbers that travel with each step: SIGTERM, SIGINT, a checkpoint is due, one could not be written


class Control:
    """Asks and answers for one process.

    Args:
        world: all ranks.
        signals: what the operating system wants of this one.
        saver: whose failure all must learn of.
        save_seconds: between two checkpoints at the least, by the first rank's clock.
        resume: the words that go on with the run, for the message of its end.
    """

    def __init__(self, world: World, signals: Signals, saver: Saver, save_seconds: float, resume: str) -> None:
        self.world, self.signals, self.saver, self.save_seconds, self.resume = (
            world,
            signals,
            saver,
            save_seconds,
            resume,
        )
        self.saved = time.monotonic()

    @classmethod
    def unattended(cls, recipe: Recipe, out: Path) -> "Control":
        """Of one process that nobody signals."""
        saver = Saver(out / "checkpoints", ALONE, recipe.run.keep_checkpoints, recipe.run.save_in_background)
        return cls(ALONE, Signals(), saver, 60 * recipe.run.save_every_minutes, "")

    def requests(self) -> list[int]:
        """This process's, to be summed over all."""
        due = self.world.first and time.monotonic() - self.saved > self.save_seconds
        received = self.signals.received
        return [int(received == signal.SIGTERM), int(received == signal.SIGINT), int(due), int(self.saver.failed)]

    def saves(self, asked: list[int]) -> bool:
        """Whether all are to save at this step: it is time, or the last chance."""
        return any(asked[:3])

    def save(
        self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], best: tuple[int, float] | None
    ) -> None:
        """Begins a checkpoint, and with it a new wait for the next that is due."""
        self.world.beat(f"saving step {step}")
        self.saver.save(step, tensors, state, None if best is None else best[0])
        self.saved = time.monotonic()

    def heed(self, asked: list[int]) -> None:
        """Ends the run where a rank was asked to, after its checkpoint is written.

        Raises:
            Stopped: on all ranks alike.
            RunError: a checkpoint could not be written.
        """
        terminated, interrupted, _, failed = asked
        if failed or terminated or interrupted:
            self.saver.wait()
        if terminated or interrupted:
            number = signal.SIGTERM if terminated else signal.SIGINT
            raise Stopped(
                f"stopped by {number.name} after step {self.saver.last}: resume with {self.resume}", 128 + number
            )

    def poll(self) -> None:
        """Between two steps, in an evaluation: asks all, and heeds."""
        self.heed(self.world.sum(self.requests()))
