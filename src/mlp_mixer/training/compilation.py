"""torch.compile where it pays and works, the model as it is where not."""

import logging
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from mlp_mixer.device import autocast
from mlp_mixer.errors import RunError
from mlp_mixer.model import Mixer

log = logging.getLogger(__name__)

# Training FLOP from which the compiler's half minute is won back, by the kind of device (2 cores: about two minutes)
WORTHWHILE_FLOP = {"cpu": 3e13, "cuda": 3e15, "mps": float("inf")}


def compiled(
    model: Mixer,
    mode: Literal["auto", "on", "off"],
    *,
    batch_size: int,
    training_flop: float,
    device: torch.device,
    precision: torch.dtype,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The model's forward pass for training batches: compiled and warmed up, or the model itself.

    "auto" compiles where the run is long enough and the compiler works (on a CPU it needs a C++ compiler); "on" raises
    a RunError where it does not.
    """
    if mode == "off" or (mode == "auto" and training_flop < WORTHWHILE_FLOP.get(device.type, float("inf"))):
        return model
    from torch._dynamo.exc import TorchDynamoException  # two seconds that only a compiled run need spend

    log.info("compiling the training step: about half a minute")
    forward = torch.compile(model)
    images = torch.zeros(batch_size, model.config["in_channels"], *model.image_size, device=device)
    keys = torch.zeros(batch_size, dtype=torch.long, device=device)
    try:
        with autocast(device, precision):
            logits = forward(images, keys)
        logits.float().logsumexp(1).sum().backward()
    except TorchDynamoException as error:  # what it wraps differs by backend
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if mode == "on":
            raise RunError(f"torch.compile failed ({reason}): install a C++ compiler, or use --compile off") from error
        log.warning("torch.compile does not work here (%s): training without it, slower", reason)
        return model
    finally:
        model.zero_grad(set_to_none=True)
    return forward
