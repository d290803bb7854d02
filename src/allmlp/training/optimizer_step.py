"""From gradients to new weights: clipped at a global norm, scaled for float16, guarded against non-finite steps."""

import torch
from torch import Tensor

from allmlp.distributed.parallelize import global_norm, local_shard

MAX_OVERFLOWS = 32  # in a row; by then the scale is 2⁻¹⁶ of a reasonable one


class OptimizerStep:
    """Updates the weights, step by step, until the loss or gradient of a step is not finite.

    From then on the weights stay those of the last good step. ``failure``, on the device, records that step; reading it
    waits for the device, so it need not be read at every step.

    Args:
        optimizer: holds the parameters to train.
        clip_norm: global norm that gradients are scaled down to, dividing by the norm itself as the authors do
            (PyTorch's own clipping divides by norm + 1e-6); None: no clipping.
        float16: scale the loss so that small float16 gradients do not vanish (torch.amp.GradScaler). A step whose
            gradient overflows is then skipped and the scale halved, as usual; a loss that is not finite, or 32
            overflows in a row, still end the run.
        sharded: the parameters are this process's shards; norms are over the shards of all ranks.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, clip_norm: float | None, float16: bool = False, sharded: bool = False
    ) -> None:
        self.optimizer, self.clip_norm, self.sharded = optimizer, clip_norm, sharded
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        device = self.parameters[0].device
        self.scaler = torch.amp.GradScaler(device.type, enabled=float16)
        self.failure = torch.zeros(3, device=device)  # step (from 1; 0: none), loss and norm of the first failure
        self.fused = optimizer.defaults.get("fused")
        self.overflows = torch.zeros((), device=device)  # steps in a row whose gradient was not finite
        self.tolerated_overflows = MAX_OVERFLOWS if float16 else 0

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def __call__(self, step: int, loss: Tensor, factor: float = 1.0, measure: bool = False) -> tuple[Tensor, Tensor]:
        """Updates the weights and clears the gradients.

        Args:
            step: number of this step, from 1.
            loss: (), of the step; used to see whether it is finite.
            factor: gradients still have to be multiplied by it.
            measure: compute the norm of the update.

        Returns:
            The gradient's global norm before clipping, and the update's (NaN where it was not measured).
        """
        gradients = [local_shard(p.grad) for p in self.parameters if p.grad is not None]
        if self.scaler.is_enabled():
            stop = (self.failure[0] > 0) | ~loss.isfinite()
            scale(gradients, torch.where(stop, float("nan"), 1.0))  # makes the scaler skip the step
            self.scaler.unscale_(self.optimizer)
        if factor != 1:
            scale(gradients, factor)
        norm = global_norm(gradients, self.sharded)
        self.overflows = torch.where(norm.isfinite(), 0.0, self.overflows + 1)
        good = loss.isfinite() & (self.overflows <= self.tolerated_overflows)
        current = torch.stack([torch.full_like(norm, step), loss.to(norm.dtype), norm]).to(self.failure.dtype)
        self.failure = torch.where((self.failure[0] == 0) & ~good, current, self.failure)
        if self.clip_norm is not None:
            scale(gradients, (self.clip_norm / norm).clamp(max=1))
        before = [local_shard(p.detach()).clone() for p in self.parameters] if measure else []
        self.update_weights()
        self.optimizer.zero_grad(set_to_none=True)
        if not measure:
            return norm, torch.full((), float("nan"))
        changes = [local_shard(p.detach()) - b for p, b in zip(self.parameters, before, strict=True)]
        return norm, global_norm(changes, self.sharded)

    def update_weights(self) -> None:
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.fused:  # found_inf, which GradScaler also sets, makes a fused optimizer skip the step on the device
            self.optimizer.found_inf = (self.failure[0] > 0).float()  # pyright: ignore[reportAttributeAccessIssue]
            self.optimizer.step()
            del self.optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]
        elif not self.failure[0]:  # waits for the device: only on Apple's GPUs, where no optimizer is fused
            self.optimizer.step()


def scale(tensors: list[Tensor], factor: float | Tensor) -> None:
    torch._foreach_mul_(tensors, factor)  # pyright: ignore[reportPrivateImportUsage]  # one kernel for all of them
