"""Everything that changes during training, as a checkpoint holds it."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from allmlp.checkpointing.checkpoint import read_tensors
from allmlp.distributed.context import DistributedContext
from allmlp.factory import Model
from allmlp.runs.resume import Checkpoint
from allmlp.training.ema import EMA
from allmlp.training.optimizer_step import OptimizerStep


class TrainingState:
    """A model in training, its optimizer, and the exponential moving average of its weights if there is one.

    Args:
        identity: what a checkpoint says about the run it belongs to (recipe, data, versions), as JSON values.
    """

    def __init__(
        self, model: Model, optimizer_step: OptimizerStep, ema: EMA | None, identity: dict[str, Any] | None = None
    ) -> None:
        self.model, self.optimizer_step, self.ema, self.identity = model, optimizer_step, ema, identity or {}

    def tensors(self) -> dict[str, Tensor]:
        """By name, every tensor that changes from step to step; not copies."""
        named = {}
        for name, p in self.model.named_parameters():
            named[f"model.{name}"] = p.detach()
            moments = self.optimizer_step.optimizer.state.get(p, {})
            named |= {f"optimizer.{name}.{key}": value for key, value in moments.items() if isinstance(value, Tensor)}
        named |= {f"model.{name}": buffer for name, buffer in self.model.named_buffers()}
        if self.ema is not None:
            named |= {f"ema.{name}": tensor for name, tensor in self.ema.tensors.items()}
        return named

    def json_state(self) -> dict[str, Any]:
        """The rest of a checkpoint, as JSON values: the run's identity and the state of the gradient scaler."""
        scaler, overflows = self.optimizer_step.scaler.state_dict(), float(self.optimizer_step.overflows)
        return self.identity | {"scaler": scaler, "overflows": overflows}

    def load(self, checkpoint: Checkpoint, context: DistributedContext) -> None:
        """Restores all of it from a checkpoint that any number of ranks wrote. Collective."""
        read_tensors(checkpoint.folder, self.tensors(), context)
        if checkpoint.state["scaler"]:
            self.optimizer_step.scaler.load_state_dict(checkpoint.state["scaler"])
        self.optimizer_step.overflows.fill_(checkpoint.state["overflows"])
        if self.ema is not None:
            self.ema.started = True

    def update_ema(self) -> None:
        if self.ema is not None:
            self.ema.update()

    def ema_weights(self) -> AbstractContextManager[None]:
        """Within the block, the model has the weights to evaluate and export: averaged, if there is an EMA."""
        return contextlib.nullcontext() if self.ema is None else self.ema.swapped_in()

    def adopt_ema_weights(self) -> None:
        """At the end of training, gives the model the averaged weights for good."""
        if self.ema is not None:
            self.ema.swap()
