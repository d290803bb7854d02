"""A model whose parameters are shared out among ranks is the same model: its weights, average, norms and steps."""

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import values
from torch import Tensor

import allmlp
from allmlp.checkpointing.checkpoint import read, write
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.distributed.parallelize import copy_to_shard, full_model, is_sharded, local_shard, norm, shard
from allmlp.errors import RunError
from allmlp.initial_weights import init_weights
from allmlp.metadata import Metadata
from allmlp.model import Mixer
from allmlp.training.ema import EMA
from allmlp.training.optimizer import adamw
from allmlp.training.optimizer_step import OptimizerStep
from allmlp.training.state import TrainingState

CPU = torch.device("cpu")
ODD = {"hidden_dim": 7, "tokens_mlp_dim": 5, "channels_mlp_dim": 11, "num_classes": 4}
SMALL = {"hidden_dim": 2, "tokens_mlp_dim": 1, "channels_mlp_dim": 2, "num_classes": 2}  # fewer rows than ranks
EVEN = {"hidden_dim": 12, "tokens_mlp_dim": 6, "channels_mlp_dim": 24, "num_classes": 6}
SIZES = {"odd": ODD, "small": SMALL, "even": EVEN}


def blank(sizes: str, context: DistributedContext, dtype: torch.dtype = torch.float32) -> Mixer:
    """Sharded where there are ranks, its memory not yet filled."""
    with torch.device("meta"):
        model = allmlp.create(image_size=8, patch_size=4, num_blocks=2, **SIZES[sizes]).to(dtype)
    if context.world_size > 1:
        shard(model, context, CPU)
    return model.to_empty(device="cpu")


def filled(sizes: str, context: DistributedContext, dtype: torch.dtype = torch.float32, seed: int = 3) -> Mixer:
    """With every parameter drawn, also those that begin at 0 and 1."""
    model = blank(sizes, context, dtype)
    for i, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * seed + i)
        copy_to_shard(parameter, torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return model


def arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def weights(model: Mixer) -> dict[str, np.ndarray]:
    return arrays(dict(full_model(model).named_parameters()))


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]) for name in a
    )


def gap(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


# Initial weights


def begun(context: DistributedContext, sizes: str) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, ...]], bool]:
    model = blank(sizes, context)
    init_weights(model, 5, copy_to_shard)
    held = {name: tuple(local_shard(p.detach()).shape) for name, p in model.named_parameters()}
    return weights(model), held, is_sharded(model)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_initial_weights_do_not_depend_on_the_number_of_ranks(sizes: str, world_size: int) -> None:
    with torch.device("cpu"):
        plain = allmlp.create(image_size=8, patch_size=4, num_blocks=2, seed=5, **SIZES[sizes])
    expected = weights(plain)
    found = values(begun, world_size, sizes)
    for state, _, sharded in found:
        assert sharded
        assert equal(state, expected)
    for name, array in expected.items():  # each row is held once
        held = [shapes[name] for _, shapes, _ in found]
        assert sum(shape[0] for shape in held) == array.shape[0]
        assert all(shape[1:] == array.shape[1:] for shape in held)
        assert held[0][0] < array.shape[0] or array.shape[0] == 1


def made_whole(context: DistributedContext) -> tuple[bool, bool, bool, list[str], dict[str, np.ndarray]]:
    model = filled("odd", context)
    model.metadata = Metadata(classes=("a", "b", "c", "d"))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    full = full_model(model)
    before = weights(model)
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.add_(1)
    return (
        is_sharded(full),
        full.metadata is model.metadata and full.config == model.config,
        equal(weights(model), before),  # what is done to it leaves the sharded one alone
        [name for name, _ in full.named_parameters()],
        before,
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_whole_model_is_a_plain_one_with_the_same_weights(world_size: int) -> None:
    plain = filled("odd", SINGLE_PROCESS)
    assert full_model(plain) is plain
    for sharded, same, alone, names, state in values(made_whole, world_size):
        assert (sharded, same, alone) == (False, True, True)
        assert names == [name for name, _ in plain.named_parameters()]
        assert equal(state, weights(plain))


def norms(context: DistributedContext, sizes: str) -> tuple[float, float]:
    model = filled(sizes, context, torch.float64)
    shares = [local_shard(p.detach()) for p in model.parameters()]
    lost = [share * (float("nan") if context.is_rank0 else 1) for share in shares]
    return tuple(float(norm(tensors, context.world_size > 1)) for tensors in (shares, lost))  # type: ignore[return-value]


@pytest.mark.parametrize("sizes", SIZES)
def test_the_norm_is_over_the_shares_of_all_ranks(sizes: str) -> None:
    expected, _ = norms(SINGLE_PROCESS, sizes)
    for found, lost in values(norms, 3, sizes):
        assert found == pytest.approx(expected, rel=1e-14)
        assert lost != lost


# Averages and steps


def averaged(context: DistributedContext, sizes: str) -> list[dict[str, np.ndarray]]:
    """The shown weights after each of three changes, the weights after all, and the settled ones."""
    model = filled(sizes, context, torch.float64)
    average, seen = EMA(model, 0.75), []
    for step in range(3):
        for i, parameter in enumerate(model.parameters()):
            local_shard(parameter.detach()).mul_(1 + 0.1 * step).add_(i)
        average.update()
        with average.shown():
            seen.append(weights(model))
    seen.append(weights(model))
    average.swap()
    return [*seen, weights(model)]


def each_averaged(context: DistributedContext) -> list[list[dict[str, np.ndarray]]]:
    return [averaged(context, sizes) for sizes in SIZES]


def test_the_average_of_a_shared_model_is_that_of_a_whole_one() -> None:
    expected = each_averaged(SINGLE_PROCESS)
    assert all(gap(seen[2], seen[3]) > 0 for seen in expected)
    for found in values(each_averaged, 3):
        for one, other in zip(found, expected, strict=True):
            assert max(gap(a, b) for a, b in zip(one, other, strict=True)) < 1e-13


Told = tuple[list[tuple[float, float]], dict[str, np.ndarray], list[float]]


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(12, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(12)


def stepped(context: DistributedContext, sizes: str, clip_norm: float | None, poison: int | None, half: bool) -> Told:
    """Norms of gradient and change at each step, the weights after all, what failed; the rank has its share of 12."""
    model = filled(sizes, context, torch.float64)
    optimizer = adamw(model, weight_decay=0.1, beta1=0.9, beta2=0.99)
    optimizer.param_groups[0]["eps"] = optimizer.param_groups[1]["eps"] = 1e-3  # else Adam makes much of a rounding
    update = OptimizerStep(optimizer, clip_norm, half=half, shared=is_sharded(model))
    told, share = [], 12 // context.world_size
    for step in range(1, 5):
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        images, labels = batch(step)
        mine = slice(context.rank * share, (context.rank + 1) * share)
        loss = torch.nn.functional.cross_entropy(model(images[mine]), labels[mine] % SIZES[sizes]["num_classes"])
        update.backward(loss)
        if step == poison and context.is_rank0:  # in the share of one rank alone
            grad = model.get_parameter("stem.weight").grad
            assert grad is not None
            local_shard(grad)[0, 0, 0, 0] = float("inf")
        told.append(tuple(map(float, update(step, context.mean(loss.detach()), 1.0, True))))
    return told, weights(model), [*update.failure.tolist(), update.scaler.get_scale()]


STEPS = list(itertools.product(SIZES, [None, 0.3]))


def each_stepped(context: DistributedContext) -> list[Told]:
    return [stepped(context, sizes, clip_norm, None, False) for sizes, clip_norm in STEPS]


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_shared_step_is_that_of_one_process(world_size: int) -> None:
    expected = each_stepped(SINGLE_PROCESS)
    assert all(found > 0.3 for norms, _, _ in expected for found, _ in norms)  # the clipping has something to do
    for told in values(each_stepped, world_size):
        for case, (found, state, failed), (norms, other, _) in zip(STEPS, told, expected, strict=True):
            assert np.allclose(found, norms, rtol=1e-10, atol=0), case
            assert gap(state, other) < 1e-10, case
            assert failed[0] == 0


def test_no_number_in_one_rank_s_share_ends_the_steps_of_all() -> None:
    _, expected, failure = stepped(SINGLE_PROCESS, "odd", 1.0, 3, False)
    assert failure[0] == 3
    for _, state, failed in values(stepped, 3, "odd", 1.0, 3, False):
        assert failed[0] == 3
        assert gap(state, expected) < 1e-10


@pytest.mark.parametrize("world_size", [2, 3])
def test_an_overflow_in_one_rank_s_share_is_left_out_by_all(world_size: int) -> None:
    _, expected, failure = stepped(SINGLE_PROCESS, "odd", 1.0, 3, True)
    assert failure[0] == 0
    assert failure[3] == 2.0**15  # halved once
    for _, state, failed in values(stepped, world_size, "odd", 1.0, 3, True):
        assert failed[0] == 0
        assert failed[3] == failure[3]
        assert gap(state, expected) < 1e-9


# Checkpoints


def state_of(context: DistributedContext, sizes: str) -> TrainingState:
    model = filled(sizes, context, seed=context.world_size)
    update = OptimizerStep(adamw(model, weight_decay=0.1, beta1=0.9, beta2=0.99), 1.0, shared=is_sharded(model))
    return TrainingState(model, update, EMA(model, 0.9))


def full(state: TrainingState) -> dict[str, np.ndarray]:
    whole = {n: getattr(t, "full_tensor", functools.partial(t.clone))() for n, t in state.tensors().items()}
    return arrays(whole)


def written(context: DistributedContext, sizes: str, folder: Path) -> dict[str, np.ndarray]:
    state = state_of(context, sizes)
    for i, tensor in enumerate(state.tensors().values()):
        if local_shard(tensor).is_floating_point():
            local_shard(tensor).add_(i)
    write(folder, state.tensors(), {"step": 1}, context)
    return full(state)


def taken(context: DistributedContext, sizes: str, folder: Path) -> dict[str, np.ndarray]:
    state = state_of(context, sizes)
    read(folder, state.tensors(), context)
    return full(state)


def each_written(context: DistributedContext, folder: Path) -> list[dict[str, np.ndarray]]:
    return [written(context, sizes, folder / sizes) for sizes in SIZES]


def each_taken(context: DistributedContext, folder: Path) -> list[dict[str, np.ndarray]]:
    return [taken(context, sizes, folder / sizes) for sizes in SIZES]


def test_a_checkpoint_of_two_ranks_is_read_by_any_number(tmp_path: Path) -> None:
    expected, again = values(each_written, 2, tmp_path)
    assert all(equal(a, b) for a, b in zip(expected, again, strict=True))
    assert {name.split(".")[0] for name in expected[0]} == {"model", "optimizer", "average"}
    for world_size in (1, 2, 3):
        for found in values(each_taken, world_size, tmp_path):
            assert all(equal(a, b) for a, b in zip(found, expected, strict=True)), world_size
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(SIZES)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_checkpoint_of_others_is_read_by_two_ranks(world_size: int, tmp_path: Path) -> None:
    expected = values(written, world_size, "odd", tmp_path / "step-1")[0]
    for found in values(taken, 2, "odd", tmp_path / "step-1"):
        assert equal(found, expected)


def refused(context: DistributedContext, folder: Path) -> str:
    try:
        taken(context, "even", folder)
    except RunError as error:
        return str(error)
    return ""


def test_a_checkpoint_of_other_sizes_is_refused_by_all(tmp_path: Path) -> None:
    values(written, 2, "odd", tmp_path / "step-1")
    told = values(refused, 2, tmp_path / "step-1")
    assert all(f"{tmp_path / 'step-1'} does not fit this run: " in line for line in told), told


def unwritten(context: DistributedContext, folder: Path) -> tuple[str, list[str]]:
    """Where one rank alone cannot write its part."""
    import allmlp.checkpointing.checkpoint as module

    state: Any = state_of(context, "odd")
    original = module.fingerprint

    def failing(path: Path) -> dict[str, Any]:
        if context.rank == 1 and path.name.startswith("__"):
            raise OSError(28, "No space left on device", str(path))
        return original(path)

    module.fingerprint = failing
    try:
        write(folder, state.tensors(), {"step": 1}, context)
    except RunError as error:
        context.sum([0])
        return str(error), [path.name for path in folder.parent.iterdir()]
    return "", []


def test_a_part_that_cannot_be_written_is_told_by_all_and_nothing_is_left(tmp_path: Path) -> None:
    for told, left in values(unwritten, 2, tmp_path / "step-1"):
        assert "rank 1: the checkpoint" in told
        assert "cannot be written (No space left on device)" in told
        assert left == []
