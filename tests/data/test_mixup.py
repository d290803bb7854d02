"""Mixup and CutMix: draws against SciPy's Beta and against CutMix's own code, and mixtures by hand."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, chi2_contingency, chisquare
from torch import Tensor

from allmlp.data.mixup import Mixing, MixParameters

DRAWS = 40_000
HEIGHT, WIDTH = 14, 22
BOTH = Mixing(mixup=0.2, cutmix=1.0)
AS_BEFORE = settings(deadline=None, derandomize=True, max_examples=60)


@cache
def draws(mixing: Mixing) -> list[MixParameters]:
    return [mixing.draw(0, step, HEIGHT, WIDTH) for step in range(DRAWS)]


def shares(drawn: list[MixParameters]) -> np.ndarray:
    return np.array([draw.lam for draw in drawn])


def p_folded(lam: np.ndarray, p: float) -> float:
    """p of a χ² test that λ is max(λ', 1 − λ') of λ' ~ Beta(p, p): then F(λ) − F(1 − λ) is uniform."""
    assert 0.5 <= lam.min() <= lam.max() <= 1
    uniform = beta.cdf(lam, p, p) - beta.cdf(1 - lam, p, p)
    return chisquare(np.histogram(uniform, 50, (0, 1 + 1e-9))[0]).pvalue


def p_same(a: np.ndarray, b: np.ndarray) -> float:
    """p of a χ² test that two sets of whole numbers have the same distribution."""
    counts = np.stack([np.bincount(values, minlength=max(a.max(), b.max()) + 1) for values in (a, b)])
    return chi2_contingency(counts[:, counts.sum(axis=0) > 10]).pvalue


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_mixup_keeps_the_larger_share_of_a_beta(p: float) -> None:
    drawn = draws(Mixing(mixup=p))
    assert {draw.box for draw in drawn} == {None}
    assert p_folded(shares(drawn), p) > 1e-3
    assert shares(drawn).mean() == pytest.approx({0.2: 0.9009, 0.5: 0.8183}[p], abs=0.004)
    assert abs(np.corrcoef(shares(drawn)[:-1], shares(drawn)[1:])[0, 1]) < 4 / DRAWS**0.5  # steps are independent


@pytest.mark.parametrize("p", [0.2, 1.0])
def test_cutmixs_boxes_are_those_of_its_authors(p: float) -> None:
    """rand_bbox of clovaai/CutMix-PyTorch, drawn as often: the same places, sizes and shares. λ is not folded."""
    rng = np.random.default_rng(0)
    side = np.sqrt(1 - rng.beta(p, p, DRAWS))
    ends = []
    for size in (HEIGHT, WIDTH):
        center, half = rng.integers(0, size, DRAWS), (size * side).astype(int) // 2
        ends += [np.clip(center - half, 0, size), np.clip(center + half, 0, size)]
    theirs = np.stack([ends[0], ends[2], ends[1], ends[3]], axis=1)
    ours = np.array([draw.box for draw in draws(Mixing(mixup=None, cutmix=p))])
    for edge in range(4):
        assert p_same(ours[:, edge], theirs[:, edge]) > 1e-3
    areas = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (ours, theirs))
    assert p_same(*areas) > 1e-3
    corners = (b[:, 0] * WIDTH + b[:, 1] for b in (ours, theirs))
    assert p_same(*corners) > 1e-3


def test_with_both_each_step_tosses_a_coin() -> None:
    drawn = draws(BOTH)
    with_box = np.array([draw.box is not None for draw in drawn])
    assert chisquare(np.bincount(with_box)).pvalue > 1e-3
    assert chi2_contingency(np.histogram2d(with_box[:-1], with_box[1:], 2)[0]).pvalue > 1e-3  # afresh at each step
    assert p_folded(shares([draw for draw in drawn if draw.box is None]), 0.2) > 1e-3  # and each is as it is alone
    both, alone = (
        (shares(some) * HEIGHT * WIDTH).round().astype(int)
        for some in ([draw for draw in drawn if draw.box is not None], draws(Mixing(mixup=None, cutmix=1.0)))
    )
    assert p_same(both, alone) > 1e-3


@AS_BEFORE
@given(st.integers(1, 224), st.integers(1, 224), st.integers(0, 2**31 - 1), st.integers(0, 10**9))
def test_a_share_is_that_of_the_pixels_and_a_function_of_seed_and_step_alone(
    height: int, width: int, seed: int, step: int
) -> None:
    cutmix = Mixing(mixup=None, cutmix=1.0)
    draw = cutmix.draw(seed, step, height, width)
    assert draw.box is not None
    top, left, bottom, right = draw.box
    assert 0 <= top <= bottom <= height
    assert 0 <= left <= right <= width
    assert draw.lam == pytest.approx(1 - (bottom - top) * (right - left) / (height * width), abs=1e-12)
    for mixing in (cutmix, Mixing(mixup=0.5), BOTH):
        drawn = mixing.draw(seed, step, height, width)
        mixing.draw(seed, step + 1, height, width)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        assert mixing.draw(seed, step, height, width) == drawn
    assert len({Mixing(mixup=0.5).draw(seed + i, step, 9, 9) for i in range(9)}) > 5


# Mixtures


def images_of(n: int) -> Tensor:
    return torch.randn(n, 3, 6, 5, generator=torch.Generator().manual_seed(0))


def test_mixup_by_hand() -> None:
    images = torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    mixed = Mixing(mixup=0.2, group=4).mix(images, torch.ones(4, dtype=torch.bool), MixParameters(0.75, None))
    values = torch.tensor([250.75, 7.75, 77.5, 775.0])  # ¾ of itself, ¼ of the one before
    assert torch.equal(mixed.images, values.view(4, 1, 1, 1).expand(4, 3, 2, 2))
    assert mixed.partners.tolist() == [3, 0, 1, 2]
    assert mixed.lam.tolist() == [0.75] * 4


def test_cutmix_by_hand() -> None:
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 2, 3, 4)
    draw = MixParameters(1 - 2 / 12, (1, 1, 2, 3))  # the middle two of the middle row
    mixed = Mixing(mixup=None, cutmix=1.0, group=3).mix(images, torch.ones(3, dtype=torch.bool), draw)
    for i, partner in enumerate((2, 0, 1)):
        rows = [[i] * 4, [i, partner, partner, i], [i] * 4]
        assert mixed.images[i].tolist() == [rows, rows]
    assert torch.allclose(mixed.lam, torch.full((3,), 10 / 12))
    assert torch.equal(images[:, 0, 1, 1], torch.arange(3.0))  # the images that were given stay as they were


@AS_BEFORE
@given(
    st.integers(1, 4),
    st.lists(st.booleans(), min_size=1, max_size=12),
    st.sampled_from([None, (1, 0, 4, 3), (2, 3, 2, 3)]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(1, 3),
)
def test_each_image_is_mixed_with_the_one_before_in_its_group_if_both_could_be_read(
    group: int, valid: list[bool], box: tuple[int, int, int, int] | None, dtype: torch.dtype, groups: int
) -> None:
    """The last group may be short. Micro-batches of whole groups give the same mixtures."""
    mixing, draw = Mixing(mixup=0.2, cutmix=1.0, group=group), MixParameters(0.7, box)
    images, readable = images_of(len(valid)).to(dtype), torch.tensor(valid)
    whole = mixing.mix(images, readable, draw)
    assert whole.images.dtype == whole.lam.dtype == dtype
    for i in range(len(valid)):
        first = i - i % group
        partner = i - 1 if i > first else min(first + group, len(valid)) - 1
        share = 0.7 if valid[i] and valid[partner] else 1.0
        expected = images[i].clone()
        if box is None:
            expected = share * images[i] + (1 - share) * images[partner]
        elif share < 1:
            top, left, bottom, right = box
            expected[:, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
        assert whole.partners[i] == partner
        assert whole.lam[i].item() == pytest.approx(share, abs=4e-3 if dtype == torch.bfloat16 else 1e-7)
        assert torch.allclose(whole.images[i], expected, atol=0.05 if dtype == torch.bfloat16 else 1e-6)
    for start in range(0, len(valid), group * groups):
        piece = slice(start, start + group * groups)
        mixed = mixing.mix(images[piece], readable[piece], draw)
        assert torch.equal(mixed.images, whole.images[piece])
        assert torch.equal(mixed.partners + start, whole.partners[piece])
