"""A checkpoint that some ranks wrote is read bit for bit by another number of ranks."""

import zlib
from pathlib import Path

import torch
from ranks import rank_values
from small_runs import CLASSES, CPU, recipe
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from allmlp.checkpointing.checkpoint import read_tensors, verify_checkpoint, write_checkpoint
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.distributed.parallelize import copy_to_shard, local_shard, shard
from allmlp.training.build import build_initializer, build_optimizer
from allmlp.training.ema import EMA
from allmlp.training.optimizer_step import OptimizerStep
from allmlp.training.state import TrainingState

DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
ODD = {"hidden_dim": 7, "tokens_mlp_dim": 5, "channels_mlp_dim": 3}  # 3: on 4 ranks, one has nothing


def empty_state(context: DistributedContext) -> dict[str, Tensor]:
    """Zeros, as FSDP2 and AdamW with an average hold them, and tensors of the other dtypes."""
    model = build_initializer(recipe(**ODD)).build_meta(CLASSES)
    if context.world_size > 1:
        shard(model, context, CPU)
    model.to_empty(device="cpu")
    optimizer = build_optimizer(recipe().optimization, model)
    named = TrainingState(model, OptimizerStep(optimizer, 1.0), EMA(model, 0.9)).tensors()
    for dtype in DTYPES:
        named |= {f"{dtype} {shape}": torch.empty(shape, dtype=dtype) for shape in ((), (3,), (2, 5), (0, 2))}
        if context.world_size > 1:
            mesh = init_device_mesh("cpu", (context.world_size,))
            for rows in (2, 5):
                part = torch.empty(rows, 3, dtype=dtype).chunk(context.world_size)
                mine = part[context.rank] if context.rank < len(part) else part[0][:0]
                shape, stride = torch.Size((rows, 3)), (3, 1)
                sharded = DTensor.from_local(mine, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
                named[f"sharded {dtype} {rows}"] = sharded
        else:
            named |= {f"sharded {dtype} {rows}": torch.empty(rows, 3, dtype=dtype) for rows in (2, 5)}
    for tensor in named.values():
        local_shard(tensor).zero_()
    return named


def expected(name: str, like: Tensor) -> Tensor:
    """The full value of a tensor, by its name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (9 * torch.randn(like.shape, generator=generator, dtype=torch.float64)).to(like.dtype)


def write(context: DistributedContext, folder: Path) -> None:
    tensors = empty_state(context)
    for name, tensor in tensors.items():
        copy_to_shard(tensor, expected(name, tensor))
    write_checkpoint(folder, tensors, {"ranks": context.world_size}, context)


def differing(context: DistributedContext, folder: Path) -> list[str]:
    """The tensors that are not read as they were written."""
    verify_checkpoint(folder)
    found, wanted = empty_state(context), empty_state(context)
    read_tensors(folder, found, context)
    for name, tensor in wanted.items():
        copy_to_shard(tensor, expected(name, tensor))
    return [name for name in wanted if not torch.equal(local_shard(found[name]), local_shard(wanted[name]))]


def write_and_read(context: DistributedContext, root: Path) -> list[str]:
    write(context, root / str(context.world_size))
    return [name for folder in sorted(root.iterdir()) for name in differing(context, folder)]


def test_what_2_or_4_ranks_wrote_is_read_by_1_2_3_or_4(tmp_path: Path) -> None:
    for world_size in (4, 2, 3):
        assert not any(rank_values(write_and_read, world_size, tmp_path)), world_size
    names = [path.name for path in (tmp_path / "4").glob("shard-*")]
    assert len(names) == 4
    for folder in sorted(tmp_path.iterdir()):
        assert not differing(SINGLE_PROCESS, folder)
    # a single process wrote all of it, into a checkpoint that two ranks read
    write(SINGLE_PROCESS, tmp_path / "1")
    assert not any(rank_values(differing, 2, tmp_path / "1"))
