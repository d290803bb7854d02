"""Dropout and stochastic depth: rates, independence, and masks that belong to a sample."""

import math

import numpy as np
import pytest
import torch
from reference import close, gelu_erf, random_images, random_model, small
from torch import Tensor

from allmlp import rng
from allmlp.model import MixerBlock, MlpBlock
from allmlp.rng import sample_keys


def mark_branches(block: MixerBlock) -> MixerBlock:
    """Makes the token branch add 1 and the channel branch 10, so that the sum shows which of them were kept."""
    with torch.no_grad():
        for mlp, value in ((block.token_mixing, 1.0), (block.channel_mixing, 10.0)):
            mlp.dense_1.weight.zero_()
            mlp.dense_1.bias.fill_(value)
    return block.double().train()


def kept_marks(block: MixerBlock, batch: int, seed: int | None = None) -> Tensor:
    """(batch,) sums of the marks of the branches that are kept; fails if a branch is kept for part of an image."""
    tokens, channels = block.token_mixing.dense_0.in_features, block.channel_mixing.dense_0.in_features
    with torch.no_grad():
        keys = None if seed is None else sample_keys(seed, torch.arange(batch))
        out = mark_branches(block)(torch.zeros(batch, tokens, channels, dtype=torch.float64), keys)
    assert (out == out[:, :1, :1]).all()
    return out[:, 0, 0]


def within(count: Tensor | int, n: int, p: float) -> bool:
    """Whether a binomial count lies within five standard deviations of its mean."""
    return abs(int(count) - n * p) <= 5 * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("seed", [None, 0, 1, 2**31 - 1])
@pytest.mark.parametrize("rescale", [False, True])
def test_branches_are_dropped_per_image_and_independently(rescale: bool, seed: int | None) -> None:
    torch.manual_seed(0)
    n, p = 20_000, 0.3
    block = MixerBlock(4, 6, 5, 7, drop_path=p, rescale=rescale)
    scale = 1 / (1 - p) if rescale else 1
    sums = kept_marks(block, n, seed)
    token = (sums - scale).abs().lt(1e-9) | (sums - 11 * scale).abs().lt(1e-9)
    channel = (sums - 10 * scale).abs().lt(1e-9) | (sums - 11 * scale).abs().lt(1e-9)
    assert (token | channel | (sums == 0)).all()
    assert within(token.sum(), n, 1 - p)
    assert within(channel.sum(), n, 1 - p)
    assert within((token & channel).sum(), n, (1 - p) ** 2)
    assert within((~token & ~channel).sum(), n, p**2)
    assert sums.mean().item() == pytest.approx(11 if rescale else 11 * (1 - p), rel=0.02)


@pytest.mark.parametrize("seed", [None, 0, 1, 2**31 - 1])
@pytest.mark.parametrize("rescale", [False, True])
def test_stochastic_depth_rises_linearly_from_zero_over_the_blocks(rescale: bool, seed: int | None) -> None:
    torch.manual_seed(0)
    n = 8000
    model = small(num_blocks=4, stochastic_depth=0.6, rescale=rescale, image_size=8)
    for block, rate in zip(model.blocks, (0, 0.2, 0.4, 0.6), strict=True):
        sums = kept_marks(block, n, seed)
        marks = (sums * (1 - rate) if rescale else sums).round()  # 0, 1, 10 or 11
        for branch in (marks % 10 == 0, marks < 10):  # where the token branch's 1 is missing, the channel branch's 10
            assert branch.sum() == 0 if rate == 0 else within(branch.sum(), n, rate)
        assert (sums == 0).sum() == 0 if rate == 0 else within((sums == 0).sum(), n, rate**2)
        assert sums.max().item() == pytest.approx(11 / (1 - rate) if rescale else 11)


def test_blocks_drop_images_independently() -> None:
    n, rate = 8000, 0.5
    model = small(num_blocks=5, stochastic_depth=rate, image_size=8)
    for block in model.blocks:
        block.token_drop_path.rate = block.channel_drop_path.rate = rate
    dropped = [kept_marks(block, n, seed=4) == 0 for block in model.blocks]
    for i, first in enumerate(dropped):
        for second in dropped[:i]:
            assert within((first & second).sum(), n, rate**4)


def test_each_mask_of_the_model_has_a_different_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = []

    def uniform(keys: Tensor, stream: int, like: Tensor) -> Tensor:
        streams.append((stream, tuple(like.shape)))
        return rng.uniform(keys, stream, like)

    monkeypatch.setattr("allmlp.dropout.uniform", uniform)
    model = small(dropout=0.1, stochastic_depth=0.5).train()  # 9 tokens, 16 channels
    model(torch.zeros(2, 3, 12, 12), torch.arange(2))
    assert len({stream for stream, _ in streams}) == len(streams) == 3 * 4 + 2 * 2  # the first block drops no branch
    block = [(2, 16, 10), (2, 16, 9), (2, 1, 1), (2, 9, 24), (2, 9, 16), (2, 1, 1)]
    assert [shape for _, shape in streams] == [s for s in block if s != (2, 1, 1)] + block + block


@pytest.mark.parametrize("options", [{"dropout": 0.4}, {"stochastic_depth": 0.6}, {"dropout": 0.2, "rescale": True}])
def test_an_images_masks_depend_on_its_key_and_not_on_the_batch(options: dict) -> None:
    model = random_model(**options).train()
    images, keys = random_images(model, 16), sample_keys(0, torch.arange(16))
    with torch.no_grad():
        whole = model(images, keys)
        assert torch.equal(model(images, keys), whole)
        order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
        assert close(model(images[order], keys[order]), whole[order], 1e-12)
        assert close(torch.cat([model(images[i : i + 4], keys[i : i + 4]) for i in range(0, 16, 4)]), whole, 1e-12)
        assert not close(model(images, keys.roll(1)), whole, 1e-3)
        assert torch.equal(model.eval()(images, keys), model(images))  # in evaluation they have no effect


def test_stochastic_depth_of_a_single_block_is_zero() -> None:
    assert (kept_marks(small(num_blocks=1, stochastic_depth=0.9).blocks[0], 200) == 11).all()


@pytest.mark.parametrize("rescale", [False, True])
def test_evaluation_drops_nothing_and_scales_nothing(rescale: bool) -> None:
    plain = random_model()
    noisy = random_model(dropout=0.5, stochastic_depth=0.9, rescale=rescale)
    images = random_images(plain)
    with torch.no_grad():
        assert torch.equal(noisy(images), plain(images))
        assert torch.equal(noisy.tokens(images), plain.tokens(images))
        assert not torch.equal(noisy.train()(images), plain(images))


def test_training_without_rates_is_deterministic_and_equal_to_evaluation() -> None:
    model = random_model()
    images = random_images(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), model.train()(images))


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_dropout_comes_after_each_dense_layer_and_only_in_training(seed: int | None) -> None:
    torch.manual_seed(0)
    n, p, shift = 40_000, 0.4, 3.0
    mlp = MlpBlock(1, 1, "erf", p).double()
    with torch.no_grad():
        mlp.dense_0.weight.zero_()
        mlp.dense_0.bias.fill_(1)
        mlp.dense_1.weight.fill_(1)
        mlp.dense_1.bias.fill_(shift)
        hidden = float(gelu_erf(np.array(1.0)))
        keys = None if seed is None else sample_keys(seed, torch.arange(n))
        trained = mlp.train()(torch.zeros(n, 1, dtype=torch.float64), keys)[:, 0]
        assert (mlp.eval()(torch.zeros(9, 1, dtype=torch.float64)) - hidden - shift).abs().max() < 1e-12
    outcomes = {  # output: its probability
        0.0: p,
        shift / (1 - p): (1 - p) * p,
        (hidden / (1 - p) + shift) / (1 - p): (1 - p) ** 2,
    }
    counts = [((trained - value).abs() < 1e-9).sum() for value in outcomes]
    assert sum(counts) == n
    assert all(within(count, n, chance) for count, chance in zip(counts, outcomes.values(), strict=True))


def test_without_keys_each_pass_drops_other_images() -> None:
    torch.manual_seed(0)
    block = MixerBlock(4, 6, 5, 7, drop_path=0.5)
    assert not torch.equal(kept_marks(block, 100), kept_marks(block, 100))


def test_dropout_of_the_model_reaches_both_mlps_of_every_block() -> None:
    for block in small(dropout=0.5).train().blocks:
        for mlp in (block.token_mixing, block.channel_mixing):
            x = torch.ones(64, mlp.dense_0.in_features)
            mlp.dense_1.bias.data.fill_(1)
            assert (mlp(x) == 0).any()
