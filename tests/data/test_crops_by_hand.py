"""Sizes and offsets of the crops, worked out by hand."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from allmlp.data.transforms import EvaluationTransform, inception_box
from allmlp.metadata import Preprocessing

# (width, height), (height, width) of the view, preprocessing → width and height when resized, left and top of the crop
EVALUATION: list[tuple] = [
    ((500, 375), (224, 224), {}, (341, 256), (58, 16)),  # 500 · 256 / 375 = 341.3; (341 − 224) / 2 = 58.5
    ((333, 500), (224, 224), {"interpolation": "nearest"}, (256, 384), (16, 80)),  # 384.4
    ((100, 130), (224, 224), {"interpolation": "bicubic"}, (256, 333), (16, 54)),  # 332.8; 54.5
    ((500, 375), (448, 448), {}, (683, 512), (117, 32)),  # 682.7; 117.5
    ((640, 480), (160, 160), {}, (244, 183), (42, 11)),  # 160 · 256 / 224 = 182.9; 640 · 182.9 / 480, of 183: 244
    ((500, 375), (224, 224), {"crop": "resize"}, (256, 256), (16, 16)),
    ((500, 375), (448, 448), {"crop": "resize", "interpolation": "bicubic"}, (512, 512), (32, 32)),
    ((90, 60), (40, 240), {"crop_ratio": 1.0}, (240, 160), (0, 60)),  # 240 wide at least: the height follows
    ((256, 256), (224, 224), {}, (256, 256), (16, 16)),
    ((40, 24), (24, 40), {"crop_ratio": 1.0}, (40, 24), (0, 0)),
]


@pytest.mark.parametrize(("given", "size", "options", "resized", "offset"), EVALUATION)
def test_evaluation_crop(given: tuple, size: tuple, options: dict, resized: tuple, offset: tuple) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*given[::-1], 3), dtype=np.uint8))
    (height, width), (left, top) = size, offset
    resampling = Image.Resampling[options.get("interpolation", "bilinear").upper()]
    expected = np.asarray(image.resize(resized, resampling))[top : top + height, left : left + width]
    view = EvaluationTransform(image_size=size, preprocessing=Preprocessing(**options))(image)
    assert np.array_equal(view.permute(1, 2, 0).numpy(), expected)


class Scripted:
    """A generator that returns given numbers, and records the ranges from which they should be drawn."""

    def __init__(self, *numbers: float) -> None:
        self.numbers, self.ranges = iter(numbers), []

    def uniform(self, low: float, high: float) -> float:
        self.ranges.append((low, high))
        return next(self.numbers)

    integers = uniform  # the upper limit is excluded


# (height, width), numbers drawn (aspect, height, top, left) → their ranges, and left, top, right, bottom
TRAINING = [
    # √(0.05 · 20000) = 31.6; the whole area has a height of 141, more than the image
    ((100, 200), (1.0, 40, 60, 160), [(32, 101), (0, 61), (0, 161)], (160, 60, 200, 100)),
    # √(0.05 · 20000 / 0.8) = 35.4; the width of 100 allows a height of 100.4999 / 0.8 = 125; 0.8 · 113 = 90.4
    ((200, 100), (0.8, 113, 0, 3), [(35, 126), (0, 88), (0, 11)], (3, 0, 93, 113)),
    # 8 × 8: √(3.2 / 1.2) = 1.6 → 2; 8.4999 / 1.2 = 7.1 → 7; 1.2 · 7 = 8.4 → 8
    ((8, 8), (1.2, 7, 1, 0), [(2, 8), (0, 2), (0, 1)], (0, 1, 8, 8)),
]


@pytest.mark.parametrize(("size", "drawn", "ranges", "box"), TRAINING)
def test_training_crop(size: tuple[int, int], drawn: tuple, ranges: list, box: tuple) -> None:
    rng: Any = Scripted(*drawn)
    assert inception_box(*size, rng) == box
    assert rng.ranges == [(3 / 4, 4 / 3), *ranges]


def test_a_training_crop_that_rounding_leaves_too_small_is_drawn_again() -> None:
    """6 × 6: 5 % are 1.8 pixels, √(1.8 / 1.33) = 1.16 → 1; one row of 1.33 → 1 pixels is too little, two of 3 fit."""
    rng: Any = Scripted(1.33, 1, 1.33, 2, 0, 0)
    assert inception_box(6, 6, rng) == (0, 0, 3, 2)
