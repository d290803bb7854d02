"""The paper's optimisers: AdamW, its decay times the learning rate and on kernels only; SGD for fine-tuning."""

import torch
from torch import nn

from allmlp.distributed.parallelize import is_sharded


def adamw(model: nn.Module, *, weight_decay: float, beta1: float, beta2: float) -> torch.optim.AdamW:
    """Kernels (stem and head too) decay; biases and LayerNorm scales do not. The rate is set at each step.

    Its moments are there from the start, so that they can be saved and loaded before any step.
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
    """SGD with momentum and no weight decay, as the paper fine-tunes (Section 3). The rate is set at each step.

    PyTorch's fused kernel knows no shares: of a sharded model the parameters are stepped one operation at a time.
    """
    parameters = trainable(model)
    optimizer = torch.optim.SGD(
        parameters, lr=0.0, momentum=momentum, fused=fusible(parameters[0].device) and not is_sharded(model)
    )
    for p in parameters if momentum else []:  # where the first step is left out, PyTorch would not set them to zero
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """All parameters, or those of the head alone where the rest is frozen."""
    return [p for p in model.parameters() if p.requires_grad]


def fusible(device: torch.device) -> bool:
    return device.type in ("cpu", "cuda")
