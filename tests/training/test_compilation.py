"""When the training step is compiled, in which form, and what happens where it cannot be."""

import copy
import functools
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import close, gelu_tanh
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from allmlp.errors import RunError
from allmlp.model import Mixer
from allmlp.rng import sample_keys
from allmlp.training.compilation import (
    WORTHWHILE_FLOP,
    compile_blocks,
    compile_model,
    gelu_by_sigmoid,
    install_fast_mlps,
    restore_eager,
)
from allmlp.training.memory import recompute_blocks

MANY = 1e18


def tiny() -> Mixer:
    sizes = {"num_classes": 3, "image_size": 4, "patch_size": 2, "num_blocks": 1, "hidden_dim": 8}
    return Mixer(**sizes, tokens_mlp_dim=6, channels_mlp_dim=16, seed=0)


def compile_it(model: Mixer, mode: Any, flop: float = MANY) -> Callable[[Tensor, Tensor], Tensor]:
    cpu = torch.device("cpu")
    return compile_model(model, mode, batch_size=5, training_flop=flop, device=cpu, precision=torch.float32)[0]


class NoCompiler(TorchDynamoException):
    """What torch.compile raises without a C++ compiler."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """A torch.compile that works; the images and keys it was called with."""
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
    """A torch.compile that fails when the model is first called."""

    def fake(model: Mixer) -> Callable[[Tensor, Tensor], Tensor]:
        def forward(images: Tensor, keys: Tensor) -> Tensor:
            raise NoCompiler("\nno compiler found\nand many more lines")

        return forward

    monkeypatch.setattr(torch, "compile", fake)


def test_off_returns_the_model_itself(calls: list[tuple[Tensor, Tensor]]) -> None:
    model = tiny()
    assert compile_it(model, "off") is model
    assert calls == []


def test_auto_does_not_compile_a_short_run(calls: list[tuple[Tensor, Tensor]]) -> None:
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


def test_auto_continues_without_a_compiler_that_fails(broken: None, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny()
    with caplog.at_level(logging.WARNING, "allmlp"):
        assert compile_it(model, "auto") is model
    assert instance_forwards(model) == []
    assert [record.getMessage() for record in caplog.records] == [
        "torch.compile does not work here (no compiler found): training without it, slower"
    ]
    assert all(p.grad is None for p in model.parameters())


def test_on_raises_with_a_compiler_that_fails(broken: None) -> None:
    with pytest.raises(
        RunError, match=r"^torch\.compile failed \(no compiler found\): install a C\+\+ compiler, or use"
    ):
        compile_it(tiny(), "on")


def test_a_compiler_that_fails_without_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(model: Mixer) -> Callable[[Tensor, Tensor], Tensor]:
        def forward(images: Tensor, keys: Tensor) -> Tensor:
            raise NoCompiler

        return forward

    monkeypatch.setattr(torch, "compile", fake)
    model = tiny()
    assert compile_it(model, "auto") is model


def test_errors_of_the_model_are_not_reported_as_the_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(model: Mixer) -> Callable[[Tensor, Tensor], Tensor]:
        def forward(images: Tensor, keys: Tensor) -> Tensor:
            raise ZeroDivisionError("ours")

        return forward

    monkeypatch.setattr(torch, "compile", fake)
    with pytest.raises(ZeroDivisionError, match="ours"):
        compile_it(tiny(), "auto")


# The form that is compiled

NOISY = {"dropout": 0.3, "stochastic_depth": 0.6}


def larger(seed: int = 0, **options: Any) -> Mixer:
    sizes = {"num_classes": 3, "image_size": 4, "patch_size": 2, "num_blocks": 2, "hidden_dim": 8}
    model = Mixer(**sizes, tokens_mlp_dim=6, channels_mlp_dim=16, seed=seed, **options)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(seed))
    return model


def images() -> Tensor:
    return torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def instance_forwards(model: Mixer) -> list[str]:
    """The modules whose forward pass is not their class's."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


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


def gradients(model: Mixer, forward: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    logits = forward(images(), sample_keys(3, torch.arange(5)))
    return [logits.detach(), *torch.autograd.grad(logits.logsumexp(1).sum(), list(model.parameters()))]


def compile_whole(model: Mixer) -> Callable[[Tensor, Tensor], Tensor]:
    return compile_it(model, "on")


def compile_each_block(model: Mixer) -> Callable[[Tensor, Tensor], Tensor]:
    """As each of several processes does."""
    install_fast_mlps(model)
    compile_blocks(model)
    return model.train()


COMPILERS = pytest.mark.parametrize("compile_", [compile_whole, compile_each_block])


def test_gelu_by_sigmoid_and_its_gradient_are_those_of_the_tanh_form() -> None:
    x = torch.linspace(-12, 12, 2001, dtype=torch.float64, requires_grad=True)
    found, expected = gelu_by_sigmoid(x), torch.nn.functional.gelu(x, approximate="tanh")
    assert close(found.detach(), gelu_tanh(x.detach().numpy()), 1e-12)
    slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (found, expected)]
    assert close(slopes[0], slopes[1], 1e-12)


@COMPILERS
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_a_compiled_step_uses_the_sigmoid_and_computes_it_again_in_the_backward_pass(
    compile_: Callable, gelu: str, recompute: bool, graphs: list[torch.fx.GraphModule]
) -> None:
    model, plain = larger(gelu=gelu, **NOISY), larger(gelu=gelu, **NOISY).train()
    if recompute:
        recompute_blocks(model)
    found = gradients(model, compile_(model))
    for a, b in zip(found, gradients(plain, plain), strict=True):
        assert close(a, b, 1e-5)
    code = "\n".join(code_of(graph) for graph in graphs)
    assert ("sigmoid" in code) == (gelu == "tanh")
    assert ("gelu" in code) == (gelu == "erf")
    assert "checkpoint" in code


def test_the_model_itself_stays_eager_beside_its_compiled_step(graphs: list[torch.fx.GraphModule]) -> None:
    model, plain = larger(**NOISY), larger(**NOISY)
    compile_whole(model)
    traced = len(graphs)
    for mode in (True, False):
        for a, b in zip(gradients(model.train(mode), model), gradients(plain.train(mode), plain), strict=True):
            assert torch.equal(a, b)
    assert len(graphs) == traced


@COMPILERS
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("state", ["plain", "compiled", "restored"])
def test_exported_graphs_hold_the_plain_gelu(
    state: str, training: bool, strict: bool, compile_: Callable, graphs: list[torch.fx.GraphModule]
) -> None:
    model = larger()
    if state != "plain":
        gradients(model, compile_(model))
    if state == "restored":
        restore_eager(model)
    exported = torch.export.export(model.train(training), (images(),), strict=strict)
    code = code_of(exported.graph_module)
    assert code.count("aten.gelu.default") == 4
    assert "sigmoid" not in code
    assert "checkpoint" not in code
    assert close(exported.module()(images()).detach(), larger().train(training)(images()).detach(), 1e-5)


@COMPILERS
@pytest.mark.parametrize("recompute", [False, True])
def test_restored_the_model_is_as_it_was(
    recompute: bool, compile_: Callable, graphs: list[torch.fx.GraphModule]
) -> None:
    model, plain = larger(**NOISY), larger(**NOISY).train()
    if recompute:
        recompute_blocks(model)
    compile_(model)
    assert instance_forwards(model)
    restore_eager(model)
    assert instance_forwards(model) == []
    traced = len(graphs)
    for a, b in zip(gradients(model, model.train()), gradients(plain, plain), strict=True):
        assert torch.equal(a, b)
    assert len(graphs) == traced


@COMPILERS
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("recompute", [False, True])
def test_copies_compute_with_their_own_weights(
    recompute: bool, duplicate: Callable, compile_: Callable, graphs: list[torch.fx.GraphModule]
) -> None:
    model = larger(**NOISY)
    if recompute:
        recompute_blocks(model)
    copies = [duplicate(model)]
    forward = compile_(model)
    copies.append(duplicate(model))
    gradients(model, forward)
    copies.append(duplicate(model))
    restore_eager(model)
    copies.append(duplicate(model))
    expected = larger(**NOISY).eval()(images())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for copied in copies:
        assert close(copied.eval()(images()).detach(), expected.detach(), 1e-5)
        assert sum(g.abs().sum() for g in gradients(copied.train(), copied)) > 0
    assert (model.eval()(images()) == 0).all()
