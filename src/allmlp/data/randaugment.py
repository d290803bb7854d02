"""RandAugment (Cubuk et al. 2020) as the paper's reference draws it: TensorFlow's, magnitudes not clipped at 10.

Each layer draws one of the 16 operations, all equally likely, with replacement, and always applies it; geometric ones
go either way with probability ½. Pixels that come from outside are grey (128); positions are rounded to the nearest.
Pillow's functions do the work where they agree with the reference; the comments say where they do not.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

FILL = (128, 128, 128)
SIDE = 224  # of the images that strengths in pixels are meant for
CONTRAST_GREY = SIDE * SIDE // 256  # where their mean was meant, the reference has the number of pixels / 256
GREY = (*(255.5 / 255 * share for share in (0.2989, 0.587, 0.114)), -0.5)  # truncated, where Pillow would round
TIE = 1 / 256  # pixels, by which a position halfway between two is sent to the right, as the reference rounds
LEVEL = np.arange(256)
CHANNEL = np.array([0, 256, 512], np.uint16)  # where each channel's levels begin in a table of all three

# 13ths, as the reference smooths before it sharpens; it truncates, where Pillow would round
SMOOTH = ImageFilter.Kernel((3, 3), (1, 1, 1, 1, 5, 1, 1, 1, 1), scale=13, offset=-0.49)

# What a magnitude m means; m = 10 is the strongest that the authors of RandAugment named, the paper goes to 20
STRENGTHS: dict[str, Callable[[float], float]] = {
    "autocontrast": lambda m: 0,
    "equalize": lambda m: 0,
    "invert": lambda m: 0,
    "rotate": lambda m: m / 10 * 30,  # degrees
    "posterize": lambda m: min(int(m / 10 * 4), 8),  # bits that stay: weaker with m, and nothing from 20 on
    "solarize": lambda m: min(int(m / 10 * 256), 256),  # inverts from this level on: weaker with m, nothing from 10 on
    "color": lambda m: m / 10 * 1.8 + 0.1,  # 0 grey, 1 as it is, above 1 more colour; the next three likewise
    "contrast": lambda m: m / 10 * 1.8 + 0.1,
    "brightness": lambda m: m / 10 * 1.8 + 0.1,
    "sharpness": lambda m: m / 10 * 1.8 + 0.1,
    "shear_x": lambda m: m / 10 * 0.3,  # columns a row
    "shear_y": lambda m: m / 10 * 0.3,
    "translate_x": lambda m: m / 10 * 100,  # pixels of a 224-pixel image
    "translate_y": lambda m: m / 10 * 100,
    "cutout": lambda m: int(m / 10 * 40),  # half the side of the grey square, in pixels of a 224-pixel image
    "solarize_add": lambda m: int(m / 10 * 110),  # added to levels below 128
}
OPERATIONS = tuple(STRENGTHS)
SIGNED = frozenset({"rotate", "shear_x", "shear_y", "translate_x", "translate_y"})


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """RGB image → RGB image of that size.

    Args:
        layers: operations applied, one after the other (2 in the paper).
        magnitude: of all of them, on the scale where 10 is strong (Table 4: 10, 15 and 20).
    """

    layers: int = 2
    magnitude: float = 15

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        for which, sign, down, right in rng.random((self.layers, 4)).tolist():
            name = OPERATIONS[int(which * len(OPERATIONS))]
            strength = STRENGTHS[name](self.magnitude)
            image = apply(image, name, -strength if name in SIGNED and sign < 0.5 else strength, (down, right))
        return image


def apply(image: Image.Image, name: str, strength: float, centre: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """One operation at one strength; ``centre`` (down, right) as fractions of the sides, for cutout alone."""
    width, height = image.size
    match name:
        case "autocontrast":
            return releveled(image, stretched(image))
        case "equalize":
            return releveled(image, equalized(image))
        case "invert" | "posterize" | "solarize" | "solarize_add" | "brightness" | "contrast":
            return releveled(image, levels(name, strength))
        case "color":
            return Image.blend(image.convert("L", GREY).convert("RGB"), image, strength)
        case "sharpness":
            return Image.blend(image.filter(SMOOTH), image, strength)
        case "rotate":
            return image.rotate(strength, Image.Resampling.NEAREST, fillcolor=FILL)
        case "shear_x":  # Pillow takes positions at the pixels' centres, the reference at their corners; and halfway
            return moved(image, (1, strength, TIE - strength / 2, 0, 1, 0))
        case "shear_y":
            return moved(image, (1, 0, 0, strength, 1, TIE - strength / 2))
        case "translate_x":
            return moved(image, (1, 0, strength * width / SIDE, 0, 1, 0))
        case "translate_y":
            return moved(image, (1, 0, 0, 0, 1, strength * height / SIDE))
        case "cutout":
            row, column = int(centre[0] * height), int(centre[1] * width)
            half_height, half_width = round(strength * height / SIDE), round(strength * width / SIDE)
            image = image.copy()
            box = (column - half_width, row - half_height, column + half_width, row + half_height)
            image.paste(FILL, (max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height)))
            return image
    raise AssertionError(name)


def moved(image: Image.Image, coefficients: Sequence[float]) -> Image.Image:
    """The pixel at (x, y) comes from (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.NEAREST, fillcolor=FILL)


def releveled(image: Image.Image, table: np.ndarray) -> Image.Image:
    """Each level of a pixel becomes another; ``table`` (256,), or (3, 256) for each channel its own, uint8."""
    if image.width * image.height > 150 * 150:
        return image.point(np.broadcast_to(table, (3, 256)).ravel().tolist())
    if table.ndim == 1:  # Pillow takes 40 µs to read a table, several times what a small image needs
        return Image.frombytes("RGB", image.size, image.tobytes().translate(table.tobytes()))
    return Image.fromarray(table.ravel().take(np.asarray(image) + CHANNEL))


def stretched(image: Image.Image) -> np.ndarray:
    """(3, 256): each channel's least level to 0, its greatest to 255; a channel of one level stays."""
    least, most = np.array(image.getextrema(), np.float64).T[..., None]  # each (3, 1)
    factor = 255 / np.maximum(most - least, 1)
    table = np.clip(LEVEL * factor - least * factor, 0, 255)
    return np.where(least < most, table, LEVEL).astype(np.uint8)


def equalized(image: Image.Image) -> np.ndarray:
    """(3, 256): levels spread so that each is about equally frequent; a channel of next to one level stays."""
    counts = np.array(image.histogram()).reshape(3, 256)
    last = 255 - (counts[:, ::-1] > 0).argmax(1)
    step = (image.width * image.height - counts[(0, 1, 2), last][:, None]) // 255
    table = np.minimum((step // 2 + counts.cumsum(1) - counts) // np.maximum(step, 1), 255)
    return np.where(step > 0, table, LEVEL).astype(np.uint8)


@functools.lru_cache(maxsize=64)
def levels(name: str, strength: float) -> np.ndarray:
    """(256,): what becomes of each level, for the operations that look at nothing else."""
    new = {
        "invert": lambda: 255 - LEVEL,
        "posterize": lambda: LEVEL >> (8 - int(strength)) << (8 - int(strength)),
        "solarize": lambda: np.where(strength > LEVEL, LEVEL, 255 - LEVEL),
        "solarize_add": lambda: np.where(LEVEL < 128, LEVEL + strength, LEVEL),
        "brightness": lambda: LEVEL * strength,
        "contrast": lambda: CONTRAST_GREY + strength * (LEVEL - CONTRAST_GREY),
    }[name]()
    return np.clip(new, 0, 255).astype(np.uint8)  # truncated, as the reference does
