"""What is compared to find duplicates: of each image a digest of its file, one of its pixels, and how it looks."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from allmlp.data.dataset import ImageDataset
from allmlp.data.decode import UnreadableImage, decode, parse
from allmlp.data.formats import recognize
from allmlp.device import available_cores
from allmlp.errors import UserError

THUMBNAIL = 8  # pixels of each side of the thumbnails that are compared
CHUNK = 64  # images that a thread signs at a time
DIGEST = 16  # bytes


class Signature(NamedTuple):
    """One image."""

    file: bytes  # digest; b"" for an image that is no file
    pixels: bytes  # digest of the upright RGB pixels and their size
    code: np.ndarray  # (8,) uint8: 64 bits, of which images that look alike have most in common
    thumbnail: np.ndarray  # (THUMBNAIL, THUMBNAIL, 3) uint8
    size: tuple[int, int]  # upright width and height, in pixels
    kind: str  # such as "JPEG, RGB"


@dataclass(frozen=True, kw_only=True)
class Signatures:
    """The readable images of a dataset: N rows, in its order."""

    dataset: ImageDataset
    indices: np.ndarray  # (N,) int64, positions in the dataset
    files: np.ndarray  # (N,) bytes of ``DIGEST``
    pixels: np.ndarray  # (N,) bytes of ``DIGEST``
    codes: np.ndarray  # (N,) uint64
    thumbnails: np.ndarray  # (N, 3 · THUMBNAIL²) uint8
    sizes: np.ndarray  # (N, 2) int64, width and height
    kinds: list[str]
    unreadable: dict[str, str]  # name → reason

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> np.ndarray:
        return self.dataset.labels[self.indices]

    def name(self, row: int) -> str:
        return self.dataset.names[int(self.indices[row])]


def sign_all(dataset: ImageDataset, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Signatures:
    """Reads every image once, by threads, and keeps some 300 bytes of each.

    Raises:
        UserError: imagehash is not installed.
        RunError: the folder or zip is gone.
    """
    import_imagehash()
    rows: list[tuple[int, Signature]] = []
    unreadable: dict[str, str] = {}
    done = 0
    for chunk in sign_chunks(dataset):
        for index, found in chunk:
            if isinstance(found, str):
                unreadable[dataset.names[index]] = found
            else:
                rows.append((index, found))
        done += len(chunk)
        on_progress(done, len(dataset))
    signatures = [signature for _, signature in rows]
    return Signatures(
        dataset=dataset,
        indices=np.array([index for index, _ in rows], dtype=np.int64),
        files=np.array([one.file for one in signatures], dtype=f"S{DIGEST}"),
        pixels=np.array([one.pixels for one in signatures], dtype=f"S{DIGEST}"),
        codes=np.array([one.code for one in signatures], dtype=np.uint8).reshape(-1, 8).view(np.uint64).ravel(),
        thumbnails=np.array([one.thumbnail for one in signatures], dtype=np.uint8).reshape(-1, 3 * THUMBNAIL**2),
        sizes=np.array([one.size for one in signatures], dtype=np.int64).reshape(-1, 2),
        kinds=[one.kind for one in signatures],
        unreadable=unreadable,
    )


def sign_chunks(dataset: ImageDataset) -> Iterator[list[tuple[int, Signature | str]]]:
    def sign_chunk(indices: Sequence[int]) -> list[tuple[int, Signature | str]]:
        return [(index, sign(dataset, index)) for index in indices]

    chunks = [range(start, min(start + CHUNK, len(dataset))) for start in range(0, len(dataset), CHUNK)]
    with ThreadPoolExecutor(min(available_cores(), 8)) as pool:
        yield from pool.map(sign_chunk, chunks)


def sign(dataset: ImageDataset, index: int) -> Signature | str:
    """The signature of an image, or why it cannot be read."""
    try:
        data = dataset.raw(index)
        if data is None:
            image, file, kind = dataset.read(index), b"", "in memory, RGB"
        else:
            image = decode(data, dataset.names[index], dataset.max_pixels)
            file, kind = digest(data), describe_kind(data)
    except UnreadableImage as error:
        return str(error)
    code, thumbnail = look(image)
    pixels = digest(repr(image.size).encode() + image.tobytes())
    return Signature(file, pixels, code, thumbnail, image.size, kind)


def digest(data: bytes) -> bytes:
    """A digest whose last byte is not zero: numpy's strings of bytes drop zeros at their end."""
    found = hashlib.blake2b(data, digest_size=DIGEST).digest()
    return found if found[-1] else found[:-1] + b"\x01"


def look(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """The 64 bits of the perceptual hash (imagehash's ``phash``), and a thumbnail."""
    bits = import_imagehash().phash(image.convert("L")).hash
    box = image.reduce(max(min(image.size) // (4 * THUMBNAIL), 1)) if min(image.size) > 4 * THUMBNAIL else image
    return np.packbits(bits.ravel()), np.asarray(box.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))


def describe_kind(data: bytes) -> str:
    """The format and the mode of the stored pixels, of a file that can be decoded."""
    kind = recognize(data)
    assert kind is not None
    return f"{kind}, {parse(kind, data).mode}"


def import_imagehash():
    try:
        import imagehash
    except ImportError:
        raise UserError("perceptual hashes need imagehash: pip install 'allmlp[inspect]'") from None
    return imagehash
