"""A training state is restored completely from a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
from small_runs import CLASSES, recipe, same

from allmlp.checkpointing.checkpoint import verify_checkpoint, write_checkpoint
from allmlp.distributed.context import SINGLE_PROCESS
from allmlp.runs.resume import Checkpoint
from allmlp.training.build import build_initializer, build_optimizer
from allmlp.training.ema import EMA
from allmlp.training.optimizer_step import OptimizerStep
from allmlp.training.state import TrainingState


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [({}, "exp_avg exp_avg_sq step"), ({"optimizer": "sgd"}, "momentum_buffer"), ({"momentum": 0.0}, "")],
    ids=["adamw", "sgd", "no momentum"],
)
def test_weights_moments_average_and_scaler_are_restored(changes: dict[str, Any], kinds: str, tmp_path: Path) -> None:
    """test_interrupted_runs.py shows that training goes on the same."""
    settings = recipe(**{"optimizer": "sgd"} | changes) if "momentum" in changes else recipe(**changes)

    def make() -> TrainingState:
        model = build_initializer(settings)(CLASSES)
        step = OptimizerStep(build_optimizer(settings.optimization, model), 1.0, float16=True)
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
