"""Data sets of image files: Pets and Flowers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from allmlp.data.builtin.copies import FOLDERS, fetch
from allmlp.data.dataset import ImageDataset
from allmlp.data.stores import FolderStore
from allmlp.errors import RunError


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
