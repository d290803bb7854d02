"""The images that ``predict``, ``features`` and ``transform`` take: files, and pictures in memory."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from PIL import Image
from torch import Tensor

from allmlp.data.dataset import describe_left_out
from allmlp.data.decode import decode, to_upright_rgb
from allmlp.data.folders.walk import image_names
from allmlp.data.stores import FolderStore, Store, ZipStore
from allmlp.errors import UserError
from allmlp.files import as_path
from allmlp.inference.urls import Download, is_url

log = logging.getLogger(__name__)


@runtime_checkable
class BinaryFile(Protocol):
    """A file opened for reading bytes."""

    def read(self) -> bytes: ...


ImageLike: TypeAlias = str | Path | bytes | BinaryFile | Image.Image | np.ndarray | Tensor
"""A path or URL, the bytes of a file, a file opened for reading bytes, a PIL image, or pixels as uint8: an array
(H, W, 3), (H, W) or (N, H, W, 3), or a tensor (3, H, W) or (N, 3, H, W). A path may be a folder or .zip of images."""

SINGLE = (str, Path, bytes, bytearray, BinaryFile, Image.Image, np.ndarray, Tensor)
KINDS = (
    "a path, bytes, a file object, a PIL image, or pixels as uint8: an array (H, W, 3), (H, W) or (N, H, W, 3), or a "
    "tensor (3, H, W) or (N, 3, H, W)"
)


class Picture:
    """A store that holds a single picture: the bytes of a file, or a PIL image."""

    in_memory = True

    def __init__(self, content: bytes | Image.Image) -> None:
        self.content = content

    def open(self, name: str, max_pixels: int, min_side: int | None = None) -> Image.Image:
        if isinstance(self.content, bytes):
            return decode(self.content, name, max_pixels, min_side)
        return to_upright_rgb(self.content, name)

    def missing(self, name: str) -> bool:
        return False


def list_images(images: ImageLike | Iterable[ImageLike]) -> Iterator[tuple[Store, str, str]]:
    """Yields (store, name in the store, name to display) of each image; those in memory are called "image 0" and so on.

    Raises:
        UserError: something that is no image, or pixels of another shape or type than those of ``ImageLike``.
    """
    given = [images] if isinstance(images, SINGLE) else images
    if not isinstance(given, Iterable):
        raise UserError(f"images = {given!r} ({type(given).__name__}): give {KINDS}; or a list of these")
    count = 0
    for item in given:
        if isinstance(item, str | Path):
            for place in find_named(item):
                count += 1
                yield place
        else:
            for picture in pictures(item):
                yield picture, f"image {count}", f"image {count}"
                count += 1


def pictures(item: object) -> Iterator[Picture]:
    """The pictures that an object in memory holds: one, or several for a batch of pixels."""
    match item:
        case bytes() | bytearray():
            yield Picture(bytes(item))
        case Image.Image():
            yield Picture(item)
        case Tensor():
            check_pixels(item.shape, str(item.dtype), item.ndim in (3, 4) and item.shape[-3] == 3)
            if item.is_meta:
                raise UserError("pixels on the meta device, which holds no values: give a tensor of another device")
            yield from pictures(item.detach().cpu().movedim(-3, -1).contiguous().numpy())
        case np.ndarray():
            gray = item.ndim == 2
            check_pixels(item.shape, str(item.dtype), gray or (item.ndim in (3, 4) and item.shape[-1] == 3))
            batch = item[None] if gray else item.reshape(-1, *item.shape[-3:])
            yield from (Picture(Image.fromarray(np.ascontiguousarray(p))) for p in batch)
        case BinaryFile():
            content = item.read()
            if not isinstance(content, bytes):
                raise UserError(f"{item!r} reads text, not bytes: open the image with mode 'rb'")
            yield Picture(content)
        case _:
            raise UserError(f"{item!r} ({type(item).__name__}) is no image: give {KINDS}")


def check_pixels(shape: Iterable[int], dtype: str, fits: bool) -> None:
    """Raises a UserError for pixels that are not uint8, empty, or of a shape that does not fit."""
    sizes = tuple(shape)
    if not dtype.endswith("uint8") or not fits or 0 in sizes:
        raise UserError(f"pixels of shape {sizes} and type {dtype}: give {KINDS}")


def find_named(name: str | Path) -> Iterator[tuple[Store, str, str]]:
    """The image at a URL, or those at a path, as ``find_images`` yields them."""
    if isinstance(name, str) and is_url(name):
        yield Download(), name, name
    else:
        yield from find_images(as_path("image", name))


def find_listed(names: Iterable[str], ignored: Counter[str]) -> Iterator[tuple[Store, str, str]]:
    """The images of a list: what is not there keeps its place, and is unreadable."""
    for name in names:
        path = Path(name)
        if is_url(name):
            yield Download(), name, name
        elif path.is_dir() or path.is_file():
            yield from find_images(path, ignored)
        else:
            yield FolderStore(path.parent), path.name, name


def find_images(path: Path, ignored: Counter[str] | None = None) -> Iterator[tuple[Store, str, str]]:
    """Yields (store, name in the store, name to display) of an image file, or of all images in a folder or .zip.

    ``ignored`` counts the files that are no images, by kind.

    Raises:
        UserError: the path does not exist, or holds no images.
    """
    if path.is_dir() or (path.is_file() and path.suffix.lower() == ".zip"):
        store = FolderStore(path) if path.is_dir() else ZipStore(path)
        found, left_out = 0, Counter[str]()
        for name in image_names(store, str(path), left_out):
            found += 1
            yield store, name, f"{path}/{name}"
        if not found:
            holds = f" ({describe_left_out(left_out)})" if left_out else ""
            raise UserError(f"{path} holds no images{holds}: give image files, or a folder or .zip of them")
        if left_out:
            log.warning("%s: %s", path, describe_left_out(left_out))
            if ignored is not None:
                ignored.update(left_out)
    elif path.is_file():
        yield FolderStore(path.parent), path.name, str(path)
    else:
        raise UserError(f"no image at {path}: give image files, or a folder or .zip of them")
