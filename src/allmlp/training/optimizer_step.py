"""From gradients to new weights: clipped at a global norm, scaled for float16, and never by a step gone wrong."""

import torch
from torch import Tensor

from allmlp.distributed.parallelize import local_shard
from allmlp.distributed.parallelize import norm as norm_of

OVERFLOWS = 32  # in a row: the multiplier is then 2⁻¹⁶ of what is reasonable


class OptimizerStep:
    """Applies one step after another; after the first whose loss or gradient is not finite, none.

    The weights then stay those of the last good step, without the host waiting for the device at every step to see
    whether there is one: ``failure`` tells when it is read.

    Args:
        optimizer: of the parameters to train.
        clip_norm: global norm that gradients are scaled down to, by norm exactly (PyTorch's own clipping divides by
            norm + 1e-6, the authors by the norm); None: not clipped.
        shared: the parameters are this process's shares of sharded ones: norms are over those of all ranks.
        half: float16 gradients, multiplied beforehand so that small ones do not vanish (torch.amp.GradScaler). Steps
            whose gradient overflows are then left out and the multiplier halved, as is usual; a loss that is not
            finite, or no finite gradient after 32 halvings, still ends the run.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, clip_norm: float | None, half: bool = False, shared: bool = False
    ) -> None:
        self.optimizer, self.clip_norm, self.shared = optimizer, clip_norm, shared
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        device = self.parameters[0].device
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        self.failure = torch.zeros(3, device=device)  # step (from 1; 0: none), loss and norm of what first went wrong
        self.fused = optimizer.defaults.get("fused")
        self.overflows = torch.zeros((), device=device)  # steps in a row whose gradient was not finite
        self.tolerated = OVERFLOWS if half else 0

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def __call__(self, step: int, loss: Tensor, factor: float = 1.0, measure: bool = False) -> tuple[Tensor, Tensor]:
        """Steps, and clears the gradients.

        Args:
            step: how many this makes, from 1.
            loss: (), of the step; only whether it is finite matters.
            factor: what the gradients still have to be multiplied by.
            measure: whether to compute the norm of the change.

        Returns:
            The gradient's global norm before clipping, and the update's, NaN where it was not measured.
        """
        gradients = [local_shard(p.grad) for p in self.parameters if p.grad is not None]
        if self.scaler.is_enabled():
            stop = (self.failure[0] > 0) | ~loss.isfinite()
            scale(gradients, torch.where(stop, float("nan"), 1.0))  # at which the scaler leaves the step out
            self.scaler.unscale_(self.optimizer)
        if factor != 1:
            scale(gradients, factor)
        norm = norm_of(gradients, self.shared)
        self.overflows = torch.where(norm.isfinite(), 0.0, self.overflows + 1)
        good = loss.isfinite() & (self.overflows <= self.tolerated)
        seen = torch.stack([torch.full_like(norm, step), loss.to(norm.dtype), norm]).to(self.failure.dtype)
        self.failure = torch.where((self.failure[0] == 0) & ~good, seen, self.failure)
        if self.clip_norm is not None:
            scale(gradients, (self.clip_norm / norm).clamp(max=1))
        before = [local_shard(p.detach()).clone() for p in self.parameters] if measure else []
        self.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not measure:
            return norm, torch.full((), float("nan"))
        changes = [local_shard(p.detach()) - b for p, b in zip(self.parameters, before, strict=True)]
        return norm, norm_of(changes, self.shared)

    def step(self) -> None:
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.fused:  # what the scaler, too, tells fused optimisers: leave this step out
            self.optimizer.found_inf = (self.failure[0] > 0).float()  # pyright: ignore[reportAttributeAccessIssue]
            self.optimizer.step()
            del self.optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]
        elif not self.failure[0]:
            self.optimizer.step()


def scale(tensors: list[Tensor], factor: float | Tensor) -> None:
    torch._foreach_mul_(tensors, factor)  # pyright: ignore[reportPrivateImportUsage]  # one kernel for all of them
