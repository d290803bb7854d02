"""The tasks of VTAB-1k in the folders that people have: images, and lists of the 800, 200, 1,000 and test images.

A task's folder holds ``train800.txt``, ``val200.txt``, ``train800val200.txt`` and ``test.txt``, with a path below that
folder and a class number on each line, such as ``images/train/0001.jpg 7``.
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from allmlp.data.builtin.copies import data_folder
from allmlp.data.builtin.vtab_copies import COPIES
from allmlp.data.dataset import ImageDataset
from allmlp.data.folders.layout import Found
from allmlp.data.names import normal_form
from allmlp.data.stores import FolderStore
from allmlp.errors import UserError, describe_os_error, printable

SIZES = {"train800.txt": 800, "val200.txt": 200, "train800val200.txt": 1000}  # the lists of VTAB-1k, and their images
LISTS = (*SIZES, "test.txt")
MAX_NAMED = 5


class TaskFolder(NamedTuple):
    """How a task's folder may be called, in lower case with underscores, the usual name first; and its classes."""

    names: tuple[str, ...]
    classes: int


FOLDERS = {
    "caltech101": TaskFolder(("caltech101", "caltech_101", "caltech102", "caltech_102", "caltech"), 102),
    "cifar100": TaskFolder(("cifar", "cifar100", "cifar_100"), 100),
    "dtd": TaskFolder(("dtd", "dtd_47"), 47),
    "flowers102": TaskFolder(
        ("oxford_flowers102", "flowers102", "oxford_flowers_102", "flowers_102", "oxford_flowers", "flowers"), 102
    ),
    "pets": TaskFolder(("oxford_iiit_pet", "pets", "oxford_iiit_pets", "oxford_pets", "oxford_iiit_pets_37"), 37),
    "svhn": TaskFolder(("svhn", "svhn_10"), 10),
    "sun397": TaskFolder(("sun397", "sun_397"), 397),
    "pcam": TaskFolder(("patch_camelyon", "pcam", "camelyon", "patch_camelyon_2"), 2),
    "eurosat": TaskFolder(("eurosat", "euro_sat", "eurosat_10"), 10),
    "resisc45": TaskFolder(("resisc45", "resisc_45", "resisc"), 45),
    "retinopathy": TaskFolder(("diabetic_retinopathy", "retinopathy", "retino", "diabetic_retinopathy_5"), 5),
    "clevr-count": TaskFolder(("clevr_count", "clevr_count_all", "clevr_count_8"), 8),
    "clevr-distance": TaskFolder(
        ("clevr_dist", "clevr_distance", "clevr_closest_object_distance", "clevr_dist_6"), 6
    ),
    "dmlab": TaskFolder(("dmlab", "dmlab_6"), 6),
    "kitti-distance": TaskFolder(
        ("kitti", "kitti_distance", "kitti_dist", "kitti_closest_vehicle_distance", "kitti_4"), 4
    ),
    "dsprites-location": TaskFolder(
        ("dsprites_loc", "dsprites_location", "dsprites_x_position", "dsprites_label_x_position", "dsprites_loc_16"), 16
    ),
    "dsprites-orientation": TaskFolder(
        ("dsprites_ori", "dsprites_orientation", "dsprites_label_orientation", "dsprites_ori_16"), 16
    ),
    "smallnorb-azimuth": TaskFolder(("smallnorb_azi", "smallnorb_azimuth", "snorb_azim", "smallnorb_azi_18"), 18),
    "smallnorb-elevation": TaskFolder(("smallnorb_ele", "smallnorb_elevation", "snorb_elev", "smallnorb_ele_9"), 9),
}  # fmt: skip
VTAB_COPIES = {f"vtab-{task}": task for task in COPIES}  # SOURCE → task
TASK_OF_NAME = {name: task for task, folder in FOLDERS.items() for name in folder.names}


def task_called(name: str) -> str | None:
    """The task that a folder's name, or a word of the command, means: ``clevr_dist`` or ``Clevr-Distance``."""
    return TASK_OF_NAME.get(name.casefold().replace("-", "_").replace(" ", "_").removeprefix("vtab_"))


def tasks_called(words: Sequence[str]) -> list[str]:
    """The tasks of these names, in the benchmark's order; all 19 if there are none.

    Raises:
        UserError: there is no such task; the message names the nearest.
    """
    if not words:
        return list(FOLDERS)
    named = {word: task_called(word) for word in words}
    for word, task in named.items():
        if task is None:
            near = difflib.get_close_matches(word, [*FOLDERS, *TASK_OF_NAME], 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"--tasks {printable(word)}: VTAB has no such task; {hint}there are {', '.join(FOLDERS)}")
    return [task for task in FOLDERS if task in named.values()]


def is_task_folder(path: Path) -> bool:
    """Whether a folder has any of the lists that only VTAB's tasks have."""
    return any((path / name).is_file() for name in SIZES)


def has_lists(path: Path) -> bool:
    """Whether a folder called as a task has any list: torchvision's copies are called so too, and have none."""
    return any((path / name).is_file() for name in LISTS)


def check_single_task(path: Path) -> None:
    """Raises a UserError for a folder of tasks, which is not one data set: its folders would be taken for classes."""
    names = [name for folder in FOLDERS.values() for name in folder.names if is_task_folder(path / name)]
    if names:
        raise UserError(
            f"{path} holds {len(names)} VTAB tasks ({listed(names)}): give one of them, such as {path / names[0]}, or "
            "run all with mixer vtab"
        )


class Sources(NamedTuple):
    """Where the data of each task is, and of those without any, where it could be."""

    found: dict[str, str]  # task → SOURCE
    missing: dict[str, str]  # task → the places


def find_sources(root: Path | None, tasks: Iterable[str], download: bool = False) -> Sources:
    """The data of tasks: their folders below ``root``, else copies in torchvision's format in the data folder.

    Args:
        root: the folder of the tasks' folders; None: copies alone.
        tasks: the tasks' names.
        download: count as found what torchvision can download.

    Raises:
        UserError: no such folder, a folder without any task's, or two folders of one task.
    """
    folders = {} if root is None else task_folders(root)
    sources = Sources({}, {})
    for task in tasks:
        copy = COPIES.get(task)
        copied = copy is not None and copy.is_there()
        if task in folders and (has_lists(folders[task]) or not copied):
            sources.found[task] = str(folders[task])
        elif copied or (copy is not None and download):
            sources.found[task] = f"vtab-{task}"
        else:
            places = [str((root or Path("FOLDER")) / FOLDERS[task].names[0])]
            places += [f"torchvision's copy, {data_folder() / copy.files[0]}"] if copy is not None else []
            sources.missing[task] = " or ".join(places)
    return sources


def task_folders(root: Path) -> dict[str, Path]:
    """The folders of tasks directly below a folder."""
    if is_task_folder(root):
        raise UserError(f"--data {root} is one task's folder: give the folder around it, and --tasks {root.name}")
    try:
        inside = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"--data {root}: {describe_os_error(error)}") from None
    found: dict[str, Path] = {}
    for path in inside:
        if (task := task_called(path.name)) is None:
            continue
        if task in found:
            raise UserError(f"{root} has two folders of the task {task}, {found[task].name} and {path.name}: keep one")
        found[task] = path
    if not found:
        there = f"it holds {listed([path.name for path in inside])}" if inside else "it holds no folders"
        raise UserError(
            f"--data {root} has no folder of any VTAB task ({there}): give the folder that holds caltech101/, cifar/, "
            "dtd/ and so on (see docs/vtab.md)"
        )
    return found


def describe_missing(sources: Sources, download: bool = False) -> str:
    """What to put where, in one line."""
    places = "; ".join(f"{task} in {place}" for task, place in sources.missing.items())
    fetched = [task for task in sources.missing if task in COPIES]
    fetch = f"--download lets torchvision fetch {', '.join(fetched)}; " if fetched and not download else ""
    total = len(sources.missing) + len(sources.found)
    return (
        f"{len(sources.missing)} of {total} tasks have no data: put {places}. A task's folder holds images/ and the "
        f"lists {', '.join(LISTS)}, with 'path label' on each line. {fetch}--skip-missing runs the tasks that are "
        "there, --tasks those you name"
    )


def read_task_folder(path: Path) -> Found:
    """The datasets of a task's folder: "train", its 1,000 images, of which 200 are to choose settings by, and "test".

    Raises:
        UserError: a list is missing or malformed, the lists do not fit together, an image is not there, or the labels
            are not 0 to K − 1.
    """
    if absent := [name for name in LISTS if not (path / name).is_file()]:
        raise UserError(
            f"{path} has no {' and no '.join(absent)}: a VTAB task's folder holds {', '.join(LISTS)}; copy all of them"
        )
    lists = {name: read_list(path / name) for name in LISTS}
    check_lists(path, lists)
    store = FolderStore(path)
    check_images(path, store, lists)
    classes = check_labels(path, lists)
    datasets = {
        part: ImageDataset(
            store=store,
            names=tuple(lists[name]),
            labels=np.array(list(lists[name].values()), dtype=np.int64),
            classes=tuple(map(str, range(classes))),
        )
        for part, name in (("train", "train800val200.txt"), ("test", "test.txt"))
    }
    notes = describe_differences(path, [len(lists[name]) for name in SIZES], classes)
    return Found(datasets, {}, notes, frozenset(lists["val200.txt"]))


def describe_differences(path: Path, images: list[int], classes: int) -> tuple[str, ...]:
    """One line, or none, on a folder that has other numbers of training images or classes than the benchmark."""
    task = task_called(path.resolve().name)
    expected = classes if task is None else FOLDERS[task].classes
    if (images, classes) == (list(SIZES.values()), expected):
        return ()
    return (
        f"{path} is not VTAB-1k's: it has {images[0]:,} + {images[1]:,} training images and {classes:,} classes, "
        f"VTAB-1k 800 + 200 and {expected:,}",
    )


def read_list(path: Path) -> dict[str, int]:
    """The labels by name of a list's images, in its order.

    Raises:
        UserError: the list has no images, a line without a label, a path elsewhere, or one image twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(describe_os_error(error)) from None
    labels: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}, {printable(line.strip())!r}"
        name, _, label = line.strip().replace("\t", " ").rpartition(" ")
        if not name or not label.isascii() or not label.isdecimal():
            raise UserError(f"{where}: has no label; write the image's path, a space and its class number, 0 or more")
        name = normal_form(str(PurePosixPath(name.strip())))
        if name.startswith("/") or ".." in name.split("/"):
            raise UserError(f"{where}: the path must lead to an image below {path.parent}, as in images/a.jpg {label}")
        if name in labels:
            raise UserError(f"{where}: the image is listed twice; remove one of the lines")
        labels[name] = int(label)
    if not labels:
        raise UserError(f"{path} lists no images: copy it again")
    return labels


def check_lists(path: Path, lists: dict[str, dict[str, int]]) -> None:
    """Raises a UserError unless the 800 and the 200 images are different ones, and together the 1,000."""
    train, val, both = (lists[name] for name in SIZES)
    if shared := sorted(train.keys() & val.keys()):
        raise UserError(
            f"{path}: train800.txt and val200.txt have {len(shared):,} images in common, the first is "
            f"{printable(shared[0])}: remove them from one of the lists"
        )
    different = sorted(name for name, _ in (train | val).items() ^ both.items())
    if different:
        raise UserError(
            f"{path}: train800val200.txt is not train800.txt and val200.txt together; the first difference is "
            f"{printable(different[0])}: join the two lists (cat train800.txt val200.txt > train800val200.txt)"
        )


def check_images(path: Path, store: FolderStore, lists: dict[str, dict[str, int]]) -> None:
    """Raises a UserError for images that are not there."""
    for name, labels in lists.items():
        if missing := missing_files(store, labels):
            raise UserError(
                f"{path / name} lists {len(labels):,} images, of which {len(missing):,} are not there, the first is "
                f"{printable(str(path / missing[0]))}: copy the images again, or remove their lines"
            )


def missing_files(store: FolderStore, names: Iterable[str]) -> list[str]:
    """Those of these names, relative to the store's root, that have no file."""
    # Folders are listed: asking for each of 70,000 files takes minutes on a network drive
    there: dict[str, set[str]] = {}
    missing = []
    for name in names:
        folder, _, file = name.rpartition("/")
        if folder not in there:
            try:
                there[folder] = {path.name for path in Path(store.path_of(folder)).iterdir()}
            except OSError:
                there[folder] = set()
        if file not in there[folder] and store.missing(name):
            missing.append(name)
    return missing


def check_labels(path: Path, lists: dict[str, dict[str, int]]) -> int:
    """The number of classes, K; raises a UserError if a label below the largest has no image in any list."""
    used = {label for labels in lists.values() for label in labels.values()}
    gap = sorted(set(range(min(max(used), len(used)))) - used)
    if gap:
        raise UserError(
            f"{path}: its labels go up to {max(used):,}, but no image has the label {gap[0]:,}: number the classes "
            "from 0 without gaps, in all lists alike"
        )
    return len(used)


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED:,} more" if names[MAX_NAMED:] else ""
    return ", ".join(map(printable, names[:MAX_NAMED])) + more
