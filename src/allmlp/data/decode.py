"""Bytes of a picture → upright RGB: the one decoder of training, evaluation and prediction.

Pictures come from anywhere, so the parsers are few, the size is checked before any pixel is decoded, and whatever is
wrong with a file ends in one kind of error that says so in one line.
"""

import io
import re
import textwrap
from contextlib import suppress
from pathlib import PurePath

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ExifTags import Base
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import jpeg_factory
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from allmlp.errors import UserError, printable

# First bytes and parser of each format. Called directly, as Image.open would, for two reasons: no other format's parser
# ever runs, and Image.open refuses a huge picture before anyone can ask for its width and height.
FORMATS = {
    "JPEG": (re.compile(rb"\xff\xd8\xff"), jpeg_factory),  # and MPO, which many phones write: the first picture of it
    "PNG": (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    "WEBP": (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImageFile),
    "BMP": (re.compile(rb"BM"), BmpImageFile),
    "GIF": (re.compile(rb"GIF8[79]a"), GifImageFile),
    "TIFF": (re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImageFile),
}
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_PIXELS = 64_000_000

EXIF_KEYS = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # where Pillow keeps what can say "turned"
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(UserError):
    """A picture that cannot be decoded, or is larger than allowed."""


def is_image_name(name: str) -> bool:
    """Whether the name ends like a picture's, in capitals or not, and is no hidden file's."""
    return PurePath(name).suffix.lower() in EXTENSIONS and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether the file or a folder of it is hidden, or what macOS packs beside the files of a zip."""
    return any(piece.startswith((".", "__MACOSX")) and piece not in (".", "..") for piece in name.split("/"))


def decode(data: bytes, name: str, max_pixels: int = MAX_PIXELS, min_side: int | None = None) -> Image.Image:
    """An encoded picture → upright 8-bit RGB; of several frames or pages, the first.

    EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled to 8 bits (65535 → 255). Colour
    profiles are not applied, as in the authors' input pipeline.

    Args:
        data: the file's bytes.
        name: what to call it in an error.
        max_pixels: width × height allowed. Beyond Pillow's own, process-wide limit this raises that limit as well.
        enough: pixels of the shorter side that suffice; a JPEG is decoded at the 1/2, 1/4 or 1/8 scale that still has
            them, several times faster for a camera's photographs. None: at full size.

    Raises:
        UnreadableImage: truncated, damaged, too large, of another format, or with pixels of unknown range (floats).
    """
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # the larger limit was asked for; never lowered, so threads may race here
    kind, parse = next(((kind, parse) for kind, (start, parse) in FORMATS.items() if start.match(data)), (None, None))
    if parse is None:
        wrong = f"it is none of {', '.join(FORMATS)}" if data else "the file is empty"
        raise unreadable(name, wrong)
    larger = f"above the limit of {max_pixels:,}", "--max-pixels N raises the limit"
    try:
        image = parse(io.BytesIO(data), "")
        if image.width * image.height > max_pixels:
            raise unreadable(name, f"it has {image.width} × {image.height} pixels, {larger[0]}", larger[1])
        if min_side is not None:
            image.draft(None, (min_side, min_side))  # of the formats here, only JPEG's parser can
        image.load()
        if isinstance(image, PngImageFile):
            bring_key_to_8_bits(image, stored_bits=data[24])
        return upright(image, to_rgb(image, name))
    except UnreadableImage:
        raise
    except Image.DecompressionBombError as error:  # a WebP's parser refuses before its size is known
        raise unreadable(name, f"its number of pixels is {larger[0]}", larger[1]) from error
    except MemoryError as error:
        raise unreadable(name, "memory does not suffice to decode it", "free some or make it smaller") from error
    except Exception as error:  # on bytes from anywhere, Pillow raises nearly every type there is
        text = textwrap.shorten(str(error), 100) or type(error).__name__
        wrong = "the file is truncated" if "truncated" in text.lower() else f"the {kind} is damaged ({text})"
        raise unreadable(name, wrong) from error


def unreadable(name: str, wrong: str, remedy: str = "replace it or remove it") -> UnreadableImage:
    return UnreadableImage(printable(f"{name} cannot be read: {wrong}; {remedy}"))


def bring_key_to_8_bits(image: PngImageFile, stored_bits: int) -> None:
    """Pillow brings the pixels of a 2-, 4- or 3 × 16-bit PNG to 8 bits, but not the colour that means transparent."""
    key = image.info.get("transparency")
    if isinstance(key, int) and image.mode == "L":
        image.info["transparency"] = key * 255 // (2**stored_bits - 1)
    elif isinstance(key, tuple) and stored_bits == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)


def to_rgb(image: ImageFile, name: str) -> Image.Image:
    """The loaded picture's pixels as 8-bit RGB, over white where transparent."""
    if image.mode == "F":
        raise unreadable(name, "its pixels are floats of unknown range", "save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        return grey_16_bit(image, name)
    if image.mode == "La":  # Pillow converts premultiplied grey to nothing else
        return over_white(image.convert("LA"))
    return over_white(image) if image.has_transparency_data else image.convert("RGB")


def over_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    canvas = Image.new("RGB", rgba.size, "white")
    canvas.paste(rgba, mask=rgba)
    return canvas


def grey_16_bit(image: ImageFile, name: str) -> Image.Image:
    """Scaled to 8 bits and rounded, where Pillow's own conversion clips at 255."""
    white, inverted = 65535, False
    if isinstance(image, TiffImageFile):  # of which Pillow hands out the stored numbers as they are
        white = 4095 if image.tag_v2.get(Base.BitsPerSample) == (12,) else 65535
        inverted = image.tag_v2.get(Base.PhotometricInterpretation) == 0
    values = np.asarray(image)
    if values.min() < 0 or values.max() > white:
        raise unreadable(name, f"its pixels are integers beyond 0 to {white}", "save it with 8 or 16 bits")
    levels = np.rint(np.arange(white + 1) * (255 / white)).astype(np.uint8)
    grey = (levels[::-1] if inverted else levels)[values]
    if (transparent := image.info.get("transparency")) is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def upright(image: ImageFile, pixels: Image.Image) -> Image.Image:
    """The pixels turned as the file's EXIF or XMP asks (a TIFF's, Pillow has); as they are if that is garbled."""
    turn = None
    if EXIF_KEYS & image.info.keys():
        with suppress(Exception):
            turn = TURNS.get(image.getexif().get(Base.Orientation, 1))
    pixels = pixels if turn is None else pixels.transpose(turn)
    pixels.info = {}  # else whoever looks for an orientation would turn them again
    return pixels
