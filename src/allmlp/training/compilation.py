"""torch.compile for the training step, where it works and saves time; otherwise the model runs in eager mode."""

import atexit
import contextlib
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from allmlp.device import autocast
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.distributed.parallelize import replicate
from allmlp.errors import RunError, printable
from allmlp.factory import Model
from allmlp.model import MlpBlock

log = logging.getLogger(__name__)

CACHE = "TORCHINDUCTOR_CACHE_DIR"  # environment variable of torch.compile

# Training FLOP above which compiling, about half a minute, saves time (on 2 cores: a run of about two minutes)
WORTHWHILE_FLOP = {"cpu": 3e13, "cuda": 3e15, "mps": float("inf")}
Forward = Callable[[Tensor, Tensor], Tensor]  # images and sample keys → logits

_in_compiled_forward = False  # torch.compiler.is_exporting cannot tell: before PyTorch 2.13 it is true of compiling too


def compile_model(
    model: Model,
    mode: Literal["auto", "on", "off"],
    *,
    batch_size: int,
    training_flop: float,
    device: torch.device,
    precision: torch.dtype,
    context: DistributedContext = SINGLE_PROCESS,
) -> tuple[Forward, bool]:
    """Returns the forward pass for training batches, warmed up, and whether it is compiled.

    A single process compiles the whole model. Several processes compile each block separately, since they exchange
    gradients and shards between blocks. ``restore_eager`` undoes what this changes in the model.

    Args:
        model: on its device, perhaps sharded, perhaps with recomputation installed.
        mode: "auto" compiles if the run is long enough and the compiler works (on a CPU it needs a C++ compiler).
        batch_size: images in each forward pass of this process.
        training_flop: FLOPs of the whole run.
        device, precision: those of the training step.
        context: the processes that train together.

    Raises:
        RunError: the compiler fails, and mode is "on" or there are several processes.
    """
    wanted = mode == "on" or (mode == "auto" and training_flop >= WORTHWHILE_FLOP.get(device.type, float("inf")))
    forward: Forward = replicate(model, context, device)
    if not wanted:
        if context.world_size > 1:  # DDP sets its buckets after the first pass, and with them the order of its sums
            warm_up(forward, model, batch_size, device, precision)
        return forward, False
    from torch._dynamo.exc import TorchDynamoException  # takes two seconds, which other runs need not spend

    log.info("compiling the training step: about half a minute")
    install_fast_mlps(model)
    try:
        if context.world_size == 1:
            forward = CompiledForward(model)
        else:
            compile_blocks(model)
        warm_up(forward, model, batch_size, device, precision)
    except TorchDynamoException as error:  # what it wraps differs by backend
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if mode == "on" or context.world_size > 1:  # other ranks may have compiled, and would wait for this one
            raise RunError(f"torch.compile failed ({reason}): install a C++ compiler, or use --compile off") from error
        log.warning("torch.compile does not work here (%s): training without it, slower", reason)
        remove_fast_mlps(model)
        return model, False
    return forward, True


def ensure_cache() -> None:
    """Gives torch.compile a temporary folder for compiled code where the one that is set cannot be written.

    PyTorch creates the folder when an optimizer is made, even if nothing is compiled.
    """
    if (folder := os.environ.get(CACHE)) is None:  # the default is below the folder for temporary files
        return
    with contextlib.suppress(OSError):
        Path(folder).mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return
    place = tempfile.TemporaryDirectory(prefix="allmlp-compiled-")
    atexit.register(place.cleanup)
    os.environ[CACHE] = place.name
    log.warning("%s=%s cannot be written: compiled code is not kept for other runs", CACHE, printable(folder))


def restore_eager(model: Model) -> None:
    """Gives all blocks their plain forward pass again, without compilation or recomputation."""
    remove_fast_mlps(model)
    for block in model.blocks:
        block.__dict__.pop("forward", None)


class CompiledForward:
    """A compiled forward pass that uses ``fast_mlp``. When it is copied, the copied model is compiled anew."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self.forward, self.compiled = forward, torch.compile(forward)

    def __call__(self, *inputs: Any, **options: Any) -> Tensor:
        if torch.compiler.is_compiling():  # an outer torch.compile or torch.export is tracing this
            return self.forward(*inputs, **options)
        with fast_mlp_enabled():
            return self.compiled(*inputs, **options)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return CompiledForward, (self.forward,)


def compile_blocks(model: Model) -> None:
    """Compiles each block; they share compiled code, unless their stochastic depth differs."""
    import torch._dynamo.config as settings

    settings.recompile_limit = max(settings.recompile_limit, 2 * len(model.blocks))
    for block in model.blocks:
        block.forward = CompiledForward(block.forward)


def install_fast_mlps(model: Model) -> None:
    for mlp in mlp_blocks(model):
        mlp.forward = partial(fast_mlp, mlp)


def remove_fast_mlps(model: Model) -> None:
    for mlp in mlp_blocks(model):
        mlp.__dict__.pop("forward", None)


def mlp_blocks(model: Model) -> Iterator[MlpBlock]:
    return (module for module in model.modules() if isinstance(module, MlpBlock))


@contextlib.contextmanager
def fast_mlp_enabled() -> Iterator[None]:
    """Within the block, torch.compile traces ``fast_mlp`` in its fast form."""
    global _in_compiled_forward
    before, _in_compiled_forward = _in_compiled_forward, True
    try:
        yield
    finally:
        _in_compiled_forward = before


def fast_mlp(mlp: MlpBlock, x: Tensor, keys: Tensor | None = None) -> Tensor:
    """``MlpBlock.forward`` in the form that compiles best; in eager mode and in torch.export the plain one.

    In training the activations after the first dense layer are computed again in the backward pass: once fused, a
    GELU costs less than keeping its result.
    """
    if not (_in_compiled_forward and torch.compiler.is_compiling()):
        return MlpBlock.forward(mlp, x, keys)
    hidden = mlp.dense_0(x)
    if mlp.training:
        rest = partial(after_first_dense, mlp)
        return checkpoint(rest, hidden, keys, use_reentrant=False, preserve_rng_state=keys is None)
    return after_first_dense(mlp, hidden, keys)


def after_first_dense(mlp: MlpBlock, hidden: Tensor, keys: Tensor | None) -> Tensor:
    activated = gelu_by_sigmoid(hidden) if mlp.gelu.approximate == "tanh" else mlp.gelu(hidden)
    return mlp.dropout_1(mlp.dense_1(mlp.dropout_0(activated, keys)), keys)


def gelu_by_sigmoid(x: Tensor) -> Tensor:
    """The tanh form of the GELU: ½(1 + tanh u) = sigmoid(2u). Compiled, this is twice as fast."""
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


def warm_up(forward: Forward, model: Model, batch_size: int, device: torch.device, precision: torch.dtype) -> None:
    """Runs one forward and backward pass and discards the gradients."""
    images = torch.zeros(batch_size, model.in_channels, *model.image_size, device=device)
    keys = torch.zeros(batch_size, dtype=torch.long, device=device)
    model.train()
    try:
        with autocast(device, precision):
            logits = forward(images, keys)
        logits.float().logsumexp(1).sum().backward()
    finally:
        model.zero_grad(set_to_none=True)
