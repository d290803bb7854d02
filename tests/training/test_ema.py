"""The average follows the weights from the first step on, and takes their place for an evaluation."""

import pytest
import torch
from reference import weights_of
from small_runs import same
from torch import Tensor, nn

from allmlp.training.ema import EMA


def model() -> nn.Module:
    """With a frozen layer in the middle."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2))
    made[1].requires_grad_(False)
    return made


def train_step(of: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in of.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
def test_it_starts_at_the_first_steps_weights_and_follows_them(decay: float) -> None:
    followed = model()
    average = EMA(followed, decay)
    by_hand: dict[str, Tensor] = {}
    for step in range(1, 8):
        train_step(followed, step)
        average.update()
        now = {name: w.double() for name, w in weights_of(followed).items()}
        by_hand = {n: decay * by_hand[n] + (1 - decay) * w for n, w in now.items()} if by_hand else now
        for name, tensor in average.tensors.items():
            assert torch.allclose(tensor.double(), by_hand[name], rtol=0, atol=1e-6), (step, name)
        if step == 1 or decay == 0:
            assert same(average.tensors, weights_of(followed))


def test_one_that_a_checkpoint_restored_goes_on() -> None:
    followed = model()
    average, restored = EMA(followed, 0.9), EMA(followed, 0.9)
    train_step(followed, 1)
    average.update()
    for name, tensor in average.tensors.items():
        restored.tensors[name].copy_(tensor)
    restored.started = True
    train_step(followed, 2)
    average.update()
    restored.update()
    assert same(average.tensors, restored.tensors)
    assert not same(average.tensors, weights_of(followed))


@pytest.mark.parametrize("fails", [False, True])
def test_it_takes_the_weights_place_within_the_block_and_only_there(fails: bool) -> None:
    followed = model()
    average = EMA(followed, 0.9)
    followed(torch.ones(2, 3)).sum().backward()
    for step in (1, 2):
        train_step(followed, step)
        average.update()
    trained, averaged = weights_of(followed), {name: t.clone() for name, t in average.tensors.items()}
    facts = [(p.data_ptr(), p.grad, p.requires_grad) for p in followed.parameters()]
    for _ in range(2):
        try:
            with average.swapped_in():
                assert same(weights_of(followed), averaged)
                assert same(average.tensors, trained)
                if fails:
                    raise KeyError
        except KeyError:
            pass
        assert same(weights_of(followed), trained)
        assert same(average.tensors, averaged)
    for p, (pointer, grad, trains) in zip(followed.parameters(), facts, strict=True):
        assert p.data_ptr() == pointer  # what an optimizer or a graph knows stays valid
        assert p.grad is grad
        assert p.requires_grad == trains
    assert not any(tensor.requires_grad for tensor in average.tensors.values())
    average.swap()
    assert same(weights_of(followed), averaged)
