"""When the training step is compiled, and what happens where it cannot be."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from allmlp.errors import RunError
from allmlp.model import Mixer
from allmlp.training.compilation import WORTHWHILE_FLOP, compile_model

MANY = 1e18


def tiny() -> Mixer:
    sizes = {"num_classes": 3, "image_size": 4, "patch_size": 2, "num_blocks": 1, "hidden_dim": 8}
    return Mixer(**sizes, tokens_mlp_dim=6, channels_mlp_dim=16, seed=0)


def compile_it(model: Mixer, mode: Any, flop: float = MANY) -> Callable[[Tensor, Tensor], Tensor]:
    cpu = torch.device("cpu")
    return compile_model(model, mode, batch_size=5, training_flop=flop, device=cpu, precision=torch.float32)[0]


class NoCompiler(TorchDynamoException):
    """As where there is no C++ compiler."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """torch.compile that works: the images and keys it was warmed up with."""
    seen: list[tuple[Tensor, Tensor]] = []

    def fake(model: Mixer) -> Callable[[Tensor, Tensor], Tensor]:
        def forward(images: Tensor, keys: Tensor) -> Tensor:
            seen.append((images, keys))
            return model(images, keys)

        return forward

    monkeypatch.setattr(torch, "compile", fake)
    return seen


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile that fails when the model is first called."""

    def fake(model: Mixer) -> Callable[[Tensor, Tensor], Tensor]:
        def forward(images: Tensor, keys: Tensor) -> Tensor:
            raise NoCompiler("\nno compiler found\nand many more lines")

        return forward

    monkeypatch.setattr(torch, "compile", fake)


def test_off_is_the_model_itself(calls: list[tuple[Tensor, Tensor]]) -> None:
    model = tiny()
    assert compile_it(model, "off") is model
    assert calls == []


def test_auto_leaves_a_short_run_alone(calls: list[tuple[Tensor, Tensor]]) -> None:
    model = tiny()
    assert compile_it(model, "auto", flop=WORTHWHILE_FLOP["cpu"] * 0.99) is model
    assert calls == []


@pytest.mark.parametrize(("mode", "flop"), [("auto", WORTHWHILE_FLOP["cpu"] * 1.01), ("on", MANY), ("on", 0.0)])
def test_a_compiled_model_is_warmed_up_on_a_batch_of_its_size(
    calls: list[tuple[Tensor, Tensor]], mode: str, flop: float
) -> None:
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    forward = compile_it(model, mode, flop)
    assert forward is not model
    assert [(tuple(images.shape), tuple(keys.shape), keys.dtype) for images, keys in calls] == [
        ((5, 3, 4, 4), (5,), torch.int64)
    ]
    assert all(p.grad is None for p in model.parameters())  # the warm-up leaves nothing behind
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    images, keys = torch.rand(5, 3, 4, 4), torch.arange(5)
    assert torch.equal(forward(images, keys), model(images, keys))


def test_auto_trains_without_a_compiler_that_does_not_work(broken: None, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny()
    with caplog.at_level(logging.WARNING, "allmlp"):
        assert compile_it(model, "auto") is model
    assert [record.getMessage() for record in caplog.records] == [
        "torch.compile does not work here (no compiler found): training without it, slower"
    ]
    assert all(p.grad is None for p in model.parameters())


def test_on_fails_with_a_compiler_that_does_not_work(broken: None) -> None:
    with pytest.raises(
        RunError, match=r"^torch\.compile failed \(no compiler found\): install a C\+\+ compiler, or use"
    ):
        compile_it(tiny(), "on")


def test_a_compiler_that_fails_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(model: Mixer) -> Callable[[Tensor, Tensor], Tensor]:
        def forward(images: Tensor, keys: Tensor) -> Tensor:
            raise NoCompiler

        return forward

    monkeypatch.setattr(torch, "compile", fake)
    model = tiny()
    assert compile_it(model, "auto") is model


def test_errors_of_the_model_are_not_taken_for_the_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(model: Mixer) -> Callable[[Tensor, Tensor], Tensor]:
        def forward(images: Tensor, keys: Tensor) -> Tensor:
            raise ZeroDivisionError("ours")

        return forward

    monkeypatch.setattr(torch, "compile", fake)
    with pytest.raises(ZeroDivisionError, match="ours"):
        compile_it(tiny(), "auto")
