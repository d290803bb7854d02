"""A training state is restored completely from a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import CLASSES, recipe, same

from allmlp.checkpointing.checkpoint import verify_checkpoint, write_checkpoint
from allmlp.distributed.context import SINGLE_PROCESS
from allmlp.runs.resume import Checkpoint
from allmlp.training.build import build_initializer, build_optimizer
from allmlp.training.ema import EMA
from allmlp.training.optimizer_step import OptimizerStep
from allmlp.training.state import TrainingState


@pytest.mark.parametrize("changes", [{}, {"optimizer": "sgd"}, {"ema_decay": 0.9}], ids=str)
@pytest.mark.parametrize("float16", [False, True])
def test_the_whole_training_state_is_restored(changes: dict[str, Any], float16: bool, tmp_path: Path) -> None:
    def make(seed: int) -> TrainingState:
        settings = recipe(seed=seed, **changes)
        model = build_initializer(settings)(CLASSES)
        optimizer_step = OptimizerStep(build_optimizer(settings.optimization, model), 1.0, float16=float16)
        ema = None if settings.optimization.ema_decay is None else EMA(model, 0.9)
        return TrainingState(model, optimizer_step, ema)

    def step(state: TrainingState, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(4, 3, 8, 8, generator=generator)
        state.optimizer_step.set_learning_rate(0.01)
        loss = state.model(images).square().mean()
        state.optimizer_step.backward(loss)
        state.optimizer_step(number, loss.detach())
        state.update_ema()

    before = make(0)
    for number in (1, 2, 3):
        step(before, number)
    scaler = before.optimizer_step.scaler
    if float16:
        scaler.load_state_dict(scaler.state_dict() | {"scale": 1024.0})
    before.optimizer_step.overflows.fill_(5)
    write_checkpoint(tmp_path / "c", before.tensors(), before.json_state() | {"step": 3}, SINGLE_PROCESS)
    after = make(1)
    checkpoint = Checkpoint(tmp_path / "c", verify_checkpoint(tmp_path / "c"))
    assert checkpoint.state["step"] == 3
    after.load(checkpoint, SINGLE_PROCESS)
    assert same(before.tensors(), after.tensors())
    assert after.optimizer_step.scaler.state_dict() == scaler.state_dict()
    assert float(after.optimizer_step.overflows) == 5
    kinds = {"model", "optimizer"} | ({"ema"} if "ema_decay" in changes else set())
    assert {key.split(".")[0] for key in before.tensors()} == kinds
    for number in (4, 5):
        for state in (before, after):
            step(state, number)
    assert same(before.tensors(), after.tensors())
    assert after.json_state() == before.json_state()
