"""Data sets of small images, which are held in memory: CIFAR, MNIST, Fashion-MNIST, SVHN, STL-10."""

import contextlib
import gzip
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.data.builtin.copies import PLACES, data_folder, fetch
from allmlp.data.dataset import ImageDataset
from allmlp.data.stores import ArrayStore
from allmlp.errors import RunError, UserError

DIGITS = tuple(str(digit) for digit in range(10))
STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist


def cifar10(root: Path | None = None) -> dict[str, ImageDataset]:
    """CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 images of 32×32 pixels. For ``root``, see ``fetch``."""
    return load_cifar("cifar10", "CIFAR10", root)


def cifar100(root: Path | None = None) -> dict[str, ImageDataset]:
    """CIFAR-100 (Krizhevsky 2009), with its 100 fine classes; otherwise as CIFAR-10."""
    return load_cifar("cifar100", "CIFAR100", root)


def load_cifar(name: str, class_name: str, root: Path | None) -> dict[str, ImageDataset]:
    train, test = fetch(name, class_name, root, {"train": True}, {"train": False})
    parts = {"train": (train.data, train.targets), "test": (test.data, test.targets)}
    return in_memory(name, parts, tuple(train.classes))


def mnist(root: Path | None = None) -> dict[str, ImageDataset]:
    """MNIST (LeCun et al. 1998): 60,000 and 10,000 gray images of 28×28 pixels. For ``root``, see ``fetch``."""
    return load_mnist("mnist", fetch("mnist", "MNIST", root, {"train": True}, {"train": False}), DIGITS)


def fashion_mnist(root: Path | None = None) -> dict[str, ImageDataset]:
    """Fashion-MNIST (Xiao et al. 2017): as MNIST, with ten kinds of clothing.

    Without a copy in the data folder, that of Debian's package dataset-fashion-mnist is read where it is installed.
    """
    name, splits = "fashion-mnist", ({"train": True}, {"train": False})
    if root is None and not copies_in_data_folder(name) and DEBIAN_FASHION_MNIST.is_dir():
        with unpacked(DEBIAN_FASHION_MNIST) as copy:
            train, test = fetch(name, "FashionMNIST", copy, *splits)
    else:
        train, test = fetch(name, "FashionMNIST", root, *splits)
    return load_mnist(name, [train, test], tuple(train.classes))


def load_mnist(name: str, loaded: list[Any], classes: tuple[str, ...]) -> dict[str, ImageDataset]:
    parts = {}
    for part, images in zip(("train", "test"), loaded, strict=True):
        gray = images.data.numpy()
        parts[part] = np.repeat(gray[..., None], 3, axis=-1), images.targets.numpy()
    return in_memory(name, parts, classes)


@contextlib.contextmanager
def unpacked(folder: Path) -> Iterator[Path]:
    """A temporary copy of Debian's packed files where torchvision looks for them."""
    with tempfile.TemporaryDirectory(prefix="allmlp-fashion-mnist-") as copy:
        raw = Path(copy) / PLACES["fashion-mnist"]
        raw.mkdir(parents=True)
        for packed in sorted(folder.glob("*.gz")):
            try:
                with gzip.open(packed) as source, (raw / packed.stem).open("wb") as target:
                    shutil.copyfileobj(source, target)
            except (OSError, EOFError, zlib.error) as error:
                raise RunError(
                    f"fashion-mnist could not be read ({packed}: {error}): install the package dataset-fashion-mnist "
                    "again"
                ) from None
        yield Path(copy)


def copies_in_data_folder(name: str) -> bool:
    try:
        return (data_folder() / PLACES[name]).exists()
    except UserError:  # there is no home folder
        return False


def svhn(root: Path | None = None) -> dict[str, ImageDataset]:
    """SVHN (Netzer et al. 2011), cropped digits: 73,257 and 26,032 images of 32×32 pixels. See ``fetch``."""
    train, test = fetch("svhn", "SVHN", root, {"split": "train"}, {"split": "test"})
    parts = {part: (last_channel(images.data), images.labels) for part, images in (("train", train), ("test", test))}
    return in_memory("svhn", parts, DIGITS)


def stl10(root: Path | None = None) -> dict[str, ImageDataset]:
    """STL-10 (Coates et al. 2011): 5,000 and 8,000 labeled images of 96×96 pixels. For ``root``, see ``fetch``."""
    train, test = fetch("stl10", "STL10", root, {"split": "train"}, {"split": "test"})
    parts = {part: (last_channel(images.data), images.labels) for part, images in (("train", train), ("test", test))}
    return in_memory("stl10", parts, tuple(getattr(train, "classes", STL10_CLASSES)))


def last_channel(pixels: np.ndarray) -> np.ndarray:
    """(N, 3, H, W) → (N, H, W, 3)"""
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def in_memory(
    name: str, parts: dict[str, tuple[np.ndarray, Sequence[int] | np.ndarray]], classes: tuple[str, ...]
) -> dict[str, ImageDataset]:
    """Datasets of (N, H, W, 3) uint8 pixels and N labels for each part.

    Raises:
        RunError: the numbers of images and labels differ, or labels are no classes.
    """
    names = {}
    for part, (pixels, labels) in parts.items():
        if len(pixels) != len(labels) or not len(labels):
            raise RunError(f"the copy of {name} is damaged: {len(pixels):,} {part} images, and {len(labels):,} labels")
        if min(labels) < 0 or max(labels) >= len(classes):
            raise RunError(
                f"the copy of {name} is damaged: its {part} labels are from {min(labels)} to {max(labels)}, and there "
                f"are {len(classes)} classes"
            )
        names[part] = tuple(f"{part}/{classes[int(label)]}/{i:05d}.png" for i, label in enumerate(labels))
    store = ArrayStore(
        np.concatenate([pixels for pixels, _ in parts.values()]), [n for own in names.values() for n in own]
    )
    return {
        part: ImageDataset(store=store, names=names[part], labels=np.asarray(labels, dtype=np.int64), classes=classes)
        for part, (_, labels) in parts.items()
    }
