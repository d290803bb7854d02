"""A sharded model equals an unsharded one: its initial weights, average, norms, steps and checkpoints."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import rank_values
from torch import Tensor
from torch.distributed.tensor import DTensor

import allmlp
from allmlp.checkpointing.checkpoint import read_tensors, write_checkpoint
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.distributed.parallelize import copy_to_shard, full_model, global_norm, is_sharded, local_shard, shard
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


def empty_model(sizes: str, context: DistributedContext, dtype: torch.dtype = torch.float32) -> Mixer:
    """Sharded if there are several ranks; its parameters are not initialized."""
    with torch.device("meta"):
        model = allmlp.create(image_size=8, patch_size=4, num_blocks=2, **SIZES[sizes]).to(dtype)
    if context.world_size > 1:
        shard(model, context, CPU)
    return model.to_empty(device="cpu")


def random_model(sizes: str, context: DistributedContext, dtype: torch.dtype = torch.float32, seed: int = 3) -> Mixer:
    """With random values in every parameter, also in those that are initially 0 or 1."""
    model = empty_model(sizes, context, dtype)
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


def max_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


# Initial weights


def initialize(context: DistributedContext) -> dict[str, Any]:
    """By sizes: the full weights, the shapes of this rank's shards, and whether the model is sharded."""
    found = {}
    for sizes in SIZES:
        model = empty_model(sizes, context)
        init_weights(model, 5, copy_to_shard)
        shapes = {name: tuple(local_shard(p.detach()).shape) for name, p in model.named_parameters()}
        found[sizes] = weights(model), shapes, is_sharded(model)
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_initial_weights_do_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    found = rank_values(initialize, world_size)
    for sizes, options in SIZES.items():
        expected = weights(allmlp.create(image_size=8, patch_size=4, num_blocks=2, seed=5, **options))
        assert all(of_rank[sizes][2] and equal(of_rank[sizes][0], expected) for of_rank in found), sizes
        for name, array in expected.items():  # each row is in one shard
            of_ranks = [of_rank[sizes][1][name] for of_rank in found]
            assert sum(shape[0] for shape in of_ranks) == array.shape[0]
            assert all(shape[1:] == array.shape[1:] for shape in of_ranks)
            assert of_ranks[0][0] < array.shape[0] or array.shape[0] == 1


def gather(context: DistributedContext) -> tuple[bool, bool, bool, list[str], dict[str, np.ndarray]]:
    model = random_model("odd", context)
    model.metadata = Metadata(classes=("a", "b", "c", "d"))
    model.requires_grad_(False)
    full = full_model(model)
    before = weights(model)
    for parameter in full.parameters():
        parameter.data.add_(1)
    return (
        is_sharded(full),
        full.metadata is model.metadata and full.config == model.config,
        equal(weights(model), before),  # changes to the full model leave the sharded one unchanged
        [name for name, _ in full.named_parameters()],
        before,
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_full_model_is_an_unsharded_one_with_the_same_weights(world_size: int) -> None:
    plain = random_model("odd", SINGLE_PROCESS)
    assert full_model(plain) is plain
    for sharded, same, independent, names, state in rank_values(gather, world_size):
        assert (sharded, same, independent) == (False, True, True)
        assert names == [name for name, _ in plain.named_parameters()]
        assert equal(state, weights(plain))


def norms(context: DistributedContext) -> list[tuple[float, float]]:
    """By sizes: of all parameters; and with NaN in those of rank 0."""
    found, sharded = [], context.world_size > 1
    for sizes in SIZES:
        shards = [local_shard(p.detach()) for p in random_model(sizes, context, torch.float64).parameters()]
        with_nan = [shard * (float("nan") if context.is_rank0 else 1) for shard in shards]
        found.append((float(global_norm(shards, sharded)), float(global_norm(with_nan, sharded))))
    return found


def test_the_norm_is_over_the_shards_of_all_ranks() -> None:
    expected = [norm for norm, _ in norms(SINGLE_PROCESS)]
    for found in rank_values(norms, 3):
        assert [norm for norm, _ in found] == pytest.approx(expected, rel=1e-14)
        assert all(with_nan != with_nan for _, with_nan in found)


# Averages and steps


def average(context: DistributedContext, sizes: str) -> list[dict[str, np.ndarray]]:
    """The averages after each of three changes of the weights, the weights then, and after the final swap."""
    model = random_model(sizes, context, torch.float64)
    ema, states = EMA(model, 0.75), []
    for step in range(3):
        for i, parameter in enumerate(model.parameters()):
            local_shard(parameter.detach()).mul_(1 + 0.1 * step).add_(i)
        ema.update()
        with ema.swapped_in():
            states.append(weights(model))
    states.append(weights(model))
    ema.swap()
    return [*states, weights(model)]


def average_all(context: DistributedContext) -> list[list[dict[str, np.ndarray]]]:
    return [average(context, sizes) for sizes in SIZES]


def test_the_average_of_a_sharded_model_equals_that_of_an_unsharded_one() -> None:
    expected = average_all(SINGLE_PROCESS)
    assert all(max_difference(states[2], states[3]) > 0 for states in expected)
    for found in rank_values(average_all, 3):
        for one, other in zip(found, expected, strict=True):
            assert max(max_difference(a, b) for a, b in zip(one, other, strict=True)) < 1e-13


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(12, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(12)


Steps = tuple[list[tuple[float, float]], dict[str, np.ndarray], list[float]]


def take_steps(
    context: DistributedContext, sizes: str, clip_norm: float | None, infinite_at: int | None, float16: bool
) -> Steps:
    """Four steps of 12 images: norms of gradient and update at each, the weights after all, and the failure."""
    model = random_model(sizes, context, torch.float64)
    optimizer = adamw(model, weight_decay=0.1, beta1=0.9, beta2=0.99)
    optimizer.param_groups[0]["eps"] = optimizer.param_groups[1]["eps"] = 1e-3  # else Adam amplifies rounding errors
    optimizer_step = OptimizerStep(optimizer, clip_norm, float16=float16, sharded=is_sharded(model))
    norms, images_per_rank = [], 12 // context.world_size
    for step in range(1, 5):
        optimizer_step.set_learning_rate(0.01)
        images, labels = batch(step)
        mine = slice(context.rank * images_per_rank, (context.rank + 1) * images_per_rank)
        loss = torch.nn.functional.cross_entropy(model(images[mine]), labels[mine] % SIZES[sizes]["num_classes"])
        optimizer_step.backward(loss)
        if step == infinite_at and context.is_rank0:  # in the shard of one rank only
            grad = model.get_parameter("stem.weight").grad
            assert grad is not None
            local_shard(grad)[0, 0, 0, 0] = float("inf")
        norm, update_norm = optimizer_step(step, context.mean(loss.detach()), 1.0, True)
        norms.append((float(norm), float(update_norm)))
    return norms, weights(model), [*optimizer_step.failure.tolist(), optimizer_step.scaler.get_scale()]


CASES = list(itertools.product(SIZES, [None, 0.3]))


def take_steps_of_all(context: DistributedContext) -> list[Steps]:
    return [take_steps(context, sizes, clip_norm, None, False) for sizes, clip_norm in CASES]


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_step_of_a_sharded_model_equals_that_of_one_process(world_size: int) -> None:
    expected = take_steps_of_all(SINGLE_PROCESS)
    assert all(norm > 0.3 for norms, _, _ in expected for norm, _ in norms)  # clipping has an effect
    for results in rank_values(take_steps_of_all, world_size):
        for case, (norms, state, failure), (other_norms, other, _) in zip(CASES, results, expected, strict=True):
            assert np.allclose(norms, other_norms, rtol=1e-10, atol=0), case
            assert max_difference(state, other) < 1e-10, case
            assert failure[0] == 0


@pytest.mark.parametrize(("world_size", "float16"), [(3, False), (2, True), (3, True)])
def test_an_infinite_gradient_in_the_shard_of_one_rank_counts_for_all(world_size: int, float16: bool) -> None:
    """It ends the steps of all ranks; with scaled gradients, all skip the step and halve the scale."""
    _, expected, single = take_steps(SINGLE_PROCESS, "odd", 1.0, 3, float16)
    assert (single[0], single[3]) == ((0, 2.0**15) if float16 else (3, single[3]))
    for _, state, failure in rank_values(take_steps, world_size, "odd", 1.0, 3, float16):
        assert (failure[0], failure[3]) == (single[0], single[3])
        assert max_difference(state, expected) < 1e-9


# Checkpoints


def state_of(context: DistributedContext, sizes: str) -> TrainingState:
    model = random_model(sizes, context, seed=context.world_size)
    optimizer = adamw(model, weight_decay=0.1, beta1=0.9, beta2=0.99)
    return TrainingState(model, OptimizerStep(optimizer, 1.0, sharded=is_sharded(model)), EMA(model, 0.9))


def full_tensors(state: TrainingState) -> dict[str, np.ndarray]:
    full = {n: t.full_tensor() if isinstance(t, DTensor) else t.clone() for n, t in state.tensors().items()}
    return arrays(full)


def write(context: DistributedContext, sizes: str, folder: Path) -> dict[str, np.ndarray]:
    state = state_of(context, sizes)
    for i, tensor in enumerate(state.tensors().values()):
        if local_shard(tensor).is_floating_point():
            local_shard(tensor).add_(i)
    write_checkpoint(folder, state.tensors(), {"step": 1}, context)
    return full_tensors(state)


def read(context: DistributedContext, sizes: str, folder: Path) -> dict[str, np.ndarray]:
    state = state_of(context, sizes)
    read_tensors(folder, state.tensors(), context)
    return full_tensors(state)


def write_all(context: DistributedContext, folder: Path) -> list[dict[str, np.ndarray]]:
    return [write(context, sizes, folder / sizes) for sizes in SIZES]


def read_all(context: DistributedContext, folders: list[Path]) -> tuple[list[dict[str, np.ndarray]], str]:
    """The tensors of every checkpoint, and the error for one of other sizes."""
    found = [read(context, sizes, folder / sizes) for folder in folders for sizes in SIZES]
    with pytest.raises(RunError) as caught:
        read(context, "even", folders[0] / "odd")
    return found, str(caught.value)


def test_any_number_of_ranks_reads_the_checkpoint_of_any(tmp_path: Path) -> None:
    expected, folders = [], [tmp_path / str(world_size) for world_size in (1, 2, 3)]
    for world_size, folder in enumerate(folders, 1):
        folder.mkdir()
        first, *others = rank_values(write_all, world_size, folder)
        assert all(equal(a, b) for other in others for a, b in zip(other, first, strict=True))
        assert {name.split(".")[0] for name in first[0]} == {"model", "optimizer", "ema"}
        expected += first
        assert sorted(path.name for path in folder.iterdir()) == sorted(SIZES)
    for world_size in (1, 2, 3):
        for found, error in rank_values(read_all, world_size, folders):
            assert all(equal(a, b) for a, b in zip(found, expected, strict=True)), world_size
            assert f"{folders[0] / 'odd'} does not fit this run: " in error


def write_with_full_disk(context: DistributedContext, folder: Path) -> tuple[str, list[str]]:
    """The error message when rank 1 cannot write its part, and what is left."""
    import allmlp.checkpointing.checkpoint as module

    state = state_of(context, "odd")
    original = module.file_digest

    def failing(path: Path) -> dict[str, Any]:
        if context.rank == 1 and path.name.startswith("shard-"):
            raise OSError(28, "No space left on device", str(path))
        return original(path)

    module.file_digest = failing
    try:
        write_checkpoint(folder, state.tensors(), {"step": 1}, context)
    except RunError as error:
        context.sum([0])
        return str(error), [path.name for path in folder.parent.iterdir()]
    return "", []


def test_a_part_that_cannot_be_written_is_an_error_on_all_ranks_and_leaves_nothing(tmp_path: Path) -> None:
    for message, left in rank_values(write_with_full_disk, 2, tmp_path / "step-1"):
        assert "rank 1: the checkpoint" in message
        assert "cannot be written (No space left on device)" in message
        assert left == []
