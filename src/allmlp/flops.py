"""A model's parameters, FLOPs and activation memory.

For a model on the meta device (``factory.build_meta``), counting computes nothing and uses no memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


class ImageModel(Protocol):
    """What counting the cost of a model requires of it."""

    in_channels: int
    image_size: tuple[int, int]

    def __call__(self, images: Tensor, /) -> Tensor: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def modules(self) -> Iterator[nn.Module]: ...


@dataclass(frozen=True, kw_only=True)
class Cost:
    parameters: int
    macs: int  # multiply-accumulates of one image's forward pass, in matrix products and the stem; 1 MAC = 2 FLOP
    flops: int
    activation_bytes: int  # kept for the backward pass of one image, in the model's precision, without parameters


def cost(model: ImageModel) -> Cost:
    """Counts the cost of one image of the model's size. Batch normalization, which trains on several, evaluates it."""
    parameters = list(model.parameters())
    image = torch.empty(1, model.in_channels, *model.image_size, device=parameters[0].device)
    parameter_storages = {parameter.untyped_storage()._cdata for parameter in parameters}
    saved: dict[int, Tensor] = {}

    def record(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in parameter_storages:
            saved[tensor.untyped_storage()._cdata] = tensor  # one storage may be saved through several views
        return tensor

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d) and module.training]
    for norm in norms:
        norm.eval()
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(record, lambda t: t):
        model(image)
    for norm in norms:
        norm.train()
    flops = counter.get_total_flops()
    return Cost(
        parameters=sum(parameter.numel() for parameter in parameters),
        macs=flops // 2,
        flops=flops,
        activation_bytes=sum(tensor.untyped_storage().nbytes() for tensor in saved.values()),
    )
