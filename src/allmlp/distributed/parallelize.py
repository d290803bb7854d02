"""A model spread over processes: a replica in each (DDP), or sharded block by block (FSDP2).

Applied from outside: the model's own code does not change. Parameters are sharded along their first axis.
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
from allmlp.factory import Model, build_meta


def shard(model: Model, context: DistributedContext, device: torch.device) -> None:
    """Shards the parameters in place, one shard per process; each block is gathered while it is computed."""
    mesh = init_device_mesh(device.type, (context.world_size,))
    for module in (*model.blocks, model):
        # a gathered copy that is kept after the forward pass would miss changes to the shards (EMA weights)
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def copy_to_shard(parameter: Tensor, value: Tensor) -> None:
    """Copies a full value into a parameter, or this process's part of it into a sharded one."""
    target = local_shard(parameter.detach())
    if isinstance(parameter, DTensor):
        shards = value.chunk(parameter.device_mesh.size())
        rank = parameter.device_mesh.get_local_rank()
        value = shards[rank] if rank < len(shards) else value[:0]
    target.copy_(value)


def local_shard(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_model(model: Model) -> Model:
    """The model with complete parameters: gathered if it is sharded, otherwise the model itself. Collective.

    Buffers, the statistics of batch normalization, become those of rank 0, as in DDP's forward pass.
    """
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    if not isinstance(model, FSDPModule):
        return model
    state = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in model.state_dict().items()}
    gathered = build_meta(model.config)
    gathered.load_state_dict(state, assign=True)
    gathered.metadata = model.metadata
    return gathered


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def global_norm(tensors: list[Tensor], sharded: bool) -> Tensor:
    """The 2-norm of all tensors together; of sharded ones, over the shards of all ranks."""
    total = torch.nn.utils.get_total_norm(tensors)
    if not sharded:
        return total
    squares = total.square()
    dist.all_reduce(squares)
    return squares.sqrt()


def replicate(model: Model, context: DistributedContext, device: torch.device) -> nn.Module:
    """The model in DDP, which averages gradients over ranks; the model itself in one process, or if it is sharded."""
    if context.world_size == 1 or isinstance(model, FSDPModule):
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def grad_sync(forward: Callable[..., Tensor], last: bool) -> contextlib.AbstractContextManager[None]:
    """Surrounds a micro-batch's forward and backward pass; gradients are exchanged in the step's last one only."""
    if isinstance(forward, FSDPModule):
        forward.set_requires_gradient_sync(last)
    if isinstance(forward, DistributedDataParallel) and not last:
        return forward.no_sync()
    return contextlib.nullcontext()
