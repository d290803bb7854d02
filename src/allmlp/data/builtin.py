"""The SOURCEs that have names: scikit-learn's digits, and the paper's small data sets as torchvision keeps them.

Those are looked for in the folder that ALLMLP_DATA names, else ``~/.cache/allmlp``, and downloaded when missing.
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

FOLDERS = {  # where torchvision keeps each, below the folder it is given
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "pets": "oxford-iiit-pet",
    "flowers102": "flowers-102",
}


def digits() -> dict[str, ImageDataset]:
    """The 1,797 handwritten digits of 8×8 pixels inside scikit-learn (Alpaydin & Kaynak 1998): no download."""
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)  # (1797, 64) from 0 to 16
    grey = np.rint(values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    names = tuple(f"{label}/{i:04d}.png" for i, label in enumerate(labels))
    store = ArrayStore(np.repeat(grey[..., None], 3, axis=-1), names)
    classes = tuple(str(i) for i in range(10))
    return {"all": ImageDataset(store=store, names=names, labels=labels.astype(np.int64), classes=classes)}


def cifar10(root: Path | None = None) -> dict[str, ImageDataset]:
    """CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 images of 32×32 pixels; a copy in root, else by name."""
    return cifar("cifar10", "CIFAR10", root)


def cifar100(root: Path | None = None) -> dict[str, ImageDataset]:
    """CIFAR-100 (Krizhevsky 2009), its 100 fine classes: images as in CIFAR-10; a copy in root, else by name."""
    return cifar("cifar100", "CIFAR100", root)


def cifar(name: str, kind: str, root: Path | None) -> dict[str, ImageDataset]:
    train, test = fetch(name, kind, root, {"train": True}, {"train": False})
    data, classes = {"train": train, "test": test}, tuple(train.classes)
    names = {
        part: tuple(f"{part}/{classes[label]}/{i:05d}.png" for i, label in enumerate(images.targets))
        for part, images in data.items()
    }
    pixels = np.concatenate([images.data for images in data.values()])
    store = ArrayStore(pixels, names["train"] + names["test"])
    return {
        part: ImageDataset(
            store=store, names=names[part], labels=np.array(images.targets, dtype=np.int64), classes=classes
        )
        for part, images in data.items()
    }


def pets(root: Path | None = None) -> dict[str, ImageDataset]:
    """Oxford-IIIT Pets (Parkhi et al. 2012): 3,680 and 3,669 photographs of 37 breeds; a copy in root, else by name."""
    train, test = fetch("pets", "OxfordIIITPet", root, {"split": "trainval"}, {"split": "test"})
    # Private, but the items of the data set are decoded images: nothing public tells their files.
    files = {
        part: list(zip(images._images, images._labels, strict=True))
        for part, images in {"train": train, "test": test}.items()
    }
    return photographs("pets", Path(train.root), train.classes, files)


def flowers102(root: Path | None = None) -> dict[str, ImageDataset]:
    """102 Flowers (Nilsback & Zisserman 2008): 2,040 and 6,149 photographs; a copy in root, else by name.

    Train is torchvision's train and val together: the paper's "2k examples" (Section 3).
    """
    splits = ({"split": split, "loader": Path} for split in ("train", "val", "test"))  # Path: the file, not decoded
    train, val, test = fetch("flowers102", "Flowers102", root, *splits)
    files = {
        part: [images[i] for images in together for i in range(len(images))]
        for part, together in {"train": (train, val), "test": (test,)}.items()
    }
    return photographs("flowers102", Path(train.root), train.classes, files)


def photographs(
    name: str, root: Path, classes: Sequence[str], files: dict[str, list[tuple[Path, int]]]
) -> dict[str, ImageDataset]:
    """Parts of files with labels, left on disk for ``data/images.py`` to decode, as those of any folder are.

    Raises:
        RunError: files are missing, or a part lacks a class: torchvision looks no further than for the folders.
    """
    folder = root / FOLDERS[name]
    listed = [file for pairs in files.values() for file, _ in pairs]
    missing = [file for file in listed if not file.exists()]
    wrong = (
        f"{len(missing):,} of its {len(listed):,} images are missing, {missing[0].name} the first" if missing else ""
    )
    for part, pairs in files.items():
        if {label for _, label in pairs} != set(range(len(classes))):
            wrong = f"its list of {part} images leaves classes out"
    if wrong:
        raise RunError(
            f"the copy of {name} in {folder} is not whole ({wrong}): "
            "copy it again, or remove it to have it downloaded by name"
        )
    store = FolderStore(folder)
    return {
        part: ImageDataset(
            store=store,
            names=tuple(file.relative_to(folder).as_posix() for file, _ in pairs),
            labels=np.array([label for _, label in pairs], dtype=np.int64),
            classes=tuple(classes),
        )
        for part, pairs in files.items()
    }


def fetch(name: str, kind: str, root: Path | None, *splits: dict[str, Any]) -> list[Any]:
    """torchvision's data set of that kind for each of the splits: a copy in root, else by name, downloaded if missing.

    Raises:
        UserError: torchvision is not installed.
        RunError: the download failed, or the copy is damaged.
    """
    try:
        import torchvision.datasets as datasets
    except ImportError:
        raise UserError(f"{name} by name needs torchvision: pip install 'allmlp[datasets]'") from None
    place = root or Path(os.environ.get("ALLMLP_DATA") or "~/.cache/allmlp").expanduser()
    folder = place / FOLDERS[name]
    try:
        return [getattr(datasets, kind)(place, download=root is None, **split) for split in splits]
    except (OSError, RuntimeError, ValueError, HTTPException) as error:  # ValueError: of a list cut off in mid-line
        reason = (str(error) or type(error).__name__).splitlines()[0].partition(" You can use download")[0]
        remedy = f"copy {folder} again, whole"
        if root is None:
            remedy = (
                f"check the network, or put a copy of it at {folder} (ALLMLP_DATA names another place); "
                "what is damaged there, remove first"
            )
        raise RunError(f"{name} could not be had ({reason}): {remedy}") from None


DOWNLOADED = {"cifar10": cifar10, "cifar100": cifar100, "pets": pets, "flowers102": flowers102}
BUILT_IN: dict[str, Callable[[], dict[str, ImageDataset]]] = {"digits": digits, **DOWNLOADED}
