"""Exponential moving average of the weights (Polyak averaging, Supplement A.2)."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from allmlp.distributed.parallelize import local_shard


class EMA:
    """average = decay · average + (1 − decay) · weights after each step, starting from the weights of the first step.

    Args:
        model: its parameters are averaged, and the statistics of batch normalization; if sharded, each shard by its
            process.
        decay: share of the average that is kept at each step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.weights = dict(model.named_parameters()) | dict(model.named_buffers())
        self.decay = decay
        self.tensors = {name: p.detach().clone() for name, p in self.weights.items()}
        self.started = False

    def update(self) -> None:
        """Called after each step."""
        averages, weights = self.local_pairs()
        if self.started:
            torch._foreach_lerp_(averages, weights, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]
        else:
            torch._foreach_copy_(averages, weights)  # pyright: ignore[reportPrivateImportUsage]
        self.started = True

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block, the model has the averages as its weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """Exchanges the averages and the model's weights."""
        for average, weight in zip(*self.local_pairs(), strict=True):
            saved = weight.clone()
            weight.copy_(average)
            average.copy_(saved)

    def local_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """This process's shards of the averages and of the weights."""
        averages = [local_shard(t) for t in self.tensors.values()]
        return averages, [local_shard(p.detach()) for p in self.weights.values()]
