"""A model spread over processes: a replica on each (DDP), or sharded block by block (FSDP2).

Applied from outside: the model knows nothing of it. Parameters are sharded along their first axis.
"""

import contextlib
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from allmlp.distributed.context import DistributedContext
from allmlp.factory import build_meta
from allmlp.model import Mixer


def shard(model: Mixer, context: DistributedContext, device: torch.device) -> None:
    """From now on each process holds its share of every parameter; blocks are put together where they are computed."""
    mesh = init_device_mesh(device.type, (context.world_size,))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)  # else a change by hand would miss a whole copy


def copy_to_shard(parameter: Tensor, value: Tensor) -> None:
    """Copies a whole value into a parameter, or its share into a sharded one."""
    target = local_shard(parameter.detach())
    if isinstance(parameter, DTensor):
        shares = value.chunk(parameter.device_mesh.size())
        rank = parameter.device_mesh.get_local_rank()
        value = shares[rank] if rank < len(shares) else value[:0]
    target.copy_(value)


def local_shard(tensor: Tensor) -> Tensor:
    """This process's share of a sharded tensor; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_model(model: Mixer) -> Mixer:
    """The model with all of its parameters: itself, unless it is sharded. All ranks must call this."""
    if not isinstance(model, FSDPModule):
        return model
    state = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in model.state_dict().items()}
    plain = build_meta(model.config)
    plain.load_state_dict(state, assign=True)
    plain.metadata = model.metadata
    return plain


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def norm(tensors: list[Tensor], shared: bool) -> Tensor:
    """The global 2-norm; where the tensors are shares, over those of all ranks."""
    total = torch.nn.utils.get_total_norm(tensors)
    if not shared:
        return total
    squares = total.square()
    dist.all_reduce(squares)
    return squares.sqrt()


def replicate(model: Mixer, context: DistributedContext, device: torch.device) -> nn.Module:
    """What computes gradients that are the means over all ranks: the model itself where it is alone, or sharded."""
    if context.world_size == 1 or isinstance(model, FSDPModule):
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def grad_sync(forward: Callable[..., Tensor], last: bool) -> contextlib.AbstractContextManager[None]:
    """Around the forward and backward pass of a micro-batch: only a step's last one makes the ranks exchange."""
    if isinstance(forward, FSDPModule):
        forward.set_requires_gradient_sync(last)
    if isinstance(forward, DistributedDataParallel) and not last:
        return forward.no_sync()
    return contextlib.nullcontext()
