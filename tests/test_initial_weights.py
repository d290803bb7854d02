"""The authors' initial weights: their distribution, and what they depend on."""

import math

import pytest
import torch
from reference import small, weights_of
from torch import Tensor

from allmlp.factory import create
from allmlp.model import Mixer


def kernels(model: Mixer) -> dict[str, Tensor]:
    return {k: w for k, w in weights_of(model).items() if w.ndim > 1 and k != "head.weight"}


def test_initial_kernels_are_lecun_normal_truncated_at_two_sigma() -> None:
    model = Mixer(
        num_classes=10,
        image_size=(48, 40),
        patch_size=8,
        num_blocks=2,
        hidden_dim=96,
        tokens_mlp_dim=200,
        channels_mlp_dim=160,
        seed=3,
    )
    assert len(kernels(model)) == 1 + 2 * 4
    for name, kernel in kernels(model).items():
        n, std = kernel.numel(), math.prod(kernel.shape[1:]) ** -0.5
        cut = 2 * std / 0.87962566
        assert kernel.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n)), name
        assert abs(kernel.mean().item()) < 5 * std / math.sqrt(n), name
        assert 0.95 * cut < kernel.abs().max().item() <= cut * (1 + 1e-6), name


def test_other_initial_parameters_are_zeros_and_ones() -> None:
    for name, value in weights_of(small()).items():
        if name.endswith("bias") or name == "head.weight":
            assert (value == 0).all(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            assert value.std() > 0, name


def test_initial_weights_are_a_function_of_seed_and_name() -> None:
    torch.manual_seed(1)
    first, again, other = kernels(small(seed=7)), kernels(small(seed=7)), kernels(small(seed=8))
    for name, kernel in first.items():
        assert torch.equal(kernel, again[name]), name
        assert not torch.equal(kernel, other[name]), name
    assert not torch.equal(
        first["blocks.0.channel_mixing.dense_0.weight"], first["blocks.1.channel_mixing.dense_0.weight"]
    )


def test_more_blocks_or_classes_do_not_change_the_other_initial_weights() -> None:
    weights, larger = weights_of(small(num_blocks=2)), weights_of(small(num_blocks=4, num_classes=0))
    common = weights.keys() & larger.keys()
    assert len(common) == len(weights) - 2  # all but the head
    for name in common:
        assert torch.equal(weights[name], larger[name]), name


def test_without_a_seed_the_size_of_the_head_changes_no_other_weight() -> None:
    found = []
    for num_classes in (0, 5, 1000):
        torch.manual_seed(11)
        found.append((kernels(small(seed=None, num_classes=num_classes)), torch.rand(4)))
    (first, first_next), *others = found
    for weights, following in others:
        assert torch.equal(following, first_next)  # torch's generator ends in the same state, too
        assert all(torch.equal(first[name], weights[name]) for name in first)


def test_with_a_seed_torchs_generator_does_not_change() -> None:
    before = torch.get_rng_state()
    small(seed=1)
    create("S/32", num_classes=3, image_size=32, num_blocks=1, hidden_dim=8, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    small(seed=None)
    assert not torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_initial_weights_depend_on_torchs_generator() -> None:
    def stem(torch_seed: int | None = None) -> Tensor:
        if torch_seed is not None:
            torch.manual_seed(torch_seed)
        return small(seed=None).stem.weight.detach()

    first, following = stem(5), stem()
    assert torch.equal(first, stem(5))
    assert not torch.equal(first, following)
    assert not torch.equal(first, stem(6))
