"""When the training step is compiled, in which form, and what happens where it cannot be."""

import copy
import functools
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import close, gelu_tanh, weights_of
from small_runs import CPU, same
from tiny_models import NOISY, tiny, tiny_images
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from allmlp.errors import RunError
from allmlp.model import Mixer
from allmlp.rng import sample_keys
from allmlp.training.compilation import (
    CACHE,
    WORTHWHILE_FLOP,
    compile_blocks,
    compile_model,
    ensure_cache,
    gelu_by_sigmoid,
    install_fast_mlps,
    restore_eager,
)
from allmlp.training.memory import recompute_blocks
from allmlp.training.step import Forward

LONG_RUN = 1e18  # FLOP


def compile_it(model: Mixer, mode: Any, flop: float = LONG_RUN) -> Forward:
    return compile_model(model, mode, batch_size=5, training_flop=flop, device=CPU, precision=torch.float32)[0]


class NoCompiler(TorchDynamoException):
    """What torch.compile raises without a C++ compiler."""


def fake_compiler(patch: pytest.MonkeyPatch, on_call: Callable[[Tensor, Tensor], None]) -> None:
    """Replaces torch.compile by one that calls a function with the images and keys before each forward pass."""

    def compiled(model: Mixer) -> Forward:
        def forward(images: Tensor, keys: Tensor) -> Tensor:
            on_call(images, keys)
            return model(images, keys)

        return forward

    patch.setattr(torch, "compile", compiled)


def raising(error: Exception) -> Callable[[Tensor, Tensor], None]:
    def on_call(images: Tensor, keys: Tensor) -> None:
        raise error

    return on_call


def test_a_cache_that_cannot_be_written_is_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    for folder, kept in ((tmp_path / "new" / "cache", True), (tmp_path / "file" / "cache", False)):
        monkeypatch.setenv(CACHE, str(folder))
        ensure_cache()
        assert (os.environ[CACHE] == str(folder)) is kept
        assert os.access(os.environ[CACHE], os.W_OK)
        assert (str(folder) in caplog.text) is not kept


def instance_forwards(model: Mixer) -> list[str]:
    """The modules whose forward pass is not their class's."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize(
    ("mode", "flop", "compiles"),
    [
        ("off", LONG_RUN, False),
        ("auto", WORTHWHILE_FLOP["cpu"] * 0.99, False),
        ("auto", WORTHWHILE_FLOP["cpu"] * 1.01, True),
        ("on", 0.0, True),
    ],
)
def test_a_long_run_is_compiled_and_warmed_up_on_a_batch_of_its_size(
    mode: str, flop: float, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    fake_compiler(monkeypatch, lambda images, keys: calls.append((tuple(images.shape), tuple(keys.shape), keys.dtype)))
    model = tiny()
    forward = compile_it(model, mode, flop)
    assert (forward is model) == (not compiles)
    assert calls == ([((5, 3, 4, 4), (5,), torch.int64)] if compiles else [])
    assert all(p.grad is None for p in model.parameters())  # the warm-up leaves nothing behind
    assert same(weights_of(model), weights_of(tiny()))
    assert torch.equal(forward(tiny_images(), torch.arange(5)), model(tiny_images(), torch.arange(5)))


@pytest.mark.parametrize(
    ("error", "reason"),
    [(NoCompiler("\nno compiler found\nand many more lines"), "no compiler found"), (NoCompiler(), "NoCompiler")],
    ids=["with a message", "without"],
)
def test_a_compiler_that_fails_is_an_error_if_it_was_asked_for_else_a_warning(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_compiler(monkeypatch, raising(error))
    model = tiny()
    with caplog.at_level(logging.WARNING, "allmlp"):
        assert compile_it(model, "auto") is model
    (message,) = caplog.messages
    assert f"torch.compile does not work here ({reason})" in message
    assert instance_forwards(model) == []
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RunError, match=rf"torch\.compile failed \({reason}\): .* --compile off"):
        compile_it(tiny(), "on")


def test_errors_of_the_model_are_not_reported_as_the_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(monkeypatch, raising(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError, match="ours"):
        compile_it(tiny(), "auto")


# The form that is compiled


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The graphs that torch.compile traces; they are run as they are, without a C++ compiler."""
    found: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable:
        found.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return found


def code_of(graph: torch.fx.GraphModule) -> str:
    """Of the graph and those within it."""
    return "\n".join(module.code for module in graph.modules() if isinstance(module, torch.fx.GraphModule))


def gradients(model: Mixer, forward: Forward) -> list[Tensor]:
    logits = forward(tiny_images(), sample_keys(3, torch.arange(5)))
    return [logits.detach(), *torch.autograd.grad(logits.logsumexp(1).sum(), list(model.parameters()))]


def compile_whole(model: Mixer) -> Forward:
    return compile_it(model, "on")


def compile_each_block(model: Mixer) -> Forward:
    """As each of several processes does."""
    install_fast_mlps(model)
    compile_blocks(model)
    return model.train()


COMPILERS = pytest.mark.parametrize("compile_", [compile_whole, compile_each_block])


def make(recompute: bool = False, **options: Any) -> Mixer:
    model = tiny(**options)
    if recompute:
        recompute_blocks(model)
    return model


def test_gelu_by_sigmoid_and_its_gradient_are_those_of_the_tanh_form() -> None:
    x = torch.linspace(-12, 12, 2001, dtype=torch.float64, requires_grad=True)
    found, expected = gelu_by_sigmoid(x), torch.nn.functional.gelu(x, approximate="tanh")
    assert close(found.detach(), gelu_tanh(x.detach().numpy()), 1e-12)
    slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (found, expected)]
    assert close(slopes[0], slopes[1], 1e-12)


@COMPILERS
@pytest.mark.parametrize(("gelu", "recompute"), [("tanh", False), ("tanh", True), ("erf", False)])
def test_a_compiled_step_uses_the_sigmoid_and_recomputes_it_in_the_backward_pass(
    compile_: Callable, gelu: str, recompute: bool, graphs: list[torch.fx.GraphModule]
) -> None:
    model, plain = make(recompute, gelu=gelu, **NOISY), tiny(gelu=gelu, **NOISY)
    found, expected = gradients(model, compile_(model)), gradients(plain, plain.train())
    assert all(close(a, b, 1e-5) for a, b in zip(found, expected, strict=True))
    code = "\n".join(code_of(graph) for graph in graphs)
    assert ("sigmoid" in code) == (gelu == "tanh")
    assert ("gelu" in code) == (gelu == "erf")
    assert "checkpoint" in code


@pytest.mark.parametrize(
    ("compile_", "recompute", "restored"),
    [
        (compile_whole, False, False),
        (compile_whole, True, True),
        (compile_each_block, False, True),
        (compile_each_block, True, True),
    ],
)
def test_the_model_itself_is_eager_beside_its_compiled_step_and_when_restored(
    compile_: Callable, recompute: bool, restored: bool, graphs: list[torch.fx.GraphModule]
) -> None:
    model, plain = make(recompute, **NOISY), tiny(**NOISY)
    compile_(model)
    assert instance_forwards(model)
    if restored:
        restore_eager(model)
        assert instance_forwards(model) == []
    traced = len(graphs)
    for mode in (True, False):
        found, expected = gradients(model, model.train(mode)), gradients(plain, plain.train(mode))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(graphs) == traced


@COMPILERS
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("restored", [False, True])
def test_exported_graphs_hold_the_plain_gelu(
    restored: bool, strict: bool, compile_: Callable, graphs: list[torch.fx.GraphModule]
) -> None:
    model = tiny()
    gradients(model, compile_(model))
    if restored:
        restore_eager(model)
    for training in (False, True):
        exported = torch.export.export(model.train(training), (tiny_images(),), strict=strict)
        code = code_of(exported.graph_module)
        assert code.count("aten.gelu.default") == 4
        assert "sigmoid" not in code
        assert "checkpoint" not in code
        expected = tiny().train(training)(tiny_images())
        assert close(exported.module()(tiny_images()).detach(), expected.detach(), 1e-5)


@COMPILERS
@pytest.mark.parametrize("recompute", [False, True])
def test_copies_compute_with_their_own_weights(
    recompute: bool, compile_: Callable, graphs: list[torch.fx.GraphModule]
) -> None:
    model, copies = make(recompute, **NOISY), []
    forward = compile_(model)
    copies.append(copy.deepcopy(model))
    gradients(model, forward)
    copies += [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    restore_eager(model)
    expected = tiny(**NOISY).eval()(tiny_images())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for copied in copies:
        assert close(copied.eval()(tiny_images()).detach(), expected.detach(), 1e-5)
        assert sum(g.abs().sum() for g in gradients(copied.train(), copied)) > 0
    assert (model.eval()(tiny_images()) == 0).all()
