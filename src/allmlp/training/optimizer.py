"""The paper's optimizers: AdamW with weight decay on kernels only, times the learning rate; SGD for fine-tuning."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd as update_sgd

from allmlp.distributed.parallelize import is_sharded, local_shard


def adamw(model: nn.Module, *, weight_decay: float, beta1: float, beta2: float) -> torch.optim.AdamW:
    """AdamW that decays kernels (stem and head too), not biases and LayerNorm scales. Each step sets the learning rate.

    Its moments exist from the start, so that they can be saved and loaded before any step.
    """
    kernels = [p for name, p in model.named_parameters() if p.requires_grad and is_kernel(name, p)]
    others = [p for name, p in model.named_parameters() if p.requires_grad and not is_kernel(name, p)]
    groups = [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), fused=fusible(kernels[0].device))
    for p in trainable(model):
        step = torch.zeros((), device=p.device if fusible(p.device) else None)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def sgd(model: nn.Module, *, momentum: float) -> torch.optim.SGD:
    """SGD with momentum, without weight decay, as the paper fine-tunes (Section 3).

    Each step sets the learning rate.
    """
    parameters = trainable(model)
    kind = ShardedSGD if is_sharded(model) else torch.optim.SGD
    optimizer = kind(parameters, lr=0.0, momentum=momentum, fused=fusible(parameters[0].device))
    for p in parameters if momentum else []:  # PyTorch would leave them uninitialized if the first step is skipped
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


class ShardedSGD(torch.optim.SGD):
    """SGD on sharded parameters: PyTorch's fused kernel, which does not accept them, on the shards of this process."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            update_sgd(
                [local_shard(p) for p in parameters],
                [local_shard(p.grad) for p in parameters],
                [local_shard(self.state[p]["momentum_buffer"]) for p in parameters] if group["momentum"] else [],
                fused=True,
                grad_scale=getattr(self, "grad_scale", None),  # set by GradScaler, as for PyTorch's fused optimizers
                found_inf=getattr(self, "found_inf", None),
                **{key: group[key] for key in ("lr", "momentum", "weight_decay", "dampening", "nesterov", "maximize")},
            )


def is_kernel(name: str, parameter: Tensor) -> bool:
    """Whether weight decay acts on it: on the weights of dense layers and convolutions, not on embeddings or gains."""
    return parameter.ndim > 1 and name.endswith("weight")


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen."""
    return [p for p in model.parameters() if p.requires_grad]


def fusible(device: torch.device) -> bool:
    return device.type in ("cpu", "cuda")
