"""torch.compile where it pays and works, the model as it is where not."""

import logging
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from allmlp.device import autocast
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.distributed.parallelize import replicate
from allmlp.errors import RunError
from allmlp.model import Mixer

log = logging.getLogger(__name__)

# Training FLOP from which the compiler's half minute is won back, by the kind of device (2 cores: about two minutes)
WORTHWHILE_FLOP = {"cpu": 3e13, "cuda": 3e15, "mps": float("inf")}
Forward = Callable[[Tensor, Tensor], Tensor]


def made_ready(
    model: Mixer,
    mode: Literal["auto", "on", "off"],
    *,
    batch_size: int,
    training_flop: float,
    device: torch.device,
    precision: torch.dtype,
    context: DistributedContext = SINGLE_PROCESS,
) -> tuple[Forward, bool]:
    """The forward pass for training batches, warmed up, and whether it is compiled.

    One process compiles the model as a whole; of several, each compiles the blocks one by one, between which gradients
    and shares travel. "auto" compiles where the run is long enough and the compiler works (on a CPU it needs a C++
    compiler); "on" raises a RunError where it does not.
    """
    wanted = mode == "on" or (mode == "auto" and training_flop >= WORTHWHILE_FLOP.get(device.type, float("inf")))
    forward: Forward = replicate(model, context, device)
    if not wanted:
        if (
            context.world_size > 1
        ):  # DDP arranges its buckets after the first pass: now, so that no sum depends on the start
            warm_up(forward, model, batch_size, device, precision)
        return forward, False
    from torch._dynamo.exc import TorchDynamoException  # two seconds that only a compiled run need spend

    log.info("compiling the training step: about half a minute")
    try:
        if context.world_size == 1:
            forward = torch.compile(model)
        else:
            compile_blocks(model)
        warm_up(forward, model, batch_size, device, precision)
    except TorchDynamoException as error:  # what it wraps differs by backend
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if mode == "on" or context.world_size > 1:  # the other ranks have compiled, and wait
            raise RunError(f"torch.compile failed ({reason}): install a C++ compiler, or use --compile off") from error
        log.warning("torch.compile does not work here (%s): training without it, slower", reason)
        return model, False
    return forward, True


def compile_blocks(model: Mixer) -> None:
    """One compiled block serves for all, unless they differ in their stochastic depth."""
    import torch._dynamo.config as settings

    settings.recompile_limit = max(settings.recompile_limit, 2 * len(model.blocks))
    for block in model.blocks:
        block.forward = torch.compile(block.forward)


def warm_up(forward: Forward, model: Mixer, batch_size: int, device: torch.device, precision: torch.dtype) -> None:
    """One pass there and back, which leaves no gradients."""
    images = torch.zeros(batch_size, model.config["in_channels"], *model.image_size, device=device)
    keys = torch.zeros(batch_size, dtype=torch.long, device=device)
    model.train()
    try:
        with autocast(device, precision):
            logits = forward(images, keys)
        logits.float().logsumexp(1).sum().backward()
    finally:
        model.zero_grad(set_to_none=True)
