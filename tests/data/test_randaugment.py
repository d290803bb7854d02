"""RandAugment: every operation against the reference's formulas (TensorFlow's tpu/efficientnet/autoaugment.py), written
again in NumPy and whole numbers, and draws against the distributions that they should have."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import chisquare

from allmlp.data import randaugment
from allmlp.data.randaugment import OPERATIONS, SIGNED, STRENGTHS, RandAugment, apply_operation

Array = np.ndarray

# The reference's level_to_arg at magnitude 10, 15 and 20, worked out by hand
BY_HAND = {
    "autocontrast": (0, 0, 0),
    "equalize": (0, 0, 0),
    "invert": (0, 0, 0),
    "rotate": (30, 45, 60),
    "posterize": (4, 6, 8),
    "solarize": (0, 128, 0),
    "color": (1.9, 2.8, 3.7),
    "contrast": (1.9, 2.8, 3.7),
    "brightness": (1.9, 2.8, 3.7),
    "sharpness": (1.9, 2.8, 3.7),
    "shear_x": (0.3, 0.45, 0.6),
    "shear_y": (0.3, 0.45, 0.6),
    "translate_x": (100, 150, 200),
    "translate_y": (100, 150, 200),
    "cutout": (40, 60, 80),
    "solarize_add": (110, 165, 220),
}
BOTH_WAYS = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}


class Expected(NamedTuple):
    """What the reference makes of an image, and what else is as good."""

    pixels: Array  # (H, W, 3)
    below: Array | int = 0  # by how many levels less
    above: Array | int = 0  # by how many levels more


def blend(degenerate: Array, image: Array, tenths: int) -> Expected:
    """degenerate + f (image − degenerate), clipped, then truncated, in hundredths: f = 1.8 · m / 10 + 0.1.

    Truncation is by floor division, hence exact. Where the quotient is whole, floating point may fall just short of it:
    one level less, as in TensorFlow's float32 (for m = 15, 7 of 256 levels of contrast, though not the same ones).
    """
    hundredths = 18 * tenths + 10
    value = 100 * degenerate + hundredths * (image - degenerate)
    return Expected(np.clip(value, 0, 25500) // 100, below=(value % 100 == 0) & (value > 0) & (value <= 25500))


def gray(image: Array) -> Array:
    """tf.image.rgb_to_grayscale of uint8: to [0, 1], weighed, times 255.5, truncated."""
    weighed = (image / np.float32(255)).astype(np.float32) @ np.array([0.2989, 0.5870, 0.1140], np.float32)
    return np.repeat((weighed * np.float32(255.5)).astype(np.int64)[..., None], 3, axis=2)


def smoothed(image: Array) -> Array:
    """3 × 3, the center 5-fold, in 13ths, truncated; the border as it was."""
    smooth, (height, width) = image.copy(), image.shape[:2]
    if min(height, width) >= 3:
        around = sum(image[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3))
        smooth[1:-1, 1:-1] = (around + 4 * image[1:-1, 1:-1]) // 13
    return smooth


def autocontrast(image: Array) -> Expected:
    """Each channel from its least and greatest level to 0 and 255; whole quotients may fall short, as in ``blend``."""
    low, high = image.min(axis=(0, 1)), image.max(axis=(0, 1))
    spread = np.where(high > low, high - low, 1)
    scaled = 255 * (image - low)
    flat = high <= low
    whole = (scaled % spread == 0) & (scaled > 0) & ~flat
    return Expected(np.where(flat, image, scaled // spread), below=whole)


def equalize(image: Array) -> Array:
    """By the cumulative histogram, in integers."""
    new = image.copy()
    for channel in range(3):
        histogram = np.bincount(image[..., channel].ravel(), minlength=256)
        step = (histogram.sum() - histogram[histogram > 0][-1]) // 255
        if step:
            table = np.concatenate([[0], ((histogram.cumsum() + step // 2) // step)[:-1]])
            new[..., channel] = np.clip(table, 0, 255)[image[..., channel]]
    return new


def taken_from(image: Array, x: Array, y: Array) -> Array:
    """The pixels at whole positions, gray outside."""
    height, width = image.shape[:2]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    new = np.full_like(image, 128)
    new[inside] = image[y[inside], x[inside]]
    return new


def sources(name: str, strength: float, height: int, width: int) -> tuple[Array, Array]:
    """Where the pixel at each (x, y) comes from, counted from the middle of the first pixel."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    if name == "shear_x":
        return x + strength * y, y
    if name == "shear_y":
        return x, y + strength * x
    if name == "translate_x":
        return x + strength * width / 224, y
    if name == "translate_y":
        return x, y + strength * height / 224
    cos, sin = math.cos(math.radians(strength)), math.sin(math.radians(strength))
    x, y = x - (width - 1) / 2, y - (height - 1) / 2
    return cos * x - sin * y + (width - 1) / 2, sin * x + cos * y + (height - 1) / 2


def cutout(image: Array, strength: float, down: float, right: float) -> Array:
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width]
    from_row, from_column = y - int(down * height), x - int(right * width)
    half_height, half_width = round(strength * height / 224), round(strength * width / 224)
    hidden = (-half_height <= from_row) & (from_row < half_height)
    hidden &= (-half_width <= from_column) & (from_column < half_width)
    return np.where(hidden[..., None], 128, image)


def expected(name: str, image: Array, magnitude: int, center: tuple[float, float] = (0.5, 0.5)) -> Expected:
    """For the operations that look at levels, and cutout."""
    image = image.astype(np.int64)
    match name:
        case "autocontrast":
            return autocontrast(image)
        case "equalize":
            return Expected(equalize(image))
        case "invert":
            return Expected(255 - image)
        case "posterize":
            kept = 2 ** (8 - min(magnitude * 4 // 10, 8))
            return Expected(image // kept * kept)
        case "solarize":
            return Expected(np.where(image < magnitude * 256 // 10 % 256, image, 255 - image))
        case "solarize_add":
            return Expected(np.where(image < 128, np.minimum(image + magnitude * 110 // 10, 255), image))
        case "brightness":
            return blend(np.zeros_like(image), image, magnitude)
        case "contrast":  # with the pixels of a 224 image / 256
            return blend(np.full_like(image, 196), image, magnitude)
        case "sharpness":
            return blend(smoothed(image), image, magnitude)
        case "color":  # Pillow rounds a gray that TensorFlow truncates (of 255.5ths): up to a level, which is weighed
            plain = blend(gray(image), image, magnitude)
            slack = math.ceil(abs(1 - STRENGTHS["color"](magnitude)) - 1e-9)
            return plain._replace(below=slack, above=slack)
        case "cutout":
            return Expected(cutout(image, magnitude * 40 // 10, *center))
    raise AssertionError(name)


# Images to try them on


def pictures(height: int, width: int) -> Iterator[tuple[str, Array]]:
    rng = np.random.default_rng(height * width)
    y, x = np.mgrid[:height, :width] / max(height, width)
    yield "noise", rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    yield "dull noise", rng.integers(61, 187, (height, width, 3), dtype=np.uint8)
    photograph = np.stack([120 + 90 * np.sin(5 * x + 3 * y), 40 + 190 * x, 250 * y**2], axis=2)
    yield "photograph", (photograph + rng.normal(0, 3, photograph.shape)).clip(0, 255).astype(np.uint8)
    yield "constant", np.broadcast_to(np.array([200, 13, 127], np.uint8), (height, width, 3)).copy()
    yield "white", np.full((height, width, 3), 255, np.uint8)


SIZES = [(224, 224), (37, 53), (96, 65), (32, 32), (3, 4), (2, 7), (1, 1)]
MAGNITUDES = (5, 10, 15, 20)


def applied(name: str, image: Array, strength: float, center: tuple[float, float] = (0.5, 0.5)) -> Array:
    given_image = Image.fromarray(image)
    new = apply_operation(given_image, name, strength, center)
    assert (new.mode, new.size) == ("RGB", (image.shape[1], image.shape[0]))
    assert np.array_equal(np.asarray(given_image), image)  # it is left alone
    return np.asarray(new).astype(np.int64)


def test_operations_and_strengths_are_those_worked_out_by_hand() -> None:
    assert set(OPERATIONS) == set(BY_HAND)
    assert SIGNED == BOTH_WAYS
    for name, row in BY_HAND.items():
        assert [STRENGTHS[name](magnitude) for magnitude in (10, 15, 20)] == pytest.approx(list(row), abs=1e-12)
    assert STRENGTHS["posterize"](25) == STRENGTHS["posterize"](100) == 8  # all bits: nothing changes
    assert [STRENGTHS["solarize"](magnitude) for magnitude in (5, 18, 25)] == [128, 204, 128]  # 256 m / 10 modulo 256
    assert [STRENGTHS[name](5) for name in ("color", "contrast", "brightness", "sharpness")] == [1] * 4  # no change


@pytest.mark.parametrize("name", sorted(set(BY_HAND) - BOTH_WAYS))
def test_levels_are_the_references(name: str) -> None:
    """Exact, except that where a quotient is whole one level less will do, and for what color's gray is rounded by."""
    for size in SIZES:
        for kind, image in pictures(*size):
            for magnitude in MAGNITUDES:
                found = applied(name, image, STRENGTHS[name](magnitude), (0.3, 0.9))
                want = expected(name, image, magnitude, (0.3, 0.9))
                wrong = (found < want.pixels - want.below) | (found > want.pixels + want.above)
                assert not wrong.any(), f"{kind} {size}, m = {magnitude}: {wrong.sum()} of {wrong.size} values"


@pytest.mark.parametrize(
    ("name", "most"), [("rotate", 0.02), ("shear_x", 0.004), ("shear_y", 0.004), ("translate_x", 0), ("translate_y", 0)]
)
def test_positions_are_the_references(name: str, most: float) -> None:
    """Exact wherever a position is further than 0.01 from halfway between two pixels, for Pillow works in 65,536ths.

    At halfway, either neighbor will do; but no more than ``most`` of the pixels may then be another than the one that
    the reference takes, which rounds away from zero. A shear of 0.3 has a tenth of its rows at halfway.
    """
    for size in SIZES[:4]:
        for kind, image in pictures(*size):
            if kind not in ("noise", "photograph", "constant"):
                continue
            for magnitude in (*MAGNITUDES, 13):
                for sign in (1, -1):
                    strength = sign * STRENGTHS[name](magnitude)
                    found = applied(name, image, strength)
                    x, y = sources(name, strength, *size)
                    as_good = np.zeros(size, bool)
                    for nudge_x in (-0.01, 0.01):
                        for nudge_y in (-0.01, 0.01):
                            at = (np.floor(u + nudge + 0.5).astype(int) for u, nudge in ((x, nudge_x), (y, nudge_y)))
                            as_good |= (taken_from(image, *at) == found).all(axis=2)
                    assert as_good.all(), f"{kind} {size}, strength {strength}: {(~as_good).sum()} pixels"
                    away = (np.copysign(np.floor(np.abs(u).round(6) + 0.5), u).astype(int) for u in (x, y))
                    other = (taken_from(image, *away) != found).any(axis=2).mean()
                    assert other <= most, f"{kind} {size}, strength {strength}: {other:.2%} of the pixels"


def test_a_gray_image_has_no_color_to_strengthen() -> None:
    image = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    for magnitude in MAGNITUDES:
        assert np.array_equal(applied("color", image, STRENGTHS["color"](magnitude)), image)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    st.sampled_from(OPERATIONS),
    st.integers(1, 9),
    st.integers(1, 9),
    st.floats(0, 100),
    st.sampled_from([1, -1]),
)
def test_any_image_and_magnitude_will_do(name: str, height: int, width: int, magnitude: float, sign: int) -> None:
    for _, image in pictures(height, width):
        applied(name, image, STRENGTHS[name](magnitude) * (sign if name in SIGNED else 1), (0.999, 0.0))


# Draws


class Drawn(NamedTuple):
    name: str
    strength: float
    center: tuple[float, float]


def draws(monkeypatch: pytest.MonkeyPatch, augment: RandAugment, images: int, seed: int) -> list[Drawn]:
    """The operations of so many images, without the pixels."""
    seen: list[Drawn] = []

    def spy(image: Image.Image, name: str, strength: float, center: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
        seen.append(Drawn(name, strength, center))
        return image

    monkeypatch.setattr(randaugment, "apply_operation", spy)
    rng, image = np.random.default_rng(seed), Image.new("RGB", (2, 2))
    for _ in range(images):
        augment(image, rng)
    monkeypatch.undo()
    return seen


def p_uniform(places: Array, number: int) -> float:
    """p of a χ² test that whole numbers below ``number`` are uniform."""
    return chisquare(np.bincount(places, minlength=number)).pvalue


@pytest.mark.parametrize("magnitude", [10, 15, 20])
def test_every_operation_has_the_strength_of_the_magnitude_and_geometric_ones_go_either_way(
    monkeypatch: pytest.MonkeyPatch, magnitude: int
) -> None:
    seen = draws(monkeypatch, RandAugment(layers=3, magnitude=magnitude), 5000, seed=0)
    assert len(seen) == 15_000
    for name, row in BY_HAND.items():
        strength = row[magnitude // 5 - 2]
        strengths = [drawn.strength for drawn in seen if drawn.name == name]
        signed = (-strength, strength) if name in BOTH_WAYS else (strength,)
        assert sorted(set(strengths)) == pytest.approx(signed, abs=1e-12), name
        if name in BOTH_WAYS:
            assert p_uniform(np.array(strengths) > 0, 2) > 1e-3, name


def test_operations_are_uniform_with_replacement_and_layers_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = draws(monkeypatch, RandAugment(), 30_000, seed=1)
    assert len(seen) == 60_000  # each always applied
    first, second = (np.array([OPERATIONS.index(drawn.name) for drawn in seen[layer::2]]) for layer in (0, 1))
    assert p_uniform(first, 16) > 1e-3
    assert p_uniform(second, 16) > 1e-3
    assert p_uniform(16 * first + second, 256) > 1e-3


def test_cutouts_centers_are_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = draws(monkeypatch, RandAugment(layers=100), 1000, seed=3)
    centers = np.array([drawn.center for drawn in seen if drawn.name == "cutout"])
    assert len(centers) > 6000
    assert centers.min() >= 0
    assert centers.max() < 1
    for axis in (0, 1):
        assert p_uniform((centers[:, axis] * 224).astype(int), 224) > 1e-3
    cells = (centers * 8).astype(int)
    assert p_uniform(8 * cells[:, 0] + cells[:, 1], 64) > 1e-3


def test_layers_are_applied_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """And drawn from the given generator alone."""
    image = Image.fromarray(next(pictures(37, 53))[1])
    for seed in range(30):
        seen = draws(monkeypatch, RandAugment(layers=3, magnitude=10), 1, seed)
        by_hand = image
        for drawn in seen:
            by_hand = apply_operation(by_hand, *drawn)
        augmented = RandAugment(layers=3, magnitude=10)(image, np.random.default_rng(seed))
        assert augmented.tobytes() == by_hand.tobytes()
    assert RandAugment(layers=0)(image, np.random.default_rng(0)).tobytes() == image.tobytes()
