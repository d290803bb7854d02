"""Labeled images from a tree of folders, on disk or in a zip: one folder per class, perhaps below split folders.

Split folders are ``train/``, ``val/`` or ``validation/``, and ``test/``. Images inside a class folder are found at any
depth; a single outer folder around everything, which many zips have, is ignored.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np

from allmlp.data.dataset import ImageDataset
from allmlp.data.decode import EXTENSIONS, is_hidden, is_image_name
from allmlp.data.stores import FolderStore, Store, ZipStore
from allmlp.errors import UserError

SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "test": "test"}


def read_tree(store: FolderStore | ZipStore, source: str) -> tuple[dict[str, ImageDataset], dict[str, int]]:
    """Finds the images of a folder or zip.

    Returns:
        The datasets by split (the single key "all" where there are no split folders), and the number of files that
        were ignored, by kind.

    Raises:
        UserError: no images, no class folders, an empty class folder, or the same split twice.
    """
    files = list(store.names())
    images = [name for name in files if is_image_name(name)]
    if not images:
        kinds = ", ".join(sorted(EXTENSIONS))
        raise UserError(f"{source} holds no images ({len(files)} files, none of {kinds}): give a folder with images")
    while (outer := find_outer_folder(images)) is not None:
        store, source = store.subfolder(outer), f"{source}/{outer}"
        files, images = ([name.removeprefix(f"{outer}/") for name in names] for names in (files, images))
    ignored = Counter(file_kind(name) for name in files if not is_image_name(name))
    folders = [name for name in store.folders() if not is_hidden(name)]
    split_of = {name: SPLIT_FOLDERS[name.lower()] for name in folders if name.lower() in SPLIT_FOLDERS}
    for split in split_of.values():
        same = [folder for folder in split_of if split_of[folder] == split]
        if len(same) > 1:
            raise UserError(f"{source} has the folders {' and '.join(same)} for the same split: keep one of them")
    if not split_of:
        dataset, outside = read_class_folders(store, images, folders, "", source)
        return {"all": dataset}, add_outside_images(ignored, len(outside))
    datasets: dict[str, ImageDataset] = {}
    outside = [name for name in images if name.split("/")[0] not in split_of]
    for folder, split in split_of.items():
        datasets[split], more = read_class_folders(store, images, folders, f"{folder}/", f"{source}/{folder}")
        outside += more
    return datasets, add_outside_images(ignored, len(outside))


def read_class_folders(
    store: Store, images: Sequence[str], folders: Sequence[str], prefix: str, location: str
) -> tuple[ImageDataset, list[str]]:
    """The dataset of the class folders below ``prefix``, and the images below it that lie outside any class folder."""
    classes = sorted({name.removeprefix(prefix).split("/")[0] for name in folders if name.startswith(prefix)})
    below = sorted(name for name in images if name.startswith(prefix))
    members = [name for name in below if "/" in name.removeprefix(prefix)]
    counts = Counter(name.removeprefix(prefix).split("/")[0] for name in members)
    if not classes:
        raise UserError(
            f"{location} holds {len(below)} images but no class folders: put each class in a separate folder"
        )
    for name in classes:
        if not counts[name]:
            raise UserError(f"class {name!r} of {location} holds no images: add some, or remove the folder")
    position = {name: i for i, name in enumerate(classes)}
    labels = np.array([position[name.removeprefix(prefix).split("/")[0]] for name in members], dtype=np.int64)
    dataset = ImageDataset(store=store, names=tuple(members), labels=labels, classes=tuple(classes))
    return dataset, sorted(set(below) - set(members))


def find_outer_folder(images: Sequence[str]) -> str | None:
    """The only top-level folder, if it holds every image at least two levels deep and is not a split folder."""
    tops = {name.split("/")[0] for name in images}
    if len(tops) > 1 or min(tops).lower() in SPLIT_FOLDERS or min(name.count("/") for name in images) < 2:
        return None
    return min(tops)


def file_kind(name: str) -> str:
    """How an ignored file is counted: by its extension, by its name if it has none, or as hidden."""
    return "hidden files" if is_hidden(name) else PurePosixPath(name).suffix.lower() or PurePosixPath(name).name


def add_outside_images(ignored: Counter[str], count: int) -> dict[str, int]:
    return dict(ignored) | ({"images outside the class folders": count} if count else {})
