"""Mixup and CutMix: 100,000 draws against SciPy's Beta and against CutMix's own code, and mixtures by hand."""

from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import beta, chi2_contingency, chisquare
from torch import Tensor

from allmlp.data.mixup import Mixing, MixParameters

Array = np.ndarray
DRAWS = 100_000
LONG = 1 << 20  # a side on which rounding to pixels does not show


@cache
def draws(
    mixing: Mixing, seed: int = 0, height: int = LONG, width: int = LONG, steps: int = DRAWS
) -> list[MixParameters]:
    return [mixing.draw(seed, step, height, width) for step in range(steps)]


def shares(drawn: list[MixParameters]) -> Array:
    return np.array([draw.lam for draw in drawn])


def boxes(drawn: list[MixParameters]) -> Array:
    """(draws, 4): top, left, bottom, right."""
    return np.array([draw.box for draw in drawn])


def uniform(values: Array, bins: int, low: float = 0.0, high: float = 1.0) -> float:
    """p of a χ² test that the values are uniform."""
    assert values.min() >= low
    assert values.max() <= high
    return chisquare(np.histogram(values, bins, (low, high))[0]).pvalue


def images_of(n: int, seed: int = 0, height: int = 6, width: int = 5) -> Tensor:
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def all_of(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.bool)


# Mixup's share


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_mixup_keeps_the_larger_share_of_a_beta(p: float) -> None:
    drawn = draws(Mixing(mixup=p))
    assert {draw.box for draw in drawn} == {None}
    assert shares(drawn).min() >= 0.5
    assert shares(drawn).max() <= 1
    # F(x) of max(λ, 1 − λ), which is uniform: of a Beta that is symmetrical, F(x) − F(1 − x)
    assert uniform(beta.cdf(shares(drawn), p, p) - beta.cdf(1 - shares(drawn), p, p), 50, high=1 + 1e-9) > 1e-3
    assert shares(drawn).mean() == pytest.approx({0.2: 0.9009, 0.5: 0.8183}[p], abs=0.003)


def test_steps_are_independent_of_each_other() -> None:
    of_mixup = shares(draws(Mixing(mixup=0.5)))
    assert abs(np.corrcoef(of_mixup[:-1], of_mixup[1:])[0, 1]) < 4 / DRAWS**0.5


def test_a_draw_is_a_function_of_seed_and_step_alone() -> None:
    for mixing in (Mixing(mixup=0.5), Mixing(mixup=None, cutmix=1.0), Mixing(mixup=0.5, cutmix=1.0)):
        forward = [mixing.draw(3, step, 32, 48) for step in range(50)]
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        assert [mixing.draw(3, step, 32, 48) for step in reversed(range(50))] == forward[::-1]
        assert len(set(forward)) > 45
        others = [mixing.draw(4, step, 32, 48) for step in range(50)]
        assert sum(a == b for a, b in zip(forward, others, strict=True)) < 3


# CutMix's box


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_cutmix_takes_a_box_of_a_beta_that_is_not_folded(p: float) -> None:
    """The side is √(1 − λ). A box that reaches neither border shows it, as one in 1 / (1 − side) does."""
    drawn = boxes(draws(Mixing(mixup=None, cutmix=p)))
    quantiles = (np.arange(400_000) + 0.5) / 400_000
    free = 1 - np.sqrt(1 - beta.ppf(quantiles, p, p))  # of each λ, how often the box is whole
    for start, end in ((drawn[:, 0], drawn[:, 2]), (drawn[:, 1], drawn[:, 3])):
        whole = (start > 0) & (end < LONG)
        side = (end - start)[whole] / LONG
        assert whole.mean() == pytest.approx(free.mean(), abs=4 * 0.5 / DRAWS**0.5)
        wanted, edges = np.histogram(beta.ppf(quantiles, p, p), 40, weights=free)
        wanted, edges = wanted[wanted > 1e-4 * wanted.sum()], edges[np.append(wanted > 1e-4 * wanted.sum(), True)]
        found = np.histogram(1 - side**2, edges)[0]
        assert chisquare(found, wanted * found.sum() / wanted.sum()).pvalue > 1e-3
        centered = (start[whole] / LONG) / (1 - side)  # from one border to the other
        assert uniform(centered[side < 0.999], 20) > 1e-3


def test_cutmixs_boxes_are_those_of_its_authors() -> None:
    """rand_bbox of clovaai/CutMix-PyTorch, drawn as often, on a small image: the same places, sizes and shares."""
    height, width = 14, 22
    rng = np.random.default_rng(0)
    side = np.sqrt(1 - rng.beta(1.0, 1.0, DRAWS))
    ends = []
    for size in (height, width):
        center, half = rng.integers(0, size, DRAWS), (size * side).astype(int) // 2
        ends += [np.clip(center - half, 0, size), np.clip(center + half, 0, size)]
    theirs = np.stack([ends[0], ends[2], ends[1], ends[3]], axis=1)
    drawn = draws(Mixing(mixup=None, cutmix=1.0), height=height, width=width)
    ours = boxes(drawn)
    for edge, most in enumerate((height, width, height, width)):
        counts = np.stack([np.bincount(b[:, edge], minlength=most + 1) for b in (ours, theirs)])
        assert chi2_contingency(counts[:, counts.sum(axis=0) > 10]).pvalue > 1e-3
    areas = np.stack([np.bincount((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]), minlength=309) for b in (ours, theirs)])
    assert chi2_contingency(areas[:, areas.sum(axis=0) > 10]).pvalue > 1e-3
    corner = np.stack([np.bincount(b[:, 0] * 22 + b[:, 1], minlength=14 * 22) for b in (ours, theirs)])
    assert chi2_contingency(corner[:, corner.sum(axis=0) > 10]).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (8, 8), (5, 13), (224, 224)])
def test_a_share_is_that_of_the_pixels(height: int, width: int) -> None:
    for draw in draws(Mixing(mixup=None, cutmix=1.0), 5, height, width, 500):
        assert draw.box is not None
        top, left, bottom, right = draw.box
        assert 0 <= top <= bottom <= height
        assert 0 <= left <= right <= width
        mask = np.ones((height, width))
        mask[top:bottom, left:right] = 0
        assert draw.lam == pytest.approx(mask.mean(), abs=1e-12)


def test_with_both_each_step_tosses_a_coin() -> None:
    drawn = draws(Mixing(mixup=0.2, cutmix=1.0))
    with_box = np.array([draw.box is not None for draw in drawn])
    assert chisquare(np.bincount(with_box)).pvalue > 1e-3
    assert chi2_contingency(np.histogram2d(with_box[:-1], with_box[1:], 2)[0]).pvalue > 1e-3  # afresh at each step
    folded = shares([draw for draw in drawn if draw.box is None])  # and what it decides on is as it is alone
    assert uniform(beta.cdf(folded, 0.2, 0.2) - beta.cdf(1 - folded, 0.2, 0.2), 50, high=1 + 1e-9) > 1e-3
    alone = shares(draws(Mixing(mixup=None, cutmix=1.0)))
    both = shares([draw for draw in drawn if draw.box is not None])
    counts = np.stack([np.histogram(values, 20, (0, 1))[0] for values in (alone, both)])
    assert chi2_contingency(counts).pvalue > 1e-3


# Mixtures


def test_mixup_by_hand() -> None:
    images = torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    mixed = Mixing(mixup=0.2, group=4).mix(images, all_of(4), MixParameters(0.75, None))
    values = torch.tensor([250.75, 7.75, 77.5, 775.0])  # ¾ of itself, ¼ of the one before
    assert torch.equal(mixed.images, values.view(4, 1, 1, 1).expand(4, 3, 2, 2))
    assert mixed.partners.tolist() == [3, 0, 1, 2]
    assert mixed.lam.tolist() == [0.75] * 4


def test_cutmix_by_hand() -> None:
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 2, 3, 4)
    draw = MixParameters(1 - 2 / 12, (1, 1, 2, 3))  # the middle two of the middle row
    mixed = Mixing(mixup=None, cutmix=1.0, group=3).mix(images, all_of(3), draw)
    for i, partner in enumerate((2, 0, 1)):
        rows = [[i] * 4, [i, partner, partner, i], [i] * 4]
        assert mixed.images[i].tolist() == [rows, rows]
    assert mixed.partners.tolist() == [2, 0, 1]
    assert torch.allclose(mixed.lam, torch.full((3,), 10 / 12))
    assert torch.equal(images[:, 0, 1, 1], torch.arange(3.0))  # the images that were given stay as they were


def test_a_box_of_no_pixels_changes_nothing() -> None:
    images = images_of(4)
    mixed = Mixing(mixup=None, cutmix=1.0).mix(images, all_of(4), MixParameters(1.0, (2, 3, 2, 3)))
    assert torch.equal(mixed.images, images)


@pytest.mark.parametrize(
    ("images", "group", "partners"),
    [
        (8, 4, [3, 0, 1, 2, 7, 4, 5, 6]),
        (7, 3, [2, 0, 1, 5, 3, 4, 6]),
        (5, 3, [2, 0, 1, 4, 3]),
        (3, 8, [2, 0, 1]),
        (4, 1, [0, 1, 2, 3]),
        (4, 2, [1, 0, 3, 2]),
    ],
)
def test_the_partner_is_the_one_before_in_the_group(images: int, group: int, partners: list[int]) -> None:
    given = images_of(images)
    mixed = Mixing(mixup=0.2, group=group).mix(given, all_of(images), MixParameters(0.6, None))
    assert mixed.partners.tolist() == partners
    assert torch.allclose(mixed.images, 0.6 * given + 0.4 * given[partners], atol=1e-6)


BOXES = [None, (1, 0, 4, 3)]


@pytest.mark.parametrize("box", BOXES)
def test_a_group_of_one_mixes_nothing(box: tuple[int, int, int, int] | None) -> None:
    images = images_of(5)
    mixed = Mixing(mixup=0.2, cutmix=1.0, group=1).mix(images, all_of(5), MixParameters(0.7, box))
    assert torch.allclose(mixed.images, images, atol=1e-6)


@pytest.mark.parametrize("box", BOXES)
def test_an_image_whose_partner_could_not_be_read_stays_as_it_is(box: tuple[int, int, int, int] | None) -> None:
    mixing, draw = Mixing(mixup=0.2, cutmix=1.0, group=4), MixParameters(0.7, box)
    images, valid = images_of(8), all_of(8)
    valid[[1, 4]] = False  # the partners of 2 and of 5; their own are 0 and 7
    mixed, sound = mixing.mix(images, valid, draw), mixing.mix(images, all_of(8), draw)
    alone = [1, 2, 4, 5]
    assert torch.equal(mixed.images[alone], images[alone])
    assert mixed.lam[alone].tolist() == [1.0] * 4
    others = [0, 3, 6, 7]
    assert torch.equal(mixed.images[others], sound.images[others])
    assert torch.allclose(mixed.lam[others], torch.full((4,), 0.7))
    assert torch.equal(mixed.partners, sound.partners)


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("micro_batch", [4, 8, 12])
def test_micro_batches_of_whole_groups_give_the_same_mixtures(
    micro_batch: int, box: tuple[int, int, int, int] | None
) -> None:
    mixing, draw = Mixing(mixup=0.2, cutmix=1.0, group=4), MixParameters(0.7, box)
    images, valid = images_of(24), all_of(24)
    valid[[0, 7, 13, 23]] = False
    whole = mixing.mix(images, valid, draw)
    for start in range(0, 24, micro_batch):
        piece = slice(start, start + micro_batch)
        mixed = mixing.mix(images[piece], valid[piece], draw)
        assert torch.equal(mixed.images, whole.images[piece])
        assert torch.equal(mixed.lam, whole.lam[piece])
        assert torch.equal(mixed.partners + start, whole.partners[piece])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("box", BOXES)
def test_mixtures_have_the_images_type(dtype: torch.dtype, box: tuple[int, int, int, int] | None) -> None:
    images = images_of(4).to(dtype)
    mixed = Mixing(mixup=0.2, cutmix=1.0).mix(images, all_of(4), MixParameters(0.7, box))
    assert mixed.images.dtype == mixed.lam.dtype == dtype
    assert mixed.images.shape == images.shape
