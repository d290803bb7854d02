"""The tensors and numbers that make a run what it is at one step: what a checkpoint holds and gives back."""

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from allmlp.checkpointing.checkpoint import read
from allmlp.distributed.context import DistributedContext
from allmlp.model import Mixer
from allmlp.training.ema import EMA
from allmlp.training.optimizer_step import OptimizerStep


class Checkpoint(NamedTuple):
    """One that has been verified."""

    folder: Path
    state: dict[str, Any]


class TrainingState:
    """A model in training, its optimiser, and the Polyak average of its weights, if there is one."""

    def __init__(self, model: Mixer, update: OptimizerStep, average: EMA | None) -> None:
        self.model, self.update, self.average = model, update, average

    def tensors(self) -> dict[str, Tensor]:
        """By name, all that changes from step to step; not copies."""
        named = {}
        for name, p in self.model.named_parameters():
            named[f"model.{name}"] = p.detach()
            kept = self.update.optimizer.state.get(p, {})
            named |= {f"optimizer.{name}.{key}": value for key, value in kept.items() if isinstance(value, Tensor)}
        if self.average is not None:
            named |= {f"average.{name}": tensor for name, tensor in self.average.tensors.items()}
        return named

    def numbers(self) -> dict[str, Any]:
        """What is not tensors, as JSON values."""
        return {"scaler": self.update.scaler.state_dict(), "overflows": float(self.update.overflows)}

    def load(self, start: Checkpoint, context: DistributedContext) -> int:
        """Takes all of it from a checkpoint of any number of ranks, and returns how many steps it has made."""
        read(start.folder, self.tensors(), context)
        if start.state["scaler"]:
            self.update.scaler.load_state_dict(start.state["scaler"])
        self.update.overflows.fill_(start.state["overflows"])
        if self.average is not None:
            self.average.started = True
        return start.state["step"]

    def follow(self) -> None:
        """After each step: the average."""
        if self.average is not None:
            self.average.update()

    def shown(self) -> AbstractContextManager[None]:
        """Within it the model has the weights that are evaluated and exported: its own, or their average."""
        return contextlib.nullcontext() if self.average is None else self.average.shown()

    def settle(self) -> None:
        """At the end: the model has those for good."""
        if self.average is not None:
            self.average.swap()
