"""Views of an image: sizes, crops, augmentation, and the input range."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mlp_mixer.card import Preprocessing
from mlp_mixer.data.transforms import EvaluationView, TrainingView, inception_box, normalise

SIZES = [(1, 1), (1, 5000), (5000, 1), (8, 8), (640, 480), (480, 640), (333, 77), (255, 256), (224, 224), (3, 900)]


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(view: Tensor) -> np.ndarray:
    """(3, H, W) → (H, W, 3)."""
    assert view.dtype == torch.uint8
    return view.permute(1, 2, 0).numpy()


def evaluation(image_size: tuple[int, int], **options) -> EvaluationView:
    return EvaluationView(image_size=image_size, preprocessing=Preprocessing(**options))


def training(
    image_size: tuple[int, int], train_crop: str, padding: int = 0, flip: bool = False, **options
) -> TrainingView:
    return TrainingView(
        image_size=image_size,
        preprocessing=Preprocessing(**options),
        crop=train_crop,  # pyright: ignore[reportArgumentType]
        crop_padding=padding,
        flip=flip,
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


def test_resize_crop_is_256_by_256_and_the_central_224() -> None:
    image = photo(640, 300)
    expected = np.asarray(image.resize((256, 256), Image.BILINEAR))[16:240, 16:240]
    assert np.array_equal(pixels(evaluation((224, 224), crop="resize")(image)), expected)


def test_other_sizes_keep_the_ratio() -> None:
    image = photo(700, 500)
    resized = np.asarray(image.resize((round(700 * 512 / 500), 512), Image.BILINEAR))
    left = (resized.shape[1] - 448) // 2
    assert np.array_equal(pixels(evaluation((448, 448))(image)), resized[32:480, left : left + 448])


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
        colours = {tuple(colour) for colour in np.asarray(image).reshape(-1, 3).tolist()}
        for seed in range(50):
            view = pixels(training((side, side), "pad", border, crop_ratio=1.0)(image, generator(seed)))
            assert view.shape == (side, side, 3)
            assert {tuple(colour) for colour in view.reshape(-1, 3).tolist()} <= colours


def test_about_half_of_the_images_are_mirrored() -> None:
    image = photo(6, 4)
    plain = np.asarray(image)
    view = training((4, 6), "none", flip=True, crop_ratio=1.0)
    views = [pixels(view(image, generator(seed))) for seed in range(2000)]
    mirrored = sum(np.array_equal(v, plain[:, ::-1]) for v in views)
    assert mirrored + sum(np.array_equal(v, plain) for v in views) == 2000
    assert abs(mirrored - 1000) < 5 * 500**0.5


@pytest.mark.parametrize("crop", ["pad", "inception"])
def test_an_augmented_view_is_a_function_of_its_generator(crop: str) -> None:
    image, view = photo(40, 30), training((16, 16), crop, 4, True)
    assert torch.equal(view(image, generator(3)), view(image, generator(3)))
    assert len({view(image, generator(seed)).numpy().tobytes() for seed in range(20)}) > 10


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


def test_inception_box_draws_the_side_uniformly() -> None:
    rng = generator(1)
    boxes = np.array([inception_box(256, 256, rng) for _ in range(20_000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (w * h).mean() / 256**2 == pytest.approx(0.38, abs=0.01)  # torchvision, area uniform: 0.47
    assert np.log(w / h).mean() == pytest.approx(0.02, abs=0.03)
    for free, start in ((256 - w, boxes[:, 0]), (256 - h, boxes[:, 1])):  # every place alike
        assert (start[free > 0] / free[free > 0]).mean() == pytest.approx(0.5, abs=0.015)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (5000, 1), (2, 3), (1, 2)])
def test_inception_box_of_odd_images_is_never_empty(height: int, width: int) -> None:
    rng = generator(0)
    for _ in range(50):
        left, top, right, bottom = inception_box(height, width, rng)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def test_an_image_that_no_box_fits_is_taken_whole() -> None:
    assert inception_box(5000, 1, generator(0)) == (0, 0, 1, 5000)


def test_normalise_maps_0_to_minus_1_and_255_to_1() -> None:
    given = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 3).expand(2, 3, 4, 3)
    found = normalise(given, Preprocessing())
    assert found.dtype == torch.float32
    assert found.shape == (2, 3, 4, 3)
    assert torch.allclose(found, torch.tensor([-1, 1, -0.6]).expand(2, 3, 4, 3), atol=1e-6)
    assert (found[..., 0] == -1).all()
    assert (found[..., 1] == 1).all()


def test_normalise_uses_the_mean_and_std_of_each_channel() -> None:
    preprocessing = Preprocessing(mean=(0, 0.25, 0.5), std=(1, 0.5, 0.25))
    found = normalise(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8), preprocessing)
    assert torch.allclose(found.flatten(), torch.tensor([1, 1.5, 2]))
