"""The image formats that are read: how a file of each begins, what it is called, and its parser.

Only these parsers run. They are called directly instead of through Pillow's Image.open, which might run the parser of
another format, and which rejects a huge image before its width and height can be read.
"""

import functools
import importlib.util
import io
import os
import re
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import jpeg_factory
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

HEIF_EXTENSIONS = frozenset({".heic", ".heif", ".hif"})
HEIF_REMEDY = "pip install 'allmlp[heif]'"
FIRST_BYTES = 32  # that tell the format


class Format(NamedTuple):
    start: re.Pattern[bytes]
    parse: Callable[[io.BytesIO, str], Image.Image]
    extensions: tuple[str, ...]


def parse_jpeg_2000(file: io.BytesIO, name: str) -> Image.Image:
    from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile

    return Jpeg2KImageFile(file, name)


def parse_avif(file: io.BytesIO, name: str) -> Image.Image:
    from PIL.AvifImagePlugin import AvifImageFile

    return AvifImageFile(file, name)


def parse_heif(file: io.BytesIO, name: str) -> Image.Image:
    from pillow_heif.as_plugin import HeifImageFile  # pyright: ignore[reportMissingImports]  # an extra

    return HeifImageFile(file, name)


def starts_with(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern, re.DOTALL)


FORMATS = {
    # and MPO, which many phones write: its first image
    "JPEG": Format(starts_with(rb"\xff\xd8\xff"), jpeg_factory, (".jpg", ".jpeg", ".jpe", ".jfif")),
    "PNG": Format(starts_with(rb"\x89PNG\r\n\x1a\n"), PngImageFile, (".png",)),
    "WEBP": Format(starts_with(rb"RIFF....WEBP"), WebPImageFile, (".webp",)),
    "BMP": Format(starts_with(rb"BM"), BmpImageFile, (".bmp",)),
    "GIF": Format(starts_with(rb"GIF8[79]a"), GifImageFile, (".gif",)),
    "TIFF": Format(starts_with(rb"II[*+]\0|MM\0[*+]"), TiffImageFile, (".tif", ".tiff")),
    "PPM": Format(starts_with(rb"P[1-6]\s"), PpmImageFile, (".ppm", ".pgm", ".pbm", ".pnm")),
    "JPEG2000": Format(starts_with(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51\0"), parse_jpeg_2000, (".jp2", ".j2k")),
    "AVIF": Format(starts_with(rb"....ftypavi[fs]"), parse_avif, (".avif",)),
    "HEIF": Format(starts_with(rb"....ftyp(?:he[ivm][cxsm]|mif1|msf1)"), parse_heif, tuple(sorted(HEIF_EXTENSIONS))),
}
FREQUENT_BY_CHANCE = {"BMP", "PPM"}  # a text may begin with their two bytes: the ending must agree


@functools.cache
def can_read_heif() -> bool:
    return importlib.util.find_spec("pillow_heif") is not None


@functools.cache
def readable_extensions() -> frozenset[str]:
    """The endings of image files, in lower case; those of HEIF only where its library is installed."""
    known = {extension for kind in FORMATS.values() for extension in kind.extensions}
    return frozenset(known if can_read_heif() else known - HEIF_EXTENSIONS)


def recognize(data: bytes) -> str | None:
    """The format of a file that begins with these bytes, or None."""
    return next((kind for kind, form in FORMATS.items() if form.start.match(data)), None)


OTHER_EXTENSIONS = {  # of files that are not opened to see whether they are images
    *(
        ".txt",
        ".csv",
        ".tsv",
        ".json",
        ".jsonl",
        ".xml",
        ".yaml",
        ".yml",
        ".md",
        ".html",
        ".htm",
        ".pdf",
        ".ini",
        ".cfg",
    ),
    *(".toml", ".log", ".py", ".ipynb", ".sh", ".js", ".css", ".c", ".h", ".doc", ".docx", ".xls", ".xlsx", ".ppt"),
    *(".npy", ".npz", ".mat", ".pkl", ".parquet", ".arrow", ".db", ".sqlite", ".h5", ".hdf5", ".index"),
    *(".pt", ".pth", ".ckpt", ".onnx", ".safetensors", ".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"),
    *(".mp3", ".wav", ".mp4", ".mov", ".avi", ".mkv", ".webm", ".lnk", ".url", ".exe", ".dll", ".so", ".bak", ".tmp"),
    *(".svg", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".dcm", ".nii", ".xmp", ".aae", ".part"),
    *HEIF_EXTENSIONS,
}


def may_be_image(name: str) -> bool:
    """Whether only its first bytes can tell if a file is an image: it has no ending, or an unknown one."""
    return os.path.splitext(name)[1].lower() not in OTHER_EXTENSIONS  # noqa: PTH122 (called for each file)


def looks_like_image(start: bytes) -> bool:
    """Whether a file with these first bytes is an image, whatever its name."""
    kind = recognize(start)
    return kind is not None and kind not in FREQUENT_BY_CHANCE and (kind != "HEIF" or can_read_heif())
