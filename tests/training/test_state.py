"""A training state is restored completely from a checkpoint, and lends the model its averaged weights."""

from pathlib import Path
from typing import Any

import pytest
from reference import weights_of
from small_runs import CLASSES, recipe, same
from tiny_models import tiny, tiny_images

from allmlp.checkpointing.checkpoint import verify_checkpoint, write_checkpoint
from allmlp.distributed.context import SINGLE_PROCESS
from allmlp.runs.resume import Checkpoint
from allmlp.training.build import build_initializer, build_optimizer
from allmlp.training.ema import EMA
from allmlp.training.optimizer_step import OptimizerStep
from allmlp.training.state import TrainingState


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, "exp_avg exp_avg_sq step"),
        ({"optimizer": "sgd"}, "momentum_buffer"),
        ({"optimizer": "sgd", "momentum": 0.0}, ""),
    ],
    ids=["adamw", "sgd", "no momentum"],
)
def test_weights_moments_average_and_scaler_are_restored(changes: dict[str, Any], kinds: str, tmp_path: Path) -> None:
    """test_interrupted_runs.py shows that training continues the same."""

    def make() -> TrainingState:
        model = build_initializer(recipe(**changes))(CLASSES)
        step = OptimizerStep(build_optimizer(recipe(**changes).optimization, model), 1.0, float16=True)
        return TrainingState(model, step, EMA(model, 0.9))

    before, after = make(), make()
    for number, tensor in enumerate(before.tensors().values()):
        tensor.fill_(number + 0.5)
    before.optimizer_step.overflows.fill_(5)
    scaler = before.optimizer_step.scaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": 1024.0})
    write_checkpoint(tmp_path / "c", before.tensors(), before.json_state() | {"step": 3}, SINGLE_PROCESS)
    after.load(Checkpoint(tmp_path / "c", verify_checkpoint(tmp_path / "c")), SINGLE_PROCESS)
    assert same(before.tensors(), after.tensors())
    assert after.json_state() == before.json_state()
    assert float(after.optimizer_step.overflows) == 5
    assert after.ema is not None
    assert after.ema.started
    names = {name for name, _ in before.model.named_parameters()}
    expected = {f"{part}.{name}" for part in ("model", "ema") for name in names}
    assert before.tensors().keys() == expected | {f"optimizer.{n}.{kind}" for n in names for kind in kinds.split()}


@pytest.mark.parametrize("fails", [False, True])
def test_averages_take_the_weights_place_within_the_block_and_only_there(fails: bool) -> None:
    model = tiny()
    model.stem.requires_grad_(False)
    average = EMA(model, 0.9)
    model(tiny_images()).sum().backward()
    trained = weights_of(model)
    averaged = {name: tensor.add_(1).clone() for name, tensor in average.tensors.items()}
    facts = [(p.data_ptr(), p.grad, p.requires_grad) for p in model.parameters()]
    for _ in range(2):
        try:
            with average.swapped_in():
                assert same(weights_of(model), averaged)
                assert same(average.tensors, trained)
                if fails:
                    raise KeyError
        except KeyError:
            pass
        assert same(weights_of(model), trained)
        assert same(average.tensors, averaged)
    for p, (pointer, grad, trains) in zip(model.parameters(), facts, strict=True):
        assert p.data_ptr() == pointer  # what an optimizer or a graph knows stays valid
        assert p.grad is grad
        assert p.requires_grad == trains
    assert not any(tensor.requires_grad for tensor in average.tensors.values())
