"""The paper's optimizers: AdamW with weight decay on kernels only, times the learning rate; SGD for fine-tuning."""

import torch
from torch import nn

from allmlp.distributed.parallelize import is_sharded


def adamw(model: nn.Module, *, weight_decay: float, beta1: float, beta2: float) -> torch.optim.AdamW:
    """AdamW that decays kernels (stem and head too), not biases and LayerNorm scales. Each step sets the learning rate.

    Its moments exist from the start, so that they can be saved and loaded before any step.
    """
    kernels = [p for p in trainable(model) if p.ndim > 1]
    others = [p for p in trainable(model) if p.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), fused=fusible(kernels[0].device))
    for p in trainable(model):
        step = torch.zeros((), device=p.device if fusible(p.device) else None)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def sgd(model: nn.Module, *, momentum: float) -> torch.optim.SGD:
    """SGD with momentum, without weight decay, as the paper fine-tunes (Section 3). Each step sets the learning rate.

    PyTorch's fused kernel does not support sharded parameters: those are updated by separate operations.
    """
    parameters = trainable(model)
    optimizer = torch.optim.SGD(
        parameters, lr=0.0, momentum=momentum, fused=fusible(parameters[0].device) and not is_sharded(model)
    )
    for p in parameters if momentum else []:  # PyTorch would leave them uninitialized if the first step is skipped
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen."""
    return [p for p in model.parameters() if p.requires_grad]


def fusible(device: torch.device) -> bool:
    return device.type in ("cpu", "cuda")
