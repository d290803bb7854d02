"""Labeled images from a tree of folders, on disk or in a zip: one folder per class, perhaps below split folders.

Split folders are ``train/``, ``val/`` or ``validation/``, and ``test/``. Images inside a class folder are found at any
depth; a single outer folder around everything, which many zips have, is ignored, and so are the folders of runs.

The tree is walked once, and its names are packed at once (``data/names.py``): no step keeps a Python object per image.
"""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from allmlp.data.dataset import ImageDataset
from allmlp.data.decode import EXTENSIONS, is_hidden, is_image_name
from allmlp.data.names import Names, pack
from allmlp.data.stores import FolderStore, ZipStore
from allmlp.errors import UserError

SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
LOCK, RUN_FILES = ".lock", "files of training runs"
RUN_NAME = re.compile(r"-\d{8}-\d{6}(-\d+)?/$")
RUN_RECORDS = frozenset({"starts.json", "metrics.jsonl", "summary.json", "transfer.json"})
MAX_KINDS, OTHER_FILES = 1000, "other files"  # kinds of ignored files that are told apart while they are counted


class Folder(NamedTuple):
    path: str  # "" or "some/folder/"
    start: int  # its own images are images[start:stop], in order
    stop: int

    @property
    def images(self) -> int:
        return self.stop - self.start


class Tree(NamedTuple):
    """What one walk found."""

    store: FolderStore | ZipStore
    folders: list[Folder]  # all that are not hidden, parents first
    images: Names  # in the order of the folders
    ignored: Counter[str]  # number of other files by kind


def read_tree(store: FolderStore | ZipStore, source: str) -> tuple[dict[str, ImageDataset], dict[str, int]]:
    """Finds the images of a folder or zip.

    Returns:
        The datasets by split (the single key "all" where there are no split folders), and the number of files that
        were ignored, by kind.

    Raises:
        UserError: no images, no class folders, an empty class folder, or the same split twice.
    """
    tree = walk(store)
    if not len(tree.images):
        files, kinds = sum(tree.ignored.values()), ", ".join(sorted(EXTENSIONS))
        raise UserError(f"{source} holds no images ({files} files, none of {kinds}): give a folder with images")
    while (outer := find_outer_folder(tree.folders)) is not None:
        tree, source = enter(tree, outer), f"{source}/{outer}"
    top_folders = (folder.path[:-1] for folder in tree.folders if folder.path.count("/") == 1)
    split_of = {name: SPLIT_FOLDERS[name.lower()] for name in top_folders if name.lower() in SPLIT_FOLDERS}
    for split in split_of.values():
        same = [folder for folder in split_of if split_of[folder] == split]
        if len(same) > 1:
            raise UserError(f"{source} has the folders {' and '.join(same)} for the same split: keep one of them")
    if split_of:
        datasets = {
            split: read_class_folders(tree, f"{folder}/", f"{source}/{folder}") for folder, split in split_of.items()
        }
    else:
        datasets = {"all": read_class_folders(tree, "", source)}
    outside = len(tree.images) - sum(map(len, datasets.values()))
    return datasets, dict(tree.ignored) | ({"images outside the class folders": outside} if outside else {})


def walk(store: FolderStore | ZipStore) -> Tree:
    folders: list[Folder] = []
    ignored: Counter[str] = Counter()
    runs: list[str] = []  # folders of training runs, whose examples are no data

    def images() -> Iterator[str]:
        found = 0
        for path, files in store.walk():
            if is_run(path, files):
                runs.append(path)
            start, hidden, in_run = found, is_hidden(path), path.startswith(tuple(runs))
            for file in files:
                if not hidden and not in_run and is_image_name(file):
                    found += 1
                    yield path + file
                elif file != LOCK:
                    kind = RUN_FILES if in_run else "hidden files" if hidden else file_kind(file)
                    ignored[kind if kind in ignored or len(ignored) < MAX_KINDS else OTHER_FILES] += 1
            if not hidden and not in_run:
                folders.append(Folder(path, start, found))

    names = pack(images())
    return Tree(store, without_parents_of_runs(folders, runs), names, ignored)


def is_run(path: str, files: list[str]) -> bool:
    """Whether a folder is that of a training run, perhaps one that has just begun."""
    if files == [LOCK]:
        return RUN_NAME.search(path) is not None
    return "recipe.json" in files and not RUN_RECORDS.isdisjoint(files) and not any(map(is_image_name, files))


def without_parents_of_runs(folders: list[Folder], runs: list[str]) -> list[Folder]:
    """The folders, without those that hold runs and no image, such as runs/: they are no empty classes."""
    parents = {run[: i + 1] for run in runs for i, letter in enumerate(run) if letter == "/"}
    with_images = {f.path[: i + 1] for f in folders if f.images for i, letter in enumerate(f.path) if letter == "/"}
    return [folder for folder in folders if folder.path not in parents - with_images]


def enter(tree: Tree, outer: str) -> Tree:
    """The tree below its folder ``outer``, which holds all images."""
    prefix = f"{outer}/"
    below = [f._replace(path=f.path.removeprefix(prefix)) for f in tree.folders if f.path.startswith(prefix)]
    return Tree(tree.store.subfolder(outer), below, tree.images.without_prefix(prefix), tree.ignored)


def read_class_folders(tree: Tree, prefix: str, location: str) -> ImageDataset:
    """The dataset of the class folders below ``prefix``. Images that lie outside any class folder are not in it."""
    below = [folder for folder in tree.folders if folder.path.startswith(prefix)]
    class_of = {
        folder.path: folder.path.removeprefix(prefix).split("/")[0] for folder in below if folder.path != prefix
    }
    classes = sorted(set(class_of.values()))
    if not classes:
        images = sum(folder.images for folder in below)
        raise UserError(f"{location} holds {images} images but no class folders: put each class in a separate folder")
    counts = dict.fromkeys(classes, 0)
    for folder in below:
        if folder.path in class_of:
            counts[class_of[folder.path]] += folder.images
    for name, count in counts.items():
        if not count:
            raise UserError(f"class {name!r} of {location} holds no images: add some, or remove the folder")
    runs = sorted_runs([folder for folder in below if folder.path in class_of], tree.images)
    position = {name: i for i, name in enumerate(classes)}
    labels = np.array([position[class_of[run.path]] for run in runs], dtype=np.int64)
    return ImageDataset(
        store=tree.store,
        names=tree.images.subset(np.concatenate([np.arange(run.start, run.stop) for run in runs])),
        labels=np.repeat(labels, [run.images for run in runs]),
        classes=tuple(classes),
    )


def sorted_runs(folders: list[Folder], images: Names) -> list[Folder]:
    """The folders' images as runs that give the order of their complete names, of which none is sorted by itself.

    A folder's own images are in order. A subfolder's come between two of them, so the folder is cut there.
    """
    cuts: dict[str, list[int]] = {folder.path: [folder.start, folder.stop] for folder in folders}
    by_path = {folder.path: folder for folder in folders}
    for folder in folders:
        parent = by_path.get(folder.path[: folder.path.rfind("/", 0, -1) + 1])
        if parent is not None:
            cuts[parent.path].append(bisect_left(images, folder.path, parent.start, parent.stop))
    runs = []
    for path, places in cuts.items():
        places.sort()
        runs += [Folder(path, a, b) for a, b in pairwise(places) if a < b]
    return sorted(runs, key=lambda run: images[run.start])


def find_outer_folder(folders: list[Folder]) -> str | None:
    """The only top-level folder, if it holds every image at least two levels deep and is not a split folder."""
    paths = [folder.path for folder in folders if folder.images]
    tops = {path.split("/")[0] for path in paths}
    if len(tops) > 1 or min(tops).lower() in SPLIT_FOLDERS or min(path.count("/") for path in paths) < 2:
        return None
    return min(tops)


def file_kind(name: str) -> str:
    """How an ignored file is counted: by its extension, by its name if it has none, or as hidden."""
    return "hidden files" if is_hidden(name) else PurePosixPath(name).suffix.lower() or name
