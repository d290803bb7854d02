"""Built-in sources: the digits of scikit-learn, and the small datasets of the paper in torchvision's format.

The latter are read from the folder ALLMLP_DATA, by default ``~/.cache/allmlp``, and downloaded if missing.
"""

import os
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.data.dataset import ImageDataset
from allmlp.data.stores import ArrayStore, FolderStore
from allmlp.errors import RunError, UserError

FOLDERS = {  # the subfolder in which torchvision keeps each dataset
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "pets": "oxford-iiit-pet",
    "flowers102": "flowers-102",
}


def digits() -> dict[str, ImageDataset]:
    """The 1,797 handwritten digits of 8×8 pixels in scikit-learn (Alpaydin & Kaynak 1998). No download."""
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)  # (1797, 64) from 0 to 16
    gray = np.rint(values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    names = tuple(f"{label}/{i:04d}.png" for i, label in enumerate(labels))
    store = ArrayStore(np.repeat(gray[..., None], 3, axis=-1), names)
    classes = tuple(str(i) for i in range(10))
    return {"all": ImageDataset(store=store, names=names, labels=labels.astype(np.int64), classes=classes)}


def cifar10(root: Path | None = None) -> dict[str, ImageDataset]:
    """CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 images of 32×32 pixels. For ``root``, see ``fetch``."""
    return load_cifar("cifar10", "CIFAR10", root)


def cifar100(root: Path | None = None) -> dict[str, ImageDataset]:
    """CIFAR-100 (Krizhevsky 2009), with its 100 fine classes; otherwise as CIFAR-10."""
    return load_cifar("cifar100", "CIFAR100", root)


def load_cifar(name: str, class_name: str, root: Path | None) -> dict[str, ImageDataset]:
    train, test = fetch(name, class_name, root, {"train": True}, {"train": False})
    data, classes = {"train": train, "test": test}, tuple(train.classes)
    names = {
        split: tuple(f"{split}/{classes[label]}/{i:05d}.png" for i, label in enumerate(images.targets))
        for split, images in data.items()
    }
    pixels = np.concatenate([images.data for images in data.values()])
    store = ArrayStore(pixels, names["train"] + names["test"])
    return {
        split: ImageDataset(
            store=store, names=names[split], labels=np.array(images.targets, dtype=np.int64), classes=classes
        )
        for split, images in data.items()
    }


def pets(root: Path | None = None) -> dict[str, ImageDataset]:
    """Oxford-IIIT Pets (Parkhi et al. 2012): 3,680 and 3,669 photographs of 37 breeds. For ``root``, see ``fetch``."""
    train, test = fetch("pets", "OxfordIIITPet", root, {"split": "trainval"}, {"split": "test"})
    # Private attributes: the public interface returns decoded images and does not expose their files.
    files = {
        split: list(zip(images._images, images._labels, strict=True))
        for split, images in {"train": train, "test": test}.items()
    }
    return photograph_datasets("pets", Path(train.root), train.classes, files)


def flowers102(root: Path | None = None) -> dict[str, ImageDataset]:
    """102 Flowers (Nilsback & Zisserman 2008): 2,040 and 6,149 photographs. For ``root``, see ``fetch``.

    The train split is torchvision's train and val together: the "2k examples" of the paper (Section 3).
    """
    # With Path as the loader, the items of a dataset are file paths instead of images.
    splits = ({"split": split, "loader": Path} for split in ("train", "val", "test"))
    train, val, test = fetch("flowers102", "Flowers102", root, *splits)
    files = {
        split: [images[i] for images in group for i in range(len(images))]
        for split, group in {"train": (train, val), "test": (test,)}.items()
    }
    return photograph_datasets("flowers102", Path(train.root), train.classes, files)


def photograph_datasets(
    name: str, root: Path, classes: Sequence[str], files: dict[str, list[tuple[Path, int]]]
) -> dict[str, ImageDataset]:
    """Datasets of image files on disk, from the (path, label) pairs of each split.

    Raises:
        RunError: files are missing, or a split lacks a class. torchvision only checks that the folders exist.
    """
    folder = root / FOLDERS[name]
    listed = [file for pairs in files.values() for file, _ in pairs]
    missing = [file for file in listed if not file.exists()]
    problem = (
        f"{len(missing):,} of its {len(listed):,} images are missing, the first is {missing[0].name}" if missing else ""
    )
    for split, pairs in files.items():
        if {label for _, label in pairs} != set(range(len(classes))):
            problem = f"its list of {split} images lacks some classes"
    if problem:
        raise RunError(
            f"the copy of {name} in {folder} is incomplete ({problem}): "
            f"copy it again, or remove it and use the source {name} to download it"
        )
    store = FolderStore(folder)
    return {
        split: ImageDataset(
            store=store,
            names=tuple(file.relative_to(folder).as_posix() for file, _ in pairs),
            labels=np.array([label for _, label in pairs], dtype=np.int64),
            classes=tuple(classes),
        )
        for split, pairs in files.items()
    }


def fetch(name: str, class_name: str, root: Path | None, *splits: dict[str, Any]) -> list[Any]:
    """Makes one torchvision dataset for each of the splits.

    Args:
        name: name of the source.
        class_name: name of the dataset's class in ``torchvision.datasets``.
        root: a folder that holds a copy, which is not downloaded; None: the data folder, downloaded if missing.
        splits: arguments of the class that select a split.

    Raises:
        UserError: torchvision is not installed.
        RunError: the download failed, or the copy is damaged.
    """
    try:
        import torchvision.datasets as datasets
    except ImportError:
        raise UserError(f"the source {name} needs torchvision: pip install 'allmlp[datasets]'") from None
    parent = root or data_folder()
    folder = parent / FOLDERS[name]
    try:
        return [getattr(datasets, class_name)(parent, download=root is None, **split) for split in splits]
    except (OSError, RuntimeError, ValueError, HTTPException) as error:  # ValueError: a truncated list of files
        reason = (str(error) or type(error).__name__).splitlines()[0].partition(" You can use download")[0]
        remedy = f"copy all of {folder} again"
        if root is None:
            remedy = (
                f"check the network, or copy the dataset to {folder} (ALLMLP_DATA sets another folder); "
                "remove damaged files there first"
            )
        raise RunError(f"{name} could not be downloaded or read ({reason}): {remedy}") from None


def data_folder() -> Path:
    """Where datasets are downloaded to."""
    try:
        return Path(os.environ.get("ALLMLP_DATA") or "~/.cache/allmlp").expanduser()
    except RuntimeError:  # the user has none, as in many containers
        raise UserError("no home folder to download to (HOME is not set): set ALLMLP_DATA to a folder") from None


DOWNLOADED = {"cifar10": cifar10, "cifar100": cifar100, "pets": pets, "flowers102": flowers102}
BUILT_IN: dict[str, Callable[[], dict[str, ImageDataset]]] = {"digits": digits, **DOWNLOADED}
