"""RandAugment (Cubuk et al. 2020) as in the authors' TensorFlow code, where magnitudes are not clipped at 10.

Each layer applies one of 16 operations, drawn uniformly with replacement. Geometric operations have a random sign.
Pixels from outside the image are gray (128); positions are rounded to the nearest pixel. Pillow's functions are used
where they agree with the reference; comments say where they do not.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

FILL_COLOR = (128, 128, 128)
REFERENCE_SIDE = 224  # strengths in pixels are for images of this side and scale with it
CONTRAST_GRAY = REFERENCE_SIDE**2 // 256  # the reference uses number of pixels / 256, apparently meant as the mean
GRAY_WEIGHTS = (*(255.5 / 255 * w for w in (0.2989, 0.587, 0.114)), -0.5)  # truncates like the reference; Pillow rounds
TIE_SHIFT = 1 / 256  # pixels; moves a position halfway between two pixels to the right, as the reference rounds
LEVELS = np.arange(256)
CHANNEL_OFFSETS = np.array([0, 256, 512], np.uint16)  # of each channel in a flattened (3, 256) table

# The blur behind "sharpness", in 13ths; the offset truncates like the reference, where Pillow rounds
BLUR = ImageFilter.Kernel((3, 3), (1, 1, 1, 1, 5, 1, 1, 1, 1), scale=13, offset=-0.49)

# The strength of magnitude m. RandAugment was published with m up to 10; the Mixer paper uses up to 20
STRENGTHS: dict[str, Callable[[float], float]] = {
    "autocontrast": lambda m: 0,
    "equalize": lambda m: 0,
    "invert": lambda m: 0,
    "rotate": lambda m: m / 10 * 30,  # degrees
    "posterize": lambda m: min(int(m / 10 * 4), 8),  # bits that are kept: weaker with m, without effect from 20 on
    "solarize": lambda m: int(m / 10 * 256) % 256,  # inverts from this level up; the reference's is a uint8 and wraps
    "color": lambda m: m / 10 * 1.8 + 0.1,  # 0: gray, 1: unchanged, above 1: more color; the next three alike
    "contrast": lambda m: m / 10 * 1.8 + 0.1,
    "brightness": lambda m: m / 10 * 1.8 + 0.1,
    "sharpness": lambda m: m / 10 * 1.8 + 0.1,
    "shear_x": lambda m: m / 10 * 0.3,  # columns per row
    "shear_y": lambda m: m / 10 * 0.3,
    "translate_x": lambda m: m / 10 * 100,  # pixels of a 224-pixel image
    "translate_y": lambda m: m / 10 * 100,
    "cutout": lambda m: int(m / 10 * 40),  # half the side of the gray square, in pixels of a 224-pixel image
    "solarize_add": lambda m: int(m / 10 * 110),  # added to levels below 128
}
OPERATIONS = tuple(STRENGTHS)
SIGNED = frozenset({"rotate", "shear_x", "shear_y", "translate_x", "translate_y"})


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """RGB image → RGB image of the same size.

    Args:
        layers: number of operations, applied in sequence (2 in the paper).
        magnitude: magnitude of every operation (10, 15 or 20 in Table 4 of the paper).
    """

    layers: int = 2
    magnitude: float = 15

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        for choice, sign, down, right in rng.random((self.layers, 4)).tolist():
            name = OPERATIONS[int(choice * len(OPERATIONS))]
            strength = STRENGTHS[name](self.magnitude)
            signed = -strength if name in SIGNED and sign < 0.5 else strength
            image = apply_operation(image, name, signed, (down, right))
        return image


def apply_operation(
    image: Image.Image, name: str, strength: float, center: tuple[float, float] = (0.5, 0.5)
) -> Image.Image:
    """Applies one operation. ``center`` is used by cutout only: (down, right) as fractions of the sides."""
    width, height = image.size
    match name:
        case "autocontrast":
            return map_levels(image, autocontrast_table(image))
        case "equalize":
            return map_levels(image, equalize_table(image))
        case "invert" | "posterize" | "solarize" | "solarize_add" | "brightness" | "contrast":
            return map_levels(image, level_table(name, strength))
        case "color":
            return Image.blend(image.convert("L", GRAY_WEIGHTS).convert("RGB"), image, strength)
        case "sharpness":
            return Image.blend(image.filter(BLUR), image, strength)
        case "rotate":
            return image.rotate(strength, Image.Resampling.NEAREST, fillcolor=FILL_COLOR)
        case "shear_x":  # Pillow transforms the centers of pixels, the reference their corners: half a pixel apart
            return transform_affine(image, (1, strength, TIE_SHIFT - strength / 2, 0, 1, 0))
        case "shear_y":
            return transform_affine(image, (1, 0, 0, strength, 1, TIE_SHIFT - strength / 2))
        case "translate_x":
            return transform_affine(image, (1, 0, strength * width / REFERENCE_SIDE, 0, 1, 0))
        case "translate_y":
            return transform_affine(image, (1, 0, 0, 0, 1, strength * height / REFERENCE_SIDE))
        case "cutout":
            row, column = int(center[0] * height), int(center[1] * width)
            half_height, half_width = (round(strength * side / REFERENCE_SIDE) for side in (height, width))
            image = image.copy()
            box = (column - half_width, row - half_height, column + half_width, row + half_height)
            image.paste(FILL_COLOR, (max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height)))
            return image
    raise AssertionError(name)


def transform_affine(image: Image.Image, coefficients: Sequence[float]) -> Image.Image:
    """Takes the pixel at (x, y) from (a x + b y + c, d x + e y + f), for coefficients (a, b, c, d, e, f)."""
    return image.transform(
        image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.NEAREST, fillcolor=FILL_COLOR
    )


def map_levels(image: Image.Image, table: np.ndarray) -> Image.Image:
    """Replaces each level by its entry in ``table``, uint8: (256,), or (3, 256) with one row per channel."""
    if image.width * image.height > 150 * 150:
        return image.point(np.broadcast_to(table, (3, 256)).ravel().tolist())
    if table.ndim == 1:  # Pillow needs 40 µs to read a table, several times the cost of a small image
        return Image.frombytes("RGB", image.size, image.tobytes().translate(table.tobytes()))
    return Image.fromarray(table.ravel().take(np.asarray(image) + CHANNEL_OFFSETS))


def autocontrast_table(image: Image.Image) -> np.ndarray:
    """(3, 256): stretches each channel to 0–255; a channel with a single level is unchanged."""
    low, high = np.array(image.getextrema(), np.float64).T[..., None]  # each (3, 1)
    factor = 255 / np.maximum(high - low, 1)
    table = np.clip(LEVELS * factor - low * factor, 0, 255)
    return np.where(low < high, table, LEVELS).astype(np.uint8)


def equalize_table(image: Image.Image) -> np.ndarray:
    """(3, 256): histogram equalization of each channel; a channel that has almost a single level is unchanged."""
    counts = np.array(image.histogram()).reshape(3, 256)
    last = 255 - (counts[:, ::-1] > 0).argmax(1)
    step = (image.width * image.height - counts[(0, 1, 2), last][:, None]) // 255
    table = np.minimum((step // 2 + counts.cumsum(1) - counts) // np.maximum(step, 1), 255)
    return np.where(step > 0, table, LEVELS).astype(np.uint8)


@functools.lru_cache(maxsize=64)
def level_table(name: str, strength: float) -> np.ndarray:
    """(256,): the new level of each level, for operations that depend on nothing else."""
    table = {
        "invert": lambda: 255 - LEVELS,
        "posterize": lambda: LEVELS >> (8 - int(strength)) << (8 - int(strength)),
        "solarize": lambda: np.where(strength > LEVELS, LEVELS, 255 - LEVELS),
        "solarize_add": lambda: np.where(LEVELS < 128, LEVELS + strength, LEVELS),
        "brightness": lambda: LEVELS * strength,
        "contrast": lambda: CONTRAST_GRAY + strength * (LEVELS - CONTRAST_GRAY),
    }[name]()
    return np.clip(table, 0, 255).astype(np.uint8)  # truncated, as the reference does
