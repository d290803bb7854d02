"""Upright RGB images to the model's pixels: (3, H, W) uint8, the same code in training, evaluation and prediction.

Every random choice is drawn from the generator that is passed in, which belongs to one sample of one epoch.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from allmlp.data.randaugment import RandAugment
from allmlp.metadata import Preprocessing

TrainCrop = Literal["none", "pad", "inception"]
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
LEAST_AREA = 0.05  # of an image, that the Inception crop keeps
LONGEST = 8  # a side is cut to this many times the other before resizing: a 1 × 60,000 image must not fill the memory


@dataclass(frozen=True, kw_only=True)
class EvaluationView:
    """Image → (3, H, W) uint8: the resize and central crop that the preprocessing names."""

    image_size: tuple[int, int]
    preprocessing: Preprocessing

    @property
    def min_side(self) -> int:
        """Pixels of an image's shorter side that suffice: twice what it is resized to."""
        return 2 * round(max(self.image_size) / self.preprocessing.crop_ratio)

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Tensor:
        return to_tensor(central(image, self.image_size, self.preprocessing))


@dataclass(frozen=True, kw_only=True)
class TrainingView:
    """Image → (3, H, W) uint8, augmented by the generator of its sample. The crop is one of

    - "none": the evaluation view;
    - "pad": the evaluation view, shifted by up to ``crop_padding`` pixels each way, the border reflected;
    - "inception": 5–100 % of the area at aspect 3/4–4/3, resized (the paper's, see ``inception_box``).

    Then come the flip, RandAugment, and ``color_jitter``: brightness, contrast and saturation, in random order, each
    times a factor that is uniform in 1 ± color_jitter (torchvision's and timm's).
    """

    image_size: tuple[int, int]
    preprocessing: Preprocessing
    crop: TrainCrop
    crop_padding: int
    flip: bool
    randaugment: RandAugment | None = None
    color_jitter: float = 0.0

    @property
    def min_side(self) -> int:
        """Pixels of an image's shorter side that suffice: those of the smallest crop, or the evaluation view's."""
        if self.crop == "inception":
            return round(max(self.image_size) / LEAST_AREA**0.5)
        return EvaluationView(image_size=self.image_size, preprocessing=self.preprocessing).min_side

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        height, width = self.image_size
        if self.crop == "inception":
            box = inception_box(image.height, image.width, rng)
            view = image.resize((width, height), RESAMPLING[self.preprocessing.interpolation], box)
        else:
            view = central(image, self.image_size, self.preprocessing)
        if self.crop == "pad":
            down, right = rng.integers(-self.crop_padding, self.crop_padding + 1, 2)
            view = Image.fromarray(np.asarray(view)[reflected(height, down)[:, None], reflected(width, right)])
        if self.flip and rng.random() < 0.5:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.randaugment is not None:
            view = self.randaugment(view, rng)
        return to_tensor(jittered(view, self.color_jitter, rng) if self.color_jitter else view)


def jittered(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for i in rng.permutation(len(kinds)):
        image = kinds[i](image).enhance(rng.uniform(max(1 - strength, 0), 1 + strength))
    return image


def reflected(size: int, shift: int) -> np.ndarray:
    """(size,) the positions shift, shift + 1, …, those outside mirrored at the border, which is not doubled."""
    period = max(2 * (size - 1), 1)
    position = np.arange(shift, shift + size) % period
    return np.minimum(position, period - position)


def central(image: Image.Image, image_size: tuple[int, int], preprocessing: Preprocessing) -> Image.Image:
    height, width = image_size
    between = (round(height / preprocessing.crop_ratio), round(width / preprocessing.crop_ratio))
    if preprocessing.crop == "resmall":
        image = cut_to_aspect(image, LONGEST)
        scale = max(between[0] / image.height, between[1] / image.width)
        between = (max(round(image.height * scale), height), max(round(image.width * scale), width))
    if between != (image.height, image.width):
        image = image.resize((between[1], between[0]), RESAMPLING[preprocessing.interpolation])
    top, left = (between[0] - height) // 2, (between[1] - width) // 2
    return image.crop((left, top, left + width, top + height))


def cut_to_aspect(image: Image.Image, limit: int) -> Image.Image:
    width, height = min(image.width, limit * image.height), min(image.height, limit * image.width)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image if (width, height) == image.size else image.crop((left, top, left + width, top + height))


def inception_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    area: tuple[float, float] = (LEAST_AREA, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a random crop as TensorFlow's sample_distorted_bounding_box draws it.

    The aspect (width / height) is uniform, then the crop's height, between those that give the least and the greatest
    area: the side is uniform, not the area (mean area 0.38 of a square image; torchvision's is 0.46). After 100 draws
    that do not fit, the whole image.
    """
    for _ in range(100):
        ratio = rng.uniform(*aspect)
        least, most = (round((share * height * width / ratio) ** 0.5) for share in area)
        most = min(most, height, int((width + 0.4999) / ratio))
        if least > most or most < 1:
            continue
        crop_height = int(rng.integers(max(least, 1), most + 1))
        crop_width = min(max(round(crop_height * ratio), 1), width)
        if not area[0] <= crop_height * crop_width / (height * width) <= area[1]:
            continue
        top = int(rng.integers(0, height - crop_height + 1))
        left = int(rng.integers(0, width - crop_width + 1))
        return left, top, left + crop_width, top + crop_height
    return 0, 0, width, height


def to_tensor(image: Image.Image | np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """(B, 3, H, W) uint8 → float32 in the input range, on the pixels' device."""
    scale, shift = scale_and_shift(preprocessing, pixels.device)
    return pixels.float() * scale - shift


@functools.lru_cache(maxsize=16)
def scale_and_shift(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each (3, 1, 1). Kept, since a GPU would wait for them to be copied at every step."""
    with torch.inference_mode(False):  # or what an evaluation made first, training could not use
        std = torch.tensor(preprocessing.std, device=device).view(-1, 1, 1)
        mean = torch.tensor(preprocessing.mean, device=device).view(-1, 1, 1)
        return 1 / (255 * std), mean / std
