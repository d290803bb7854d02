"""Image transforms: sizes, crops, augmentation, and the input range."""

from collections import Counter
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from scipy.stats import chisquare
from torch import Tensor

from allmlp.data.randaugment import RandAugment
from allmlp.data.transforms import EvaluationTransform, TrainingTransform, inception_box, normalize, resize_for_crop
from allmlp.metadata import Preprocessing

SIZES = [(1, 1), (1, 5000), (5000, 1), (8, 8), (640, 480), (480, 640), (333, 77), (255, 256), (224, 224), (3, 900)]


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(view: Tensor) -> np.ndarray:
    """(3, H, W) → (H, W, 3)."""
    assert view.dtype == torch.uint8
    return view.permute(1, 2, 0).numpy()


def evaluation(image_size: tuple[int, int], **options) -> EvaluationTransform:
    return EvaluationTransform(image_size=image_size, preprocessing=Preprocessing(**options))


def training(
    image_size: tuple[int, int],
    train_crop: Any,
    padding: int = 0,
    flip: bool = False,
    randaugment: RandAugment | None = None,
    color_jitter: float = 0.0,
    **options,
) -> TrainingTransform:
    augmentation = {"crop_padding": padding, "flip": flip, "randaugment": randaugment, "color_jitter": color_jitter}
    return TrainingTransform(
        image_size=image_size, preprocessing=Preprocessing(**options), crop=train_crop, **augmentation
    )


generator = np.random.default_rng


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.sampled_from(SIZES),
    st.sampled_from([(8, 8), (64, 64), (24, 96), (100, 12), (1, 5), (1, 1)]),
    st.sampled_from(["resmall", "resize"]),
    st.sampled_from([224 / 256, 1.0, 0.5]),
)
def test_views_have_the_models_size_and_without_augmentation_that_of_training_is_that_of_evaluation(
    size: tuple[int, int], target: tuple[int, int], crop: str, ratio: float
) -> None:
    image, options = photo(*size), {"crop": crop, "crop_ratio": ratio}
    plain = evaluation(target, **options)(image)
    assert plain.shape == (3, *target)
    assert torch.equal(training(target, "none", **options)(image, generator(0)), plain)
    assert torch.equal(training(target, "pad", 0, **options)(image, generator(0)), plain)
    for train_crop in ("none", "pad", "inception"):
        assert training(target, train_crop, 2, True, **options)(image, generator(0)).shape == (3, *target)


def test_a_very_long_image_is_cropped_before_it_would_fill_the_memory() -> None:
    long = np.zeros((1, 60_000, 3), dtype=np.uint8)
    long[:, 29_996:30_004] = 200  # the middle 8 : 1
    image = Image.fromarray(long)
    assert resize_for_crop(image, (16, 16), Preprocessing(crop_ratio=1.0)).size == (128, 16)
    assert (pixels(evaluation((16, 16), crop_ratio=1.0)(image)) == 200).all()


@pytest.mark.parametrize(("height", "width", "border"), [(6, 9, 2), (2, 3, 4), (1, 1, 3)])
def test_pad_crop_is_every_shift_of_the_reflected_image(height: int, width: int, border: int) -> None:
    image, view = photo(width, height), training((height, width), "pad", border, crop_ratio=1.0)
    padded = np.pad(np.asarray(image), ((border, border), (border, border), (0, 0)), "reflect")
    every = range(2 * border + 1)
    shifts = Counter(padded[y : y + height, x : x + width].tobytes() for y in every for x in every)
    drawn = Counter(pixels(view(image, generator(seed))).tobytes() for seed in range(60 * len(every) ** 2))
    assert drawn.keys() == shifts.keys()
    assert all(abs(drawn[shift] - 60 * times) < 5 * (60 * times) ** 0.5 for shift, times in shifts.items())


def test_half_of_the_images_are_mirrored() -> None:
    image, rng = photo(6, 4), generator(0)
    plain = np.asarray(image)
    view = training((4, 6), "none", flip=True, crop_ratio=1.0)
    views = [pixels(view(image, rng)).tobytes() for _ in range(5_000)]
    mirrored = views.count(plain[:, ::-1].tobytes())
    assert mirrored + views.count(plain.tobytes()) == 5_000
    assert chisquare([mirrored, 5_000 - mirrored]).pvalue > 1e-3


@pytest.mark.parametrize("crop", ["none", "pad", "inception"])
def test_an_augmented_view_is_a_function_of_its_generator(crop: str) -> None:
    image, view = photo(40, 30), training((16, 16), crop, 4, True, RandAugment(), 0.4)
    assert torch.equal(view(image, generator(3)), view(image, generator(3)))
    assert len({view(image, generator(seed)).numpy().tobytes() for seed in range(20)}) > 18


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(0, 9))
@example(1, 5000, 0)
@example(5000, 1, 0)
@example(1, 1, 0)
def test_inception_box_stays_within_image_area_and_aspect(height: int, width: int, seed: int) -> None:
    rng = generator(seed)
    for _ in range(20):
        box = left, top, right, bottom = inception_box(height, width, rng)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        if box == (0, 0, width, height):  # also where no box fits
            continue
        w, h = right - left, bottom - top
        assert 0.05 <= w * h / (height * width) <= 1
        assert w == 1 or (w + 0.5) / h >= 3 / 4  # the width is rounded
        assert (w - 0.5) / h <= 4 / 3


def test_an_image_that_no_box_fits_is_taken_whole() -> None:
    assert inception_box(5000, 1, generator(0)) == (0, 0, 1, 5000)


def uniform(fractions: np.ndarray, bins: int = 20) -> float:
    """p of a χ² test that they are uniform in [0, 1]; such as are outside by rounding count as at the ends."""
    assert fractions.min() > -0.01
    assert fractions.max() < 1.01
    return chisquare(np.histogram(fractions.clip(0, 1), bins, (0, 1))[0]).pvalue


def uniform_together(a: np.ndarray, b: np.ndarray) -> float:
    """The same for pairs: both uniform, and independent of each other."""
    cells, _, _ = np.histogram2d(a.clip(0, 1), b.clip(0, 1), bins=6, range=[(0, 1), (0, 1)])
    return chisquare(cells.ravel()).pvalue


def test_inception_box_draws_aspect_then_side_then_place_uniformly() -> None:
    side = 8000  # so large that rounding to pixels shows nowhere
    rng = generator(1)
    left, top, right, bottom = np.array([inception_box(side, side, rng) for _ in range(40_000)]).T
    w, h = right - left, bottom - top
    ratio, area = w / h, w * h / side**2
    aspect = (ratio - 3 / 4) / (4 / 3 - 3 / 4)
    least, most = side * (0.05 / ratio) ** 0.5, np.minimum(side, side / ratio)
    height = (h - least) / (most - least)
    roomy = (side - h > 800) & (side - w > 800)
    down, across = top[roomy] / (side - h)[roomy], left[roomy] / (side - w)[roomy]
    for fractions in (aspect, height, down, across):
        assert uniform(fractions) > 1e-3
    ranks = height[roomy].argsort().argsort() / roomy.sum()
    for pair in ((aspect, height), (down, across), (down, ranks)):
        assert uniform_together(*pair) > 1e-3
    assert area.mean() == pytest.approx(0.375, abs=0.004)  # torchvision, area uniform: 0.46


@pytest.mark.parametrize("crop", ["none", "pad", "inception"])
def test_without_them_randaugment_and_color_jitter_change_nothing_and_draw_nothing(crop: str) -> None:
    image = photo(40, 30)
    for seed in range(30):
        rng, by_hand = generator(seed), generator(seed)
        view = pixels(training((16, 24), crop, 3, True, None, 0.0)(image, rng))
        if crop == "inception":
            plain = np.asarray(image.resize((24, 16), Image.BILINEAR, inception_box(30, 40, by_hand)))
        else:
            plain = pixels(evaluation((16, 24))(image))
        if crop == "pad":
            down, right = by_hand.integers(-3, 4, 2)
            plain = np.pad(plain, ((3, 3), (3, 3), (0, 0)), "reflect")[3 + down :, 3 + right :][:16, :24]
        assert np.array_equal(view, plain[:, ::-1] if by_hand.random() < 0.5 else plain)
        assert rng.random() == by_hand.random()


@pytest.mark.parametrize("crop", ["none", "pad", "inception"])
def test_randaugment_comes_after_crop_and_flip(crop: str) -> None:
    image, randaugment = photo(40, 30), RandAugment(layers=2, magnitude=10)
    for seed in range(30):
        rng = generator(seed)
        plain = Image.fromarray(pixels(training((16, 24), crop, 3, True)(image, rng)))
        view = training((16, 24), crop, 3, True, randaugment)(image, generator(seed))
        assert np.array_equal(pixels(view), np.asarray(randaugment(plain, rng)))


# Color jitter


@pytest.mark.parametrize(("strength", "low", "high"), [(0.4, 0.6, 1.4), (1.5, 0.0, 2.5)])
def test_jitters_are_in_random_order_each_by_a_factor_of_its_own(
    strength: float, low: float, high: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, float]] = []

    def spy(self: ImageEnhance._Enhance, factor: float) -> Image.Image:
        seen.append((type(self).__name__, factor))
        return self.image

    monkeypatch.setattr(ImageEnhance._Enhance, "enhance", spy)
    image, rng = photo(2, 2), generator(0)
    view = training((2, 2), "none", color_jitter=strength, crop_ratio=1.0)
    for _ in range(2000):
        view(image, rng)
    assert len(seen) == 3 * 2000
    orders = [tuple(kind for kind, _ in seen[i : i + 3]) for i in range(0, len(seen), 3)]
    counts = [orders.count(order) for order in permutations(("Brightness", "Contrast", "Color"))]
    assert sum(counts) == 2000
    assert chisquare(counts).pvalue > 1e-3
    for name in ("Brightness", "Contrast", "Color"):
        factors = np.array([factor for kind, factor in seen if kind == name])
        assert uniform((factors - low) / (high - low)) > 1e-3
    first, second = ((np.array([f for _, f in seen[i::3]]) - low) / (high - low) for i in (0, 1))
    assert uniform_together(first, second) > 1e-3


def test_normalize_uses_the_mean_and_std_of_each_channel() -> None:
    """By default 0 becomes −1 and 255 exactly 1."""
    given_pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 3).expand(2, 3, 4, 3)
    found = normalize(given_pixels, Preprocessing())
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.tensor([-1, 1, -0.6]).expand(2, 3, 4, 3), atol=1e-6)
    assert (found[..., :2] == torch.tensor([-1, 1])).all()
    by_channel = Preprocessing(mean=(0, 0.25, 0.5), std=(1, 0.5, 0.25))
    assert torch.allclose(normalize(given_pixels, by_channel)[0, :, 0, 1], torch.tensor([1, 1.5, 2]))


def test_brightness_contrast_and_saturation_vary_each_by_itself() -> None:
    base, rng = np.array([[[140, 100, 100], [100, 60, 60]]], np.uint8), generator(0)
    weights = np.array([0.299, 0.587, 0.114])

    def measures(image: np.ndarray) -> tuple[float, float, float]:
        """Mean light, its spread, and color; they are multiplied by b, b · c and b · c · s, in any order."""
        light = image.astype(float) @ weights
        return light.mean(), light[0, 0] - light[0, 1], float(image[0, :, 0].mean() - image[0, :, 1].mean())

    view = training((1, 2), "none", color_jitter=0.3, crop_ratio=1.0)
    seen = np.array([measures(pixels(view(Image.fromarray(base), rng))) for _ in range(2000)]) / measures(base)
    factors = np.stack([seen[:, 0], seen[:, 1] / seen[:, 0], seen[:, 2] / seen[:, 1]], axis=1)
    assert factors.min() > 0.7 - 0.08  # levels are rounded
    assert factors.max() < 1.3 + 0.08
    assert factors.mean(axis=0) == pytest.approx([1, 1, 1], abs=0.03)
    assert factors.std(axis=0) == pytest.approx([0.6 / 12**0.5] * 3, rel=0.1)
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.15
