"""The Polyak average beside the weights: followed step by step, shown, and put back, to the bit."""

import pytest
import torch
from torch import Tensor, nn

from allmlp.training.ema import EMA


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2))
    made[1].requires_grad_(False)
    return made


def weights(of: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in of.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def change(of: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in of.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.9999])
def test_it_follows_from_the_first_step_on(decay: float) -> None:
    followed = model()
    average = EMA(followed, decay)
    by_hand: dict[str, Tensor] = {}
    for step in range(1, 8):
        change(followed, step)
        average.update()
        now = {name: w.double() for name, w in weights(followed).items()}
        by_hand = {n: decay * by_hand[n] + (1 - decay) * w for n, w in now.items()} if by_hand else now
        for name, tensor in average.tensors.items():
            assert torch.allclose(tensor.double(), by_hand[name], rtol=0, atol=1e-6), (step, name)
    if decay == 0:
        assert same(average.tensors, weights(followed))


def test_the_first_step_is_taken_whole() -> None:
    """The initial weights have no part in it."""
    followed = model()
    average = EMA(followed, 0.99)
    change(followed, 1)
    average.update()
    assert same(average.tensors, weights(followed))


def test_a_started_one_is_not_started_again() -> None:
    """As after a checkpoint was loaded into it."""
    followed = model()
    average, again = EMA(followed, 0.9), EMA(followed, 0.9)
    for step in (1, 2, 3):
        change(followed, step)
        average.update()
    for name, tensor in average.tensors.items():
        again.tensors[name].copy_(tensor)
    again.started = True
    change(followed, 4)
    average.update()
    again.update()
    assert same(average.tensors, again.tensors)
    assert not same(average.tensors, weights(followed))


@pytest.mark.parametrize("fails", [False, True])
def test_shown_and_put_back_bit_for_bit(fails: bool) -> None:
    followed = model()
    average = EMA(followed, 0.9)
    for step in (1, 2):
        change(followed, step)
        average.update()
    trained, averaged = weights(followed), {name: t.clone() for name, t in average.tensors.items()}
    places = [p.data_ptr() for p in followed.parameters()]
    for _ in range(3):
        try:
            with average.swapped_in():
                assert same(weights(followed), averaged)
                assert same(average.tensors, trained)
                if fails:
                    raise KeyError
        except KeyError:
            pass
        assert same(weights(followed), trained)
        assert same(average.tensors, averaged)
    assert [p.data_ptr() for p in followed.parameters()] == places  # what an optimizer or a graph knows stays valid
    average.swap()
    assert same(weights(followed), averaged)


def test_gradients_and_what_is_frozen_are_left_alone() -> None:
    followed = model()
    frozen = weights(followed)["1.weight"]
    average = EMA(followed, 0.5)
    followed(torch.ones(2, 3)).sum().backward()
    gradients = [p.grad for p in followed.parameters()]
    for step in (1, 2):
        change(followed, step)
        average.update()
    with average.swapped_in():
        assert [p.requires_grad for p in followed.parameters()] == [True, True, False, False, True, True]
    assert all(p.grad is g for p, g in zip(followed.parameters(), gradients, strict=True))
    assert torch.equal(average.tensors["1.weight"], frozen)
    assert not any(tensor.requires_grad for tensor in average.tensors.values())
