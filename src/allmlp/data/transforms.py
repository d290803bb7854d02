"""From upright RGB images to the pixels of a model's input, (3, H, W) uint8, in training, evaluation and prediction.

Every random choice is drawn from a generator that the caller passes, one for each sample and epoch.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from allmlp.data.randaugment import RandAugment
from allmlp.errors import UserError
from allmlp.metadata import Preprocessing

TrainCrop = Literal["none", "pad", "inception"]
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
MIN_CROP_AREA = 0.05  # smallest fraction of an image that the Inception crop keeps
MAX_ASPECT = 8  # longer images are cropped before resizing, so that a 1 × 60,000 image does not exhaust the memory


@dataclass(frozen=True, kw_only=True)
class EvaluationTransform:
    """Image → (3, H, W) uint8: resize and central crop, as the preprocessing says."""

    image_size: tuple[int, int]
    preprocessing: Preprocessing

    @property
    def min_side(self) -> int:
        """Pixels of the shorter side that decoding must keep: twice the size to which it is resized."""
        return 2 * round(max(self.image_size) / self.preprocessing.crop_ratio)

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Tensor:
        return to_tensor(resize_and_crop(image, self.image_size, self.preprocessing))


@dataclass(frozen=True, kw_only=True)
class TrainingTransform:
    """Image → (3, H, W) uint8, with random augmentation. The crop is one of

    - "none": as in evaluation;
    - "pad": as in evaluation, then shifted by up to ``crop_padding`` pixels in each direction, with reflected borders;
    - "inception": 5–100 % of the area at aspect ratio 3/4–4/3, resized (as in the paper, see ``inception_box``).

    It is followed by a horizontal flip, RandAugment, and ``color_jitter``: brightness, contrast and saturation, in
    random order, each multiplied by a factor drawn uniformly from 1 ± color_jitter (as in torchvision and timm).
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
        """Pixels of the shorter side that decoding must keep: enough for the smallest crop, or those of evaluation."""
        if self.crop == "inception":
            return round(max(self.image_size) / MIN_CROP_AREA**0.5)
        return EvaluationTransform(image_size=self.image_size, preprocessing=self.preprocessing).min_side

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        height, width = self.image_size
        if self.crop == "inception":
            box = inception_box(image.height, image.width, rng)
            image = image.resize((width, height), RESAMPLING[self.preprocessing.interpolation], box)
        else:
            image = resize_and_crop(image, self.image_size, self.preprocessing)
        if self.crop == "pad":
            down, right = rng.integers(-self.crop_padding, self.crop_padding + 1, 2)
            rows, columns = shifted_positions(height, down), shifted_positions(width, right)
            image = Image.fromarray(np.asarray(image)[rows[:, None], columns])
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.randaugment is not None:
            image = self.randaugment(image, rng)
        return to_tensor(jitter_color(image, self.color_jitter, rng) if self.color_jitter else image)


def jitter_color(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for i in rng.permutation(len(enhancers)):
        image = enhancers[i](image).enhance(rng.uniform(max(1 - strength, 0), 1 + strength))
    return image


def shifted_positions(size: int, shift: int) -> np.ndarray:
    """(size,) the positions shift, shift + 1, …, mirrored at the borders, without repeating the border pixel."""
    period = max(2 * (size - 1), 1)
    position = np.arange(shift, shift + size) % period
    return np.minimum(position, period - position)


def resize_and_crop(image: Image.Image, image_size: tuple[int, int], preprocessing: Preprocessing) -> Image.Image:
    """Resizes as ``preprocessing.crop`` says and returns the central (height, width) pixels."""
    height, width = image_size
    image = resize_for_crop(image, image_size, preprocessing)
    top, left = (image.height - height) // 2, (image.width - width) // 2
    return image.crop((left, top, left + width, top + height))


def resize_for_crop(image: Image.Image, image_size: tuple[int, int], preprocessing: Preprocessing) -> Image.Image:
    """Resizes as ``preprocessing.crop`` says. An image that it has resized, it returns as it is."""
    height, width = image_size
    resized = (round(height / preprocessing.crop_ratio), round(width / preprocessing.crop_ratio))
    if preprocessing.crop == "resmall":
        image = crop_to_aspect(image, MAX_ASPECT)
        scale = max(resized[0] / image.height, resized[1] / image.width)
        resized = (max(round(image.height * scale), height), max(round(image.width * scale), width))
    if resized != (image.height, image.width):
        image = image.resize((resized[1], resized[0]), RESAMPLING[preprocessing.interpolation])
    return image


def crop_to_aspect(image: Image.Image, limit: int) -> Image.Image:
    """Crops the longer side to at most ``limit`` times the shorter one, around the center."""
    width, height = min(image.width, limit * image.height), min(image.height, limit * image.width)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image if (width, height) == image.size else image.crop((left, top, left + width, top + height))


def inception_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    area: tuple[float, float] = (MIN_CROP_AREA, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a random crop, drawn like TensorFlow's sample_distorted_bounding_box.

    The aspect ratio (width / height) is uniform, and so is the height of the crop, between the heights that give the
    smallest and the largest area. So it is the side that is uniform, not the area: the mean area is 0.38 of a square
    image, against 0.46 in torchvision. After 100 draws that do not fit, the crop is the whole image.
    """
    for _ in range(100):
        ratio = rng.uniform(*aspect)
        low, high = (round((fraction * height * width / ratio) ** 0.5) for fraction in area)
        high = min(high, height, int((width + 0.4999) / ratio))
        if low > high or high < 1:
            continue
        crop_height = int(rng.integers(max(low, 1), high + 1))
        crop_width = min(max(round(crop_height * ratio), 1), width)
        if not area[0] <= crop_height * crop_width / (height * width) <= area[1]:
            continue
        top = int(rng.integers(0, height - crop_height + 1))
        left = int(rng.integers(0, width - crop_width + 1))
        return left, top, left + crop_width, top + crop_height
    return 0, 0, width, height


def to_tensor(image: Image.Image | np.ndarray) -> Tensor:
    """(H, W, 3) → (3, H, W) uint8."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def normalize(pixels: Tensor, preprocessing: Preprocessing, channels: int = 3) -> Tensor:
    """(B, 3, H, W) uint8 → (B, channels, H, W) float32, (x / 255 − mean) / std, on the same device.

    For a model of one channel, pixels become gray as in Pillow's mode L (ITU-R BT.601's luma).
    """
    scale, shift = scale_and_shift(preprocessing, pixels.device)
    if channels == 1:
        return to_gray(pixels).float() * scale.mean(0, keepdim=True) - shift.mean(0, keepdim=True)
    return pixels.float() * scale - shift


def to_gray(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) → (B, 1, H, W) uint8."""
    red, green, blue = pixels.to(torch.int32).split(1, dim=1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8)


def check_channels(channels: int) -> None:
    """Raises a UserError for a model that takes no images of a file: those have three channels, or one if gray."""
    if channels not in (1, 3):
        raise UserError(
            f"this model takes {channels} channels, and images of files have 3: call it on tensors (batch, {channels}, "
            "height, width) of your own"
        )


@functools.lru_cache(maxsize=16)
def scale_and_shift(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two tensors (3, 1, 1) on the device. Cached: copying them to a GPU at every step would stall it."""
    with torch.inference_mode(False):  # training cannot use tensors made in inference mode
        std = torch.tensor(preprocessing.std, device=device).view(-1, 1, 1)
        mean = torch.tensor(preprocessing.mean, device=device).view(-1, 1, 1)
        return 1 / (255 * std), mean / std
