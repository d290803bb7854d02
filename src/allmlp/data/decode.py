"""Encoded image → upright RGB: the only decoder, used by training, evaluation and prediction.

Images are untrusted input. Only a few parsers run, the size is checked before any pixel is decoded, and every problem
with a file raises the same kind of error, with a message of one line.
"""

import functools
import io
import logging
import os
import struct
import textwrap
from contextlib import suppress

import numpy as np
from PIL import Image
from PIL.ExifTags import Base
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import MAX_SAMPLESPERPIXEL, ImageFileDirectory_v2, TiffImageFile

from allmlp.data.formats import FORMATS, HEIF_REMEDY, can_read_heif, readable_extensions, recognize
from allmlp.errors import UserError, printable

log = logging.getLogger(__name__)

MAX_PIXELS = 64_000_000

EXIF_KEYS = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # of image.info: may hold the orientation
TRANSPOSE_OF_ORIENTATION = {  # EXIF 2.32, tag 0x0112
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(UserError):
    """An image that cannot be decoded, or has more pixels than allowed."""


def is_image_name(name: str) -> bool:
    """Whether the name has the extension of an image, in lower or upper case, and is not hidden."""
    return os.path.splitext(name)[1].lower() in readable_extensions() and not is_hidden(name)  # noqa: PTH122 (called for each file)


def is_hidden(name: str) -> bool:
    """Whether the file or a folder in its path is hidden, or was added to a zip by macOS."""
    return any(piece.startswith((".", "__MACOSX")) and piece not in (".", "..") for piece in name.split("/"))


def decode(data: bytes, name: str, max_pixels: int = MAX_PIXELS, min_side: int | None = None) -> Image.Image:
    """Decodes an image to upright 8-bit RGB; if it has several frames or pages, the first.

    EXIF orientation is applied, transparent pixels are composited over white, and 16-bit gray is scaled to 8 bits
    (65535 → 255; 4095 → 255 if no value needs more than 12 bits, as cameras and scanners store them). Color profiles
    are not applied, as in the authors' input pipeline.

    Args:
        data: the bytes of the file.
        name: name of the image, for error messages.
        max_pixels: limit on width × height. If it is above Pillow's process-wide limit, it raises that limit as well.
        min_side: pixels of the shorter side that the caller needs. A JPEG is decoded at the smallest of the scales 1,
            1/2, 1/4 and 1/8 that still has them, which is several times faster for photographs. None: full size.

    Raises:
        UnreadableImage: truncated, damaged, too large, in an unsupported format, or with floating-point pixels, whose
            range is unknown.
    """
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # never lowered, so that threads may race here
    kind = recognize(data)
    if kind is None:
        reason = f"its format is none of {', '.join(FORMATS)}" if data else "the file is empty"
        raise unreadable_image(name, reason)
    if kind == "HEIF" and not can_read_heif():
        raise unreadable_image(name, "it is a HEIF image (.heic)", HEIF_REMEDY)
    if kind == "TIFF":
        check_bands(data, name)
    above_limit, remedy = f"above the limit of {max_pixels:,}", "--max-pixels N raises the limit"
    try:
        image = parse(kind, data)
        if image.width * image.height > max_pixels:
            raise unreadable_image(name, f"it has {image.width} × {image.height} pixels, {above_limit}", remedy)
        if min_side is not None:
            image.draft(None, (min_side, min_side))  # a no-op for all formats but JPEG
        image.load()
        if isinstance(image, PngImageFile):
            scale_transparent_color(image, stored_bits=data[24])
        return to_upright_rgb(image, name)
    except UnreadableImage:
        raise
    except Image.DecompressionBombError as error:  # the WebP parser raises it before the size can be read
        raise unreadable_image(name, f"its number of pixels is {above_limit}", remedy) from error
    except MemoryError as error:
        raise unreadable_image(name, "there is not enough memory to decode it", "free some or shrink it") from error
    except Exception as error:  # on arbitrary bytes, Pillow raises almost any type of exception
        text = textwrap.shorten(str(error), 100) or type(error).__name__
        reason = "the file is truncated" if "truncated" in text.lower() else f"the {kind} is damaged ({text})"
        if kind == "TIFF" and "unknown pixel mode" in text:
            raise unreadable_image(name, f"it is {describe_bands(data)}", BANDS_REMEDY) from error
        raise unreadable_image(name, reason) from error


def parse(kind: str, data: bytes) -> Image.Image:
    """An image whose header is read. Texts and profiles of a PNG that Pillow finds too large are left out."""
    try:
        return FORMATS[kind].parse(io.BytesIO(data), "")
    except ValueError:
        if kind != "PNG":
            raise
        return FORMATS[kind].parse(io.BytesIO(without_texts(data)), "")


def without_texts(data: bytes) -> bytes:
    """A PNG without its texts and its color profile. Its orientation, if these hold it, is lost."""
    kept, at = [data[:8]], 8
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(data[at : at + 12 + length])
        at += 12 + length
    return b"".join(kept)


BANDS_REMEDY = "save three of its bands with 8 bits each as RGB, or one as gray"


def check_bands(data: bytes, name: str) -> None:
    """Raises UnreadableImage for a TIFF of more bands than Pillow reads, of which it would print a line of its own."""
    bands = 1
    with suppress(Exception):  # a damaged one is left to the parser
        bands = tiff_tags(data).get(Base.SamplesPerPixel, 1)
    if bands > MAX_SAMPLESPERPIXEL:
        raise unreadable_image(name, f"it is {describe_bands(data)}", BANDS_REMEDY)


def describe_bands(data: bytes) -> str:
    tags = tiff_tags(data)
    bits, kinds = tags.get(Base.BitsPerSample, (1,)), {1: "", 2: " signed", 3: " floating-point"}
    kind = kinds.get((tags.get(SAMPLE_FORMAT) or (1,))[0], "")
    widths = " and ".join(map(str, sorted(set(bits if isinstance(bits, tuple) else (bits,)))))
    return f"a TIFF of {tags.get(Base.SamplesPerPixel, 1)} band(s) of {widths}{kind} bits"


SAMPLE_FORMAT = 339  # TIFF's tag


def tiff_tags(data: bytes) -> ImageFileDirectory_v2:
    big = data[2:4] in (b"+\0", b"\0+")
    tags = ImageFileDirectory_v2(data[: 16 if big else 8])
    file = io.BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    return tags


def unreadable_image(name: str, reason: str, remedy: str = "replace it or remove it") -> UnreadableImage:
    return UnreadableImage(printable(f"{name} cannot be read: {reason}; {remedy}"))


def scale_transparent_color(image: PngImageFile, stored_bits: int) -> None:
    """Scales the transparent color (tRNS) of a 2-, 4- or 3 × 16-bit PNG to 8 bits, as Pillow does for pixels only."""
    key = image.info.get("transparency")
    if isinstance(key, int) and image.mode == "L":
        image.info["transparency"] = key * 255 // (2**stored_bits - 1)
    elif isinstance(key, tuple) and stored_bits == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)


def to_upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """An image that is open as upright 8-bit RGB, by the rules of ``decode``.

    Raises:
        UnreadableImage: its pixels cannot be loaded, or are floats.
    """
    try:
        return apply_orientation(image, to_rgb(image, name))
    except (OSError, ValueError, SyntaxError) as error:  # opened by the caller, and damaged
        raise unreadable_image(name, str(error)) from error


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """The pixels of a loaded image as 8-bit RGB, composited over white where transparent."""
    if image.mode == "F":
        raise unreadable_image(name, "its pixels are floats of unknown range", "save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        return scale_16_bit_gray(image, name)
    if image.mode == "La":  # the only mode to which Pillow converts premultiplied gray
        return composite_over_white(image.convert("LA"))
    return composite_over_white(image) if image.has_transparency_data else image.convert("RGB")


def composite_over_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    canvas = Image.new("RGB", rgba.size, "white")
    canvas.paste(rgba, mask=rgba)
    return canvas


def scale_16_bit_gray(image: Image.Image, name: str) -> Image.Image:
    """Scales to 8 bits and rounds. Pillow's own conversion clips at 255 instead."""
    white, inverted = 65535, False
    if isinstance(image, TiffImageFile):  # Pillow returns the stored values unchanged
        white = 4095 if image.tag_v2.get(Base.BitsPerSample) == (12,) else 65535
        inverted = image.tag_v2.get(Base.PhotometricInterpretation) == 0
    values = np.asarray(image)
    if white == 65535 and 255 < values.max() <= 4095:
        white = 4095
        say_that_12_bits_are_assumed()
    if values.min() < 0 or values.max() > white:
        raise unreadable_image(name, f"it has pixel values outside 0 to {white}", "save it with 8 or 16 bits")
    levels = np.rint(np.arange(white + 1) * (255 / white)).astype(np.uint8)
    gray = (levels[::-1] if inverted else levels)[values]
    if (transparent := image.info.get("transparency")) is not None:
        gray[values == transparent] = 255
    return Image.fromarray(gray).convert("RGB")


@functools.cache
def say_that_12_bits_are_assumed() -> None:
    """Said once: processes that are forked later do not repeat it."""
    log.warning("16-bit images whose values need no more than 12 bits count as 12-bit: 4095 is white")


def apply_orientation(image: Image.Image, pixels: Image.Image) -> Image.Image:
    """Applies the orientation in the EXIF or XMP metadata of ``image``, if valid. Pillow has done so for TIFF."""
    transpose = None
    if EXIF_KEYS & image.info.keys():
        with suppress(Exception):
            transpose = TRANSPOSE_OF_ORIENTATION.get(image.getexif().get(Base.Orientation, 1))
    pixels = pixels if transpose is None else pixels.transpose(transpose)
    pixels.info = {}  # so that the orientation is not applied a second time
    return pixels
