"""The one training loop."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mlp_mixer.card import Preprocessing
from mlp_mixer.data.loading import Batch
from mlp_mixer.data.transforms import normalise
from mlp_mixer.device import autocast
from mlp_mixer.model import Mixer


class Step(NamedTuple):
    step: int  # how many are done, from 1
    batch: Batch
    learning_rate: float
    loss: Tensor  # () on the device: reading it waits for the step to end
    gradient_norm: Tensor  # () on the device, before clipping


def train_steps(
    model: Mixer,
    forward: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    learning_rate: Callable[[int], float],
    *,
    device: torch.device,
    precision: torch.dtype,
    preprocessing: Preprocessing,
    clip_norm: float | None,
    label_smoothing: float,
    seed: int,
) -> Iterator[Step]:
    """Trains the model by one batch at a time; ``forward`` is the model itself or its compiled form."""
    for step, batch in enumerate(batches):
        model.train()
        torch.manual_seed(step_seed(seed, step))  # of dropout and stochastic depth
        rate = learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate

        images = normalise(batch.images.to(device, non_blocking=True), preprocessing)
        labels, valid = batch.labels.to(device, non_blocking=True), batch.valid.to(device, non_blocking=True)
        with autocast(device, precision):
            logits = forward(images)
        losses = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)
        loss = (losses * valid).sum() / valid.sum().clamp(min=1)  # an unreadable image's place counts for nothing
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield Step(step + 1, batch, rate, loss.detach(), norm)


def step_seed(seed: int, step: int) -> int:
    """32 bits, which is all that torch's generator on the CPU takes of a seed, from the whole of (seed, step)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:4], "little")
