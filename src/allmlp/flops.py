"""What a Mixer costs, counted on the meta device: nothing is computed and no memory is used."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from allmlp.model import Mixer


@dataclass(frozen=True, kw_only=True)
class Cost:
    parameters: int
    macs: int  # multiply-accumulates of one image's forward pass, in matrix products and the stem; 1 MAC = 2 FLOP
    flops: int
    activation_bytes: int  # kept for the backward pass of one image in float32, without parameters


def cost(config: dict) -> Cost:
    """The cost of ``Mixer(**config)`` for one image of its size."""
    with torch.device("meta"):
        model = Mixer(**config)
        image = torch.empty(1, model.config["in_channels"], *model.image_size)
    kept: dict[int, Tensor] = {}
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor  # one storage may be saved through several views
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(image)
    flops = counter.get_total_flops()
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        macs=flops // 2,
        flops=flops,
        activation_bytes=sum(t.untyped_storage().nbytes() for t in kept.values()),
    )
