"""ImageNet (ILSVRC 2012) in the layouts that people hold. It cannot be downloaded: it needs an account.

Training images are in one folder for each synset (n01440764). Validation images, which are the test images of the paper
and of this source, are in such folders too, or in a single one with a list beside it. Classes are synsets, in order.
"""

import csv
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.data.builtin.copies import data_folder, import_torchvision
from allmlp.data.dataset import ImageDataset
from allmlp.data.decode import is_image_name
from allmlp.data.names import pack
from allmlp.data.stores import FolderStore
from allmlp.errors import RunError, UserError, brief

SYNSET = re.compile(r"n\d{8}")
WHERE = (
    "put there ILSVRC/Data/CLS-LOC/train and val as Kaggle packs them, or train/ with one folder for each synset "
    "(n01440764, …) and val/ with such folders, or val/ without folders and a list of its labels: "
    "LOC_val_solution.csv, imagenet_2012_validation_synset_labels.txt, val.txt, or meta.bin of torchvision"
)


def is_imagenet(folder: Path) -> bool:
    """Whether a folder is ImageNet in a layout that is not an ordinary tree of parts and classes."""
    base = find_base(folder)
    if not (base / "train").is_dir() or not (base / "val").is_dir():
        return False
    return (
        base != folder or (folder / "meta.bin").is_file() or (is_flat(base / "val") and find_list(folder) is not None)
    )


def imagenet(root: Path | None = None) -> dict[str, ImageDataset]:
    """1,281,167 and 50,000 photographs of 1,000 classes (Russakovsky et al. 2015).

    Args:
        root: the folder that holds it; None: ``imagenet`` in the data folder, or that folder itself.

    Raises:
        UserError: it is not there, or validation images have no list of labels; says what to put where.
        RunError: the list does not fit the images.
    """
    places = [root] if root is not None else [data_folder() / "imagenet", data_folder()]
    folder = next((place for place in places if (find_base(place) / "train").is_dir()), None)
    if folder is None:
        raise UserError(f"no ImageNet at {places[0]}, and it cannot be downloaded: {WHERE} (or give its folder)")
    base = find_base(folder)
    if not (base / "val").is_dir():
        raise UserError(f"the ImageNet in {folder} has no {base / 'val'}: {WHERE}")
    if (folder / "meta.bin").is_file() and not is_flat(base / "val"):
        train, val = read_by_torchvision(folder)
    else:
        train = list(labeled_folders(base, "train"))
        val = flat_images(folder, base) if is_flat(base / "val") else list(labeled_folders(base, "val"))
    classes = tuple(sorted({synset for _, synset in train}))
    if not classes:
        raise UserError(f"{base / 'train'} has no folder of a synset that holds images: {WHERE}")
    position, store = {synset: i for i, synset in enumerate(classes)}, FolderStore(base)
    if unknown := sorted({synset for _, synset in val} - position.keys()):
        raise UserError(
            f"{len(unknown)} classes of {base / 'val'} are not in train/, the first is {unknown[0]}: {WHERE}"
        )
    return {
        part: ImageDataset(
            store=store,
            names=pack(name for name, _ in images),
            labels=np.fromiter((position[synset] for _, synset in images), dtype=np.int64, count=len(images)),
            classes=classes,
        )
        for part, images in (("train", train), ("test", val))
    }


Images = list[tuple[str, str]]  # name and synset of each


def find_base(folder: Path) -> Path:
    """The folder of train/ and val/."""
    for below in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC"):
        if (folder / below).is_dir():
            return folder / below
    return folder


def is_flat(folder: Path) -> bool:
    """Whether a folder holds images without folders for their classes."""
    with os.scandir(folder) as entries:
        return next((not entry.is_dir() for entry in entries if is_image_name(entry.name) or entry.is_dir()), False)


def labeled_folders(base: Path, part: str) -> Iterator[tuple[str, str]]:
    """The images in the folders of synsets, in order."""
    for synset in sorted(name for name in os.listdir(base / part) if SYNSET.fullmatch(name)):  # noqa: PTH208
        for name in sorted(os.listdir(base / part / synset)):  # noqa: PTH208
            if is_image_name(name):
                yield f"{part}/{synset}/{name}", synset


def read_by_torchvision(folder: Path) -> tuple[Images, Images]:
    """By ``torchvision.datasets.ImageNet``, from the folders that it makes."""
    kind = import_torchvision("imagenet").ImageNet
    try:
        train, val = (kind(folder, split=split) for split in ("train", "val"))
    except Exception as error:  # a damaged meta.bin, empty folders
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RunError(
            f"the ImageNet in {folder} could not be read ({reason}): copy meta.bin and the folders again"
        ) from None

    def listed(images: Any) -> Images:
        return [(Path(path).relative_to(folder).as_posix(), images.wnids[label]) for path, label in images.samples]

    return listed(train), listed(val)


# Validation images in one folder


def flat_images(folder: Path, base: Path) -> Images:
    """The images of val/ with the synsets of the list."""
    found = sorted(name for name in os.listdir(base / "val") if is_image_name(name))  # noqa: PTH208
    path = find_list(folder)
    if path is None:
        raise UserError(f"the images in {base / 'val'} have no labels: {WHERE}")
    labels = READERS[path.name](path, found, base)
    missing = [name for name in found if Path(name).stem not in labels]
    absent = len(labels) - (len(found) - len(missing))
    if missing or absent:
        first = f", the first {missing[0]}" if missing else ""
        raise RunError(
            f"{path} does not fit the images in {base / 'val'}: {len(missing):,} images are not in it{first}, and "
            f"{absent:,} of its images are not there; copy them again"
        )
    return [(f"val/{name}", labels[Path(name).stem]) for name in found]


def find_list(folder: Path) -> Path | None:
    """The list of labels of the validation images, in the folder, in those of the tree, or beside it."""
    base = find_base(folder)
    places = dict.fromkeys(
        [folder, base, base / "val", folder / "ILSVRC/ImageSets/CLS-LOC", folder / "ImageSets/CLS-LOC"]
    )
    return next((place / name for name in READERS for place in places if (place / name).is_file()), None)


def read_kaggle(path: Path, names: list[str], base: Path) -> dict[str, str]:
    """ImageId,PredictionString: the name without ending, then a synset and a box for each thing in the image."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    return checked(path, ((row.get("ImageId"), (row.get("PredictionString") or "").split(" ")[0]) for row in rows))


def read_synsets(path: Path, names: list[str], base: Path) -> dict[str, str]:
    """One synset a line, in the order of the images."""
    lines = path.read_text(encoding="utf-8-sig").split()
    if len(lines) != len(names):
        raise RunError(f"{path} has {len(lines):,} labels, and {base / 'val'} {len(names):,} images: copy them again")
    return checked(path, ((Path(name).stem, line) for name, line in zip(names, lines, strict=True)))


def read_numbers(path: Path, names: list[str], base: Path) -> dict[str, str]:
    """Name and number of the class, from 0, in the order of the synsets: Caffe's val.txt."""
    synsets = sorted(name for name in os.listdir(base / "train") if SYNSET.fullmatch(name))  # noqa: PTH208
    pairs = []
    for line in filter(None, map(str.strip, path.read_text(encoding="utf-8-sig").splitlines())):
        name, _, number = line.rpartition(" ")
        valid = number.isdecimal() and int(number) < len(synsets)
        pairs.append((Path(name.strip()).stem, synsets[int(number)] if valid else line))
    return checked(path, pairs)


def read_meta(path: Path, names: list[str], base: Path) -> dict[str, str]:
    """torchvision's meta.bin: names of the classes, and the synset of each validation image in order."""
    read = import_torchvision("imagenet").imagenet.load_meta_file
    try:
        _, synsets = read(path.parent)
    except Exception as error:
        raise RunError(f"{path} could not be read ({type(error).__name__}): copy it again") from None
    if len(synsets) != len(names):
        raise RunError(f"{path} has {len(synsets):,} labels, and {base / 'val'} {len(names):,} images: copy them again")
    return checked(path, ((Path(name).stem, synset) for name, synset in zip(names, synsets, strict=True)))


def checked(path: Path, pairs: Iterable[tuple[str | None, str]]) -> dict[str, str]:
    """Name without ending → synset; raises a RunError for what is no synset."""
    labels = {}
    for name, synset in pairs:
        if not name or not SYNSET.fullmatch(synset):
            raise RunError(f"{path}: {brief(synset)} is no synset such as n01440764: copy the list again")
        labels[name] = synset
    return labels


READERS: dict[str, Callable[[Path, list[str], Path], dict[str, str]]] = {
    "LOC_val_solution.csv": read_kaggle,
    "imagenet_2012_validation_synset_labels.txt": read_synsets,
    "val.txt": read_numbers,
    "meta.bin": read_meta,
}
