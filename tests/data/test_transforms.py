"""Image transforms: sizes, crops, augmentation, and the input range."""

from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from scipy.stats import chisquare
from torch import Tensor

from allmlp.data.randaugment import RandAugment
from allmlp.data.transforms import EvaluationTransform, TrainingTransform, inception_box, normalize
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
    train_crop: str,
    padding: int = 0,
    flip: bool = False,
    randaugment: RandAugment | None = None,
    color_jitter: float = 0.0,
    **options,
) -> TrainingTransform:
    return TrainingTransform(
        image_size=image_size,
        preprocessing=Preprocessing(**options),
        crop=train_crop,  # pyright: ignore[reportArgumentType]
        crop_padding=padding,
        flip=flip,
        randaugment=randaugment,
        color_jitter=color_jitter,
    )


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", [(8, 8), (64, 64), (24, 96), (100, 12), (1, 5)])
@pytest.mark.parametrize("crop", ["resmall", "resize"])
@pytest.mark.parametrize("ratio", [224 / 256, 1.0, 0.5])
def test_evaluation_view_has_the_models_size(size: tuple, target: tuple, crop: str, ratio: float) -> None:
    image = photo(*size)
    assert evaluation(target, crop=crop, crop_ratio=ratio)(image).shape == (3, *target)
    for train_crop in ("none", "pad", "inception"):
        view = training(target, train_crop, 2, True, crop=crop, crop_ratio=ratio)
        assert view(image, generator(0)).shape == (3, *target)


def test_a_target_of_one_pixel() -> None:
    assert evaluation((1, 1))(photo(9, 9)).shape == (3, 1, 1)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(("width", "height"), [(640, 480), (480, 640), (300, 300), (256, 700), (100, 130)])
def test_resmall_crop_is_the_shorter_side_to_256_and_the_central_224(width, height, interpolation) -> None:
    image = photo(width, height)
    shorter = min(width, height)
    resample = {"nearest": Image.NEAREST, "bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}[interpolation]
    resized = image.resize((round(width * 256 / shorter), round(height * 256 / shorter)), resample)
    top, left = (resized.height - 224) // 2, (resized.width - 224) // 2
    expected = np.asarray(resized)[top : top + 224, left : left + 224]
    assert np.array_equal(pixels(evaluation((224, 224), interpolation=interpolation)(image)), expected)


def test_a_rectangular_target_is_covered_by_the_resized_image() -> None:
    image = photo(90, 60)
    expected = np.asarray(image.resize((240, 160), Image.BILINEAR))[60:100]  # 240 wide at least: the height follows
    assert np.array_equal(pixels(evaluation((40, 240), crop_ratio=1.0)(image)), expected)


@pytest.mark.parametrize("crop", ["resmall", "resize"])
def test_an_image_of_the_right_size_is_not_resized(crop: str) -> None:
    image = photo(40, 24)
    view = evaluation((24, 40), crop=crop, crop_ratio=1.0, interpolation="bicubic")
    assert np.array_equal(pixels(view(image)), np.asarray(image))
    larger = photo(256, 256)
    assert np.array_equal(pixels(evaluation((224, 224), crop=crop)(larger)), np.asarray(larger)[16:240, 16:240])


def test_of_a_very_long_image_the_middle_is_seen() -> None:
    long = np.zeros((4, 4000, 3), dtype=np.uint8)
    long[:, 1984:2016] = 200  # the middle 8 : 1
    assert (pixels(evaluation((16, 16), crop_ratio=1.0)(Image.fromarray(long))) == 200).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop", ["resmall", "resize"])
def test_training_without_augmentation_is_the_evaluation_view(size: tuple, crop: str) -> None:
    image = photo(*size)
    plain = evaluation((32, 48), crop=crop)(image)
    assert torch.equal(training((32, 48), "none", crop=crop)(image, generator(0)), plain)
    assert torch.equal(training((32, 48), "pad", 0, crop=crop)(image, generator(0)), plain)


@pytest.mark.parametrize(("height", "width", "border"), [(8, 8, 1), (8, 8, 2), (6, 9, 3)])
def test_pad_crop_is_every_shift_of_the_reflected_image(height: int, width: int, border: int) -> None:
    image = photo(width, height)
    at = np.asarray(image)

    def reflected(n: int, shift: int) -> list[int]:  # the border pixel itself is not repeated
        return [n - 1 - abs(n - 1 - abs(i + shift)) for i in range(n)]

    shifts = {
        at[reflected(height, dy)][:, reflected(width, dx)].tobytes()
        for dy in range(-border, border + 1)
        for dx in range(-border, border + 1)
    }
    view = training((height, width), "pad", border, crop_ratio=1.0)
    drawn = [pixels(view(image, generator(seed))).tobytes() for seed in range(60 * len(shifts))]
    assert set(drawn) == shifts
    counts = [drawn.count(shift) for shift in shifts]
    assert len(shifts) == (2 * border + 1) ** 2
    assert 60 - 5 * 60**0.5 < min(counts) <= max(counts) < 60 + 5 * 60**0.5


def test_pad_crop_of_an_image_smaller_than_its_border() -> None:
    for side, border in ((1, 4), (2, 9), (3, 3)):
        image = photo(side, side)
        colors = {tuple(color) for color in np.asarray(image).reshape(-1, 3).tolist()}
        for seed in range(50):
            view = pixels(training((side, side), "pad", border, crop_ratio=1.0)(image, generator(seed)))
            assert view.shape == (side, side, 3)
            assert {tuple(color) for color in view.reshape(-1, 3).tolist()} <= colors


def test_half_of_the_images_are_mirrored() -> None:
    image, rng = photo(6, 4), generator(0)
    plain = np.asarray(image)
    view = training((4, 6), "none", flip=True, crop_ratio=1.0)
    views = [pixels(view(image, rng)).tobytes() for _ in range(20_000)]
    mirrored = views.count(plain[:, ::-1].tobytes())
    assert mirrored + views.count(plain.tobytes()) == 20_000
    assert chisquare([mirrored, 20_000 - mirrored]).pvalue > 1e-3


def test_inception_crop_is_the_box_resized() -> None:
    image = photo(60, 45)
    for seed in range(20):
        box = inception_box(45, 60, generator(seed))
        expected = np.asarray(image.resize((24, 16), Image.BILINEAR, box))
        assert np.array_equal(pixels(training((16, 24), "inception")(image, generator(seed))), expected)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (480, 640), (640, 480), (32, 32), (200, 600), (8, 8)])
def test_inception_box_stays_within_image_area_and_aspect(height: int, width: int) -> None:
    rng = generator(0)
    boxes = np.array([inception_box(height, width, rng) for _ in range(2000)])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= width
    assert bottom.max() <= height
    w, h = right - left, bottom - top
    share = w * h / (height * width)
    assert 0.05 <= share.min() < share.max() <= 1
    assert ((w + 0.5) / h >= 3 / 4).all()  # the width is rounded
    assert ((w - 0.5) / h <= 4 / 3).all()
    assert len(np.unique(boxes, axis=0)) > (1500 if height > 100 else 50)


def uniform(fractions: np.ndarray, bins: int = 20) -> float:
    """p of a χ² test that they are uniform in [0, 1]; such as are outside by rounding count as at the ends."""
    assert fractions.min() > -0.01
    assert fractions.max() < 1.01
    return chisquare(np.histogram(fractions.clip(0, 1), bins, (0, 1))[0]).pvalue


def uniform_together(a: np.ndarray, b: np.ndarray) -> float:
    """The same for pairs: both uniform, and independent of each other."""
    cells, _, _ = np.histogram2d(a.clip(0, 1), b.clip(0, 1), bins=6, range=[(0, 1), (0, 1)])
    return chisquare(cells.ravel()).pvalue


# Large enough that rounding to pixels shows nowhere but in the last bins' last hundredth
@pytest.mark.parametrize(("height", "width"), [(8000, 8000), (6000, 9000)])
def test_inception_box_draws_aspect_then_side_then_place_uniformly(height: int, width: int) -> None:
    rng = generator(1)
    left, top, right, bottom = np.array([inception_box(height, width, rng) for _ in range(100_000)]).T
    w, h = right - left, bottom - top
    ratio = w / h
    aspect = (ratio - 3 / 4) / (4 / 3 - 3 / 4)
    assert uniform(aspect) > 1e-3
    least = (0.05 * height * width / ratio) ** 0.5
    most = np.minimum(np.minimum((height * width / ratio) ** 0.5, height), width / ratio)
    side = (h - least) / (most - least)
    assert uniform(side) > 1e-3
    assert uniform_together(aspect, side) > 1e-3
    area = w * h / (height * width)
    assert area.min() >= 0.05
    assert area.max() <= 1
    roomy = (height - h > 800) & (width - w > 800)
    down, across = top[roomy] / (height - h)[roomy], left[roomy] / (width - w)[roomy]
    assert uniform(down) > 1e-3
    assert uniform(across) > 1e-3
    assert uniform_together(down, across) > 1e-3
    assert uniform_together(down, side[roomy].argsort().argsort() / roomy.sum()) > 1e-3
    wanted = ratio * (least**2 + least * most + most**2) / 3 / (height * width)  # h uniform: the mean of h² ratio
    assert area.mean() == pytest.approx(wanted.mean(), abs=0.005)
    if height == width:
        assert area.mean() == pytest.approx(0.375, abs=0.004)  # torchvision, area uniform: 0.46


def test_every_place_of_a_small_box_is_drawn_alike() -> None:
    rng = generator(2)
    boxes = [inception_box(6, 6, rng) for _ in range(20_000)]
    for side in (2, 3, 4):
        places = [(left, top) for left, top, right, bottom in boxes if right - left == bottom - top == side]
        free = 6 - side + 1  # TensorFlow leaves out the last of them
        counts = np.bincount([left * free + top for left, top in places], minlength=free * free)
        assert len(counts) == free * free
        assert chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (5000, 1), (2, 3), (1, 2)])
def test_inception_box_of_odd_images_is_never_empty(height: int, width: int) -> None:
    rng = generator(0)
    for _ in range(50):
        left, top, right, bottom = inception_box(height, width, rng)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def test_an_image_that_no_box_fits_is_taken_whole() -> None:
    assert inception_box(5000, 1, generator(0)) == (0, 0, 1, 5000)


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


def test_a_gray_image_is_as_bright_as_its_factor() -> None:
    gray, rng = Image.new("RGB", (2, 2), (100, 100, 100)), generator(0)
    view = training((2, 2), "none", color_jitter=0.4, crop_ratio=1.0)
    levels = [np.unique(pixels(view(gray, rng))) for _ in range(8000)]
    assert {len(level) for level in levels} == {1}  # contrast and saturation leave it gray
    counts = np.bincount([int(level[0]) for level in levels], minlength=256)
    assert counts[:60].sum() == counts[140:].sum() == 0
    assert chisquare(counts[60:140]).pvalue > 1e-3  # truncated: 60 is [0.6, 0.61)


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
    for _ in range(6000):
        view(image, rng)
    assert len(seen) == 3 * 6000
    orders = [tuple(kind for kind, _ in seen[i : i + 3]) for i in range(0, len(seen), 3)]
    counts = [orders.count(order) for order in permutations(("Brightness", "Contrast", "Color"))]
    assert sum(counts) == 6000
    assert chisquare(counts).pvalue > 1e-3
    for name in ("Brightness", "Contrast", "Color"):
        factors = np.array([factor for kind, factor in seen if kind == name])
        assert uniform((factors - low) / (high - low)) > 1e-3
    first, second = ((np.array([f for _, f in seen[i::3]]) - low) / (high - low) for i in (0, 1))
    assert uniform_together(first, second) > 1e-3


def test_a_jittered_view_is_a_function_of_its_generator() -> None:
    image, view = photo(40, 30), training((16, 16), "inception", 0, True, RandAugment(), 0.4)
    assert torch.equal(view(image, generator(3)), view(image, generator(3)))
    assert len({view(image, generator(seed)).numpy().tobytes() for seed in range(20)}) > 18


def test_normalize_maps_0_to_minus_1_and_255_to_1() -> None:
    given = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 3).expand(2, 3, 4, 3)
    found = normalize(given, Preprocessing())
    assert found.dtype == torch.float32
    assert found.shape == (2, 3, 4, 3)
    assert torch.allclose(found, torch.tensor([-1, 1, -0.6]).expand(2, 3, 4, 3), atol=1e-6)
    assert (found[..., 0] == -1).all()
    assert (found[..., 1] == 1).all()


def test_normalize_uses_the_mean_and_std_of_each_channel() -> None:
    preprocessing = Preprocessing(mean=(0, 0.25, 0.5), std=(1, 0.5, 0.25))
    found = normalize(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8), preprocessing)
    assert torch.allclose(found.flatten(), torch.tensor([1, 1.5, 2]))
