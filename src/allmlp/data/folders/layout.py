"""Labeled images from a tree of folders: one folder per class, perhaps below the folders of parts.

Images inside a class folder are found at any depth; a single outer folder around everything, which many zips have, is
ignored.
"""

from bisect import bisect_left
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from allmlp.data.dataset import ImageDataset
from allmlp.data.folders.arrangement import Group, arrange, find_outer_folder, listed
from allmlp.data.folders.walk import Folder, Tree, enter, walk
from allmlp.data.formats import readable_extensions
from allmlp.data.names import Names
from allmlp.data.stores import FolderStore, ZipStore
from allmlp.errors import UserError, printable

MAX_KINDS_NAMED = 5


class Found(NamedTuple):
    """What a source holds."""

    datasets: dict[str, ImageDataset]  # by part; the single key "all" where there are no parts
    left_out: dict[str, int]  # number of files that are not in a dataset, by kind
    notes: tuple[str, ...]  # what else the user should know, one line each
    choose_by: frozenset[str] = frozenset()  # training images that the source itself holds out to choose settings by


def read_tree(store: FolderStore | ZipStore, source: str) -> Found:
    """Finds the images of a folder or zip, its parts and its classes.

    Raises:
        UserError: no images, no class folders, a class folder with other files alone, the same part twice, or folders
            that may be parts as well as classes.
    """
    tree = walk(store, source)
    images = len(tree.images)
    if not images:
        raise UserError(f"{source} holds no images ({what_is_there(tree)}): give a folder with images")
    while (outer := find_outer_folder(tree)) is not None:
        tree, source = enter(tree, outer), f"{source}/{outer}"
    groups, unlabeled, notes = arrange(tree, source)
    datasets: dict[str, ImageDataset] = {}
    no_labels: Counter[str] = Counter()
    for name in unlabeled:
        no_labels[f"images of {name} without labels"] += count_images(tree, f"{name}/")
    for group in groups:
        dataset = read_classes(tree, group, f"{source}/{group.prefix}".rstrip("/"), notes)
        known = datasets["train"].classes if "train" in datasets else dataset.classes
        if len(dataset.classes) < 2 and not set(dataset.classes) & set(known):
            no_labels[f"images of {group.prefix}{''.join(dataset.classes)} without labels"] += len(dataset)
        else:
            datasets[group.part] = dataset
    outside = images - sum(map(len, datasets.values())) - no_labels.total()
    left_out = dict(tree.ignored + no_labels + Counter({"images outside the class folders": outside}))
    if tree.unreadable:
        notes.append(f"folders that cannot be read: {listed(tree.unreadable)}: check their permissions")
    return Found(datasets, left_out, tuple(notes))


def what_is_there(tree: Tree) -> str:
    if tree.unreadable:
        path, problem = next(iter(tree.unreadable.items()))
        return f"{len(tree.unreadable)} of its folders cannot be read, the first is {printable(path[:-1])}: {problem}"
    return f"{tree.ignored.total()} files{kinds_in(tree.ignored)}, none of {', '.join(sorted(readable_extensions()))}"


def kinds_in(kinds: Counter[str]) -> str:
    named = [f"{count:,} {printable(kind)}" for kind, count in kinds.most_common(MAX_KINDS_NAMED)]
    return f" ({', '.join(named)})" if named else ""


def count_images(tree: Tree, prefix: str) -> int:
    return sum(folder.images for folder in tree.folders if folder.path.startswith(prefix))


def read_classes(tree: Tree, group: Group, location: str, notes: list[str]) -> ImageDataset:
    """The dataset of a group's class folders. Images that lie outside any class folder are not in it."""
    class_of = classes_by_folder(tree, group)
    counts = dict.fromkeys(class_of.values(), 0)
    for folder in tree.folders:
        if folder.path in class_of:
            counts[class_of[folder.path]] += folder.images
    if empty := [name for name, count in counts.items() if not count]:
        if group.part in ("train", "all"):
            for name in empty:
                check_no_files(tree, f"{group.prefix}{name}/", location)
            notes.append(f"folders of {location} without images are no classes: {listed(empty)}")
        else:
            notes.append(f"{location} has no images of {listed(empty)}")
    classes = sorted(counts.keys() - set(empty))
    runs = sorted_runs([folder for folder in tree.folders if folder.path in class_of], tree.images)
    position = {name: i for i, name in enumerate(classes)}
    labels = np.array([position[class_of[run.path]] for run in runs], dtype=np.int64)
    return ImageDataset(
        store=tree.store,
        names=tree.images.subset(np.concatenate([np.arange(run.start, run.stop) for run in runs])),
        labels=np.repeat(labels, [run.images for run in runs]),
        classes=tuple(classes),
    )


def classes_by_folder(tree: Tree, group: Group) -> dict[str, str]:
    """The class that each folder below a group belongs to."""
    below = [f.path for f in tree.folders if f.path.startswith(group.prefix) and f.path != group.prefix]
    class_of = {path: path.removeprefix(group.prefix).split("/")[0] for path in below}
    return {path: name for path, name in class_of.items() if name not in group.excluded}


def check_no_files(tree: Tree, prefix: str, location: str) -> None:
    """Raises a UserError if a class folder without images holds other files, or what it holds cannot be read."""
    name = printable(prefix.rstrip("/").rpartition("/")[2])
    for path, problem in tree.unreadable.items():
        if path.startswith(prefix):
            raise UserError(f"class {name!r} of {location} cannot be read ({problem}): check its permissions")
    files = sum((kinds for path, kinds in tree.others.items() if path.startswith(prefix)), Counter[str]())
    if files:
        raise UserError(
            f"class {name!r} of {location} holds no images that can be read{kinds_in(files)}: add some, convert the "
            "files to PNG or JPEG, or remove the folder"
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
