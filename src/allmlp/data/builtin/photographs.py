"""Data sets of image files in torchvision's layout."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.data.builtin.copies import PLACES, fetch
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


def food101(root: Path | None = None) -> dict[str, ImageDataset]:
    """Food-101 (Bossard et al. 2014): 75,750 and 25,250 photographs of 101 dishes. For ``root``, see ``fetch``."""
    loaded = fetch("food101", "Food101", root, {"split": "train"}, {"split": "test"})
    return from_lists("food101", Path(loaded[0].root), dict(zip(("train", "test"), loaded, strict=True)))


def dtd(root: Path | None = None) -> dict[str, ImageDataset]:
    """Describable Textures (Cimpoi et al. 2014), partition 1: 3 × 1,880 images of 47 textures. See ``fetch``."""
    parts = ("train", "val", "test")
    loaded = fetch("dtd", "DTD", root, *({"split": part, "partition": 1} for part in parts))
    return from_lists("dtd", Path(loaded[0].root), dict(zip(parts, loaded, strict=True)))


def from_lists(name: str, root: Path, loaded: dict[str, Any]) -> dict[str, ImageDataset]:
    """From torchvision's data sets that hold lists of files and labels."""
    files = {part: list(zip(images._image_files, images._labels, strict=True)) for part, images in loaded.items()}
    return photograph_datasets(name, root, loaded["train"].classes, files)


def eurosat(root: Path | None = None) -> dict[str, ImageDataset]:
    """EuroSAT (Helber et al. 2019): 27,000 satellite images of 10 kinds of land, without parts. See ``fetch``."""
    (loaded,) = fetch("eurosat", "EuroSAT", root, {})
    files = {"all": [(Path(path), label) for path, label in loaded.samples]}
    return photograph_datasets("eurosat", Path(loaded.root), loaded.classes, files)


def caltech101(root: Path | None = None) -> dict[str, ImageDataset]:
    """Caltech-101 (Li et al. 2004): 8,677 photographs of 101 things, without parts. For ``root``, see ``fetch``."""
    (loaded,) = fetch("caltech101", "Caltech101", root, {})
    folder = Path(loaded.root) / "101_ObjectCategories"
    files = [
        (folder / loaded.categories[label] / f"image_{number:04d}.jpg", label)
        for number, label in zip(loaded.index, loaded.y, strict=True)
    ]
    return photograph_datasets("caltech101", Path(loaded.root).parent, loaded.categories, {"all": files})


def sun397(root: Path | None = None) -> dict[str, ImageDataset]:
    """SUN397 (Xiao et al. 2010): 108,754 photographs of 397 scenes, without parts. For ``root``, see ``fetch``."""
    (loaded,) = fetch("sun397", "SUN397", root, {})
    files = sorted(zip(loaded._image_files, loaded._labels, strict=True))  # torchvision's order is the disk's
    return photograph_datasets("sun397", Path(loaded.root), loaded.classes, {"all": files})


def gtsrb(root: Path | None = None) -> dict[str, ImageDataset]:
    """GTSRB (Stallkamp et al. 2012): 26,640 and 12,630 images of 43 traffic signs. For ``root``, see ``fetch``."""
    train, test = fetch("gtsrb", "GTSRB", root, {"split": "train"}, {"split": "test"})
    files = {
        part: [(Path(path), label) for path, label in images._samples]
        for part, images in (("train", train), ("test", test))
    }
    return photograph_datasets("gtsrb", Path(train.root), [f"{i:05d}" for i in range(43)], files)


def photograph_datasets(
    name: str, root: Path, classes: Sequence[str], files: dict[str, list[tuple[Path, int]]]
) -> dict[str, ImageDataset]:
    """Datasets of image files on disk, from the (path, label) pairs of each split.

    Raises:
        RunError: files are missing, or a split lacks a class. torchvision only checks that the folders exist.
    """
    folder = root / PLACES[name]
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
