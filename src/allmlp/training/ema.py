"""Polyak averaging (Supplement A.2): weights that follow the trained ones step by step."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from allmlp.distributed.parallelize import local_shard


class EMA:
    """avg = decay · avg + (1 − decay) · weights, from those of the first step on.

    Args:
        model: whose parameters are followed; sharded ones piece by piece.
        decay: how much of the average stays at each step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.parameters = dict(model.named_parameters())
        self.decay = decay
        self.tensors = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.started = False

    def update(self) -> None:
        """After each step."""
        averages, weights = self.pairs()
        if self.started:
            torch._foreach_lerp_(averages, weights, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]
        else:
            torch._foreach_copy_(averages, weights)  # pyright: ignore[reportPrivateImportUsage]
        self.started = True

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Within the block the model has the averages for weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        for average, weight in zip(*self.pairs(), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        return [local_shard(t) for t in self.tensors.values()], [
            local_shard(p.detach()) for p in self.parameters.values()
        ]
