"""The paper's optimisers: AdamW, its decay times the learning rate and on kernels only; SGD for fine-tuning."""

import torch
from torch import nn


def adamw(model: nn.Module, *, weight_decay: float, beta1: float, beta2: float) -> torch.optim.AdamW:
    """Kernels (stem and head too) decay; biases and LayerNorm scales do not. The rate is set at each step."""
    kernels = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = kernels[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), fused=fused)


def sgd(model: nn.Module, *, momentum: float) -> torch.optim.SGD:
    """SGD with momentum and no weight decay, as the paper fine-tunes (Section 3). The rate is set at each step."""
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=momentum)
