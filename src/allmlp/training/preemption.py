"""What any process of a run may ask of all (to stop, to save, to give up), and how all do it at the same step."""

import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from allmlp.checkpointing.manager import CheckpointManager
from allmlp.config.recipe import Recipe
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.errors import Stopped
from allmlp.training.signals import SignalState


class Requests(NamedTuple):
    """What travels with each step: of one process, or summed over all."""

    terminate: int  # SIGTERM came
    interrupt: int  # SIGINT came
    save: int  # a checkpoint is due
    failed: int  # one could not be written


class Control:
    """Asks and answers for one process.

    Args:
        world: all ranks.
        signals: what the operating system wants of this one.
        saver: whose failure all must learn of.
        save_seconds: between two checkpoints at the least, by the first rank's clock.
        resume: the words that go on with the run, for the message of its end.
    """

    def __init__(
        self,
        context: DistributedContext,
        signals: SignalState,
        checkpoints: CheckpointManager,
        save_seconds: float,
        resume: str,
    ) -> None:
        self.context, self.signals, self.checkpoints = context, signals, checkpoints
        self.save_seconds, self.resume = save_seconds, resume
        self.saved = time.monotonic()

    @classmethod
    def unattended(cls, recipe: Recipe, out: Path) -> "Control":
        """Of one process that nobody signals."""
        checkpoints = CheckpointManager(
            out / "checkpoints", SINGLE_PROCESS, recipe.run.keep_checkpoints, recipe.run.save_in_background
        )
        return cls(SINGLE_PROCESS, SignalState(), checkpoints, 60 * recipe.run.save_every_minutes, "")

    def requests(self) -> Requests:
        """This process's, to be summed over all."""
        return Requests(
            terminate=int(self.signals.received == signal.SIGTERM),
            interrupt=int(self.signals.received == signal.SIGINT),
            save=int(self.context.is_rank0 and time.monotonic() - self.saved > self.save_seconds),
            failed=int(self.checkpoints.failed),
        )

    def saves(self, asked: list[int]) -> bool:
        """Whether all are to save at this step: it is time, or the last chance."""
        all_want = Requests(*asked)
        return bool(all_want.save or all_want.terminate or all_want.interrupt)

    def save(
        self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], best: tuple[int, float] | None
    ) -> None:
        """Begins a checkpoint, and with it a new wait for the next that is due."""
        self.context.heartbeat(f"saving step {step}")
        self.checkpoints.save(step, tensors, state, None if best is None else best[0])
        self.saved = time.monotonic()

    def heed(self, asked: list[int]) -> None:
        """Ends the run where a rank was asked to, after its checkpoint is written.

        Raises:
            Stopped: on all ranks alike.
            RunError: a checkpoint could not be written.
        """
        all_want = Requests(*asked)
        stop = all_want.terminate or all_want.interrupt
        if all_want.failed or stop:
            self.checkpoints.wait()
        if stop:
            number = signal.SIGTERM if all_want.terminate else signal.SIGINT
            raise Stopped(
                f"stopped by {number.name} after step {self.checkpoints.last}: resume with {self.resume}", 128 + number
            )

    def poll(self) -> None:
        """Between two steps, in an evaluation: asks all, and heeds."""
        self.heed(self.context.sum([*self.requests()]))
