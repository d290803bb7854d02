"""VTAB tasks from copies in torchvision's format, in the data folder (ALLMLP_DATA).

The test images are VTAB's where torchvision has that split. VTAB's 1,000 training images are the first of the order in
which TensorFlow Datasets keeps them, which these copies do not have: here 1,000 are drawn with a seed. So results are
close to VTAB's, not VTAB's, and a note of each source says so.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from allmlp.data.builtin.arrays import cifar100, svhn
from allmlp.data.builtin.copies import data_folder, fetch
from allmlp.data.builtin.photographs import dtd, eurosat, flowers102, pets, sun397
from allmlp.data.dataset import ImageDataset
from allmlp.data.folders.layout import Found
from allmlp.data.split import stratified_split
from allmlp.data.stores import FolderStore
from allmlp.errors import RunError, UserError, printable

TRAIN, VAL = 800, 200
SEED = 0
PER_CLASS = 30  # training images of Caltech-101, as in TensorFlow Datasets
CLEVR_DISTANCES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0)  # above each of them begins a class (task_adaptation, data/clevr.py)
KITTI_METERS = (-100.0, 8.0, 20.0, 999.0)  # likewise, data/kitti.py; without a vehicle, the distance is 1,000
VEHICLES = ("Car", "Van", "Truck")
DISTANCES = ("up to 8", "8 to 8.5", "8.5 to 9", "9 to 9.5", "9.5 to 10", "over 10")
METERS = ("up to 8 m", "8 to 20 m", "over 20 m", "no vehicle")
PATCHES = "camelyonpatch_level_2_split_{}_{}.h5"  # of a split, its images (x) or labels (y)
FileList = list[tuple[Path, int]]  # images and their labels


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A data set as torchvision keeps it: what must be in the data folder, and how it is read."""

    files: tuple[str, ...]
    read: Callable[[], dict[str, ImageDataset]]  # "train" and "test"

    def is_there(self) -> bool:
        return all((data_folder() / name).exists() for name in self.files)


def read_copy(task: str) -> Found:
    """A task's datasets: "train", 1,000 images drawn from the training images, of which 200 to choose by, and "test".

    Raises:
        UserError: torchvision, or h5py for PCam, is not installed.
        RunError: the copy cannot be downloaded, or is damaged.
    """
    datasets = COPIES[task].read()
    train = datasets["train"]
    drawn = draw(train.names, TRAIN + VAL, SEED)
    held_out = drawn[TRAIN:] if len(train) >= TRAIN + VAL else drawn[: max(len(drawn) // 5, 1)]
    kept = len(drawn) - len(held_out)
    note = (
        f"the training images of vtab-{task} are not VTAB-1k's: {kept:,} + {len(held_out):,} were drawn here, "
        f"with seed {SEED}, from torchvision's copy"
    )
    return Found(
        datasets | {"train": train.subset(np.sort(drawn))},
        {},
        (note,),
        frozenset(str(train.names[i]) for i in held_out.tolist()),
    )


def draw(names: Sequence[str], count: int, seed: int) -> np.ndarray:
    """The indices of ``count`` names in the order of SHA-256(seed, name): the same on every machine."""
    digests = [hashlib.sha256(f"{seed}/{name}".encode(errors="surrogateescape")).digest() for name in names]
    return np.array(sorted(range(len(digests)), key=digests.__getitem__)[:count], dtype=np.int64)


def textures() -> dict[str, ImageDataset]:
    """Describable Textures: VTAB draws from its training and validation images."""
    parts = dtd()
    train, val = parts["train"], parts["val"]
    names, labels = (*train.names, *val.names), np.concatenate([train.labels, val.labels])
    return {"train": replace(train, names=names, labels=labels), "test": parts["test"]}


def caltech101() -> dict[str, ImageDataset]:
    """Caltech-101 (Fei-Fei et al. 2004) with its background class, as VTAB has it: 30 images of each to train on."""
    fetch("caltech101", "Caltech101", None, {})  # which leaves the background out
    images = image_folder(data_folder() / "caltech101" / "101_ObjectCategories")
    order = draw(images.names, len(images), SEED)
    train = np.concatenate([order[images.labels[order] == label][:PER_CLASS] for label in range(len(images.classes))])
    test = np.setdiff1d(np.arange(len(images)), train)
    return {"train": images.subset(np.sort(train)), "test": images.subset(test)}


def pcam() -> dict[str, ImageDataset]:
    """PatchCamelyon (Veeling et al. 2018): 262,144 and 32,768 patches of 96×96 pixels, with and without a tumor."""
    try:
        import h5py
    except ImportError:
        raise UserError("the source vtab-pcam needs h5py: pip install 'allmlp[datasets]'") from None
    fetch("vtab-pcam", "PCAM", None, {"split": "train"}, {"split": "test"}, folder="pcam")
    folder, found = data_folder() / "pcam", {}
    store = PatchStore(folder)
    for split in ("train", "test"):
        try:
            with h5py.File(folder / PATCHES.format(split, "y")) as file:
                labels = np.asarray(file["y"]).reshape(-1).astype(np.int64)
        except (OSError, KeyError) as error:
            raise damaged("pcam", folder, error) from None
        found[split] = ImageDataset(
            store=store,
            names=tuple(f"{split}/{i:06d}" for i in range(len(labels))),
            labels=labels,
            classes=("no tumor", "tumor"),
        )
    return found


def clevr_count() -> dict[str, ImageDataset]:
    """CLEVR (Johnson et al. 2017): 70,000 and 15,000 images; the label is the number of objects, 3 to 10."""
    return clevr(lambda scene: len(scene["objects"]) - 3, [f"{count} objects" for count in range(3, 11)])


def clevr_distance() -> dict[str, ImageDataset]:
    """CLEVR; the label is the distance to the closest object, in six classes."""
    return clevr(
        lambda scene: interval(min(thing["pixel_coords"][2] for thing in scene["objects"]), CLEVR_DISTANCES), DISTANCES
    )


def clevr(label: Callable[[dict[str, Any]], int], classes: Sequence[str]) -> dict[str, ImageDataset]:
    """CLEVR with the labels that a function makes of a scene. VTAB tests on its validation images."""
    fetch("vtab-clevr", "CLEVRClassification", None, {"split": "test"}, folder="clevr")
    folder, parts = data_folder() / "clevr" / "CLEVR_v1.0", {}
    for split, part in (("train", "train"), ("val", "test")):
        try:
            scenes = json.loads((folder / "scenes" / f"CLEVR_{split}_scenes.json").read_text(encoding="utf-8"))
            images = folder / "images" / split
            parts[part] = [(images / scene["image_filename"], label(scene)) for scene in scenes["scenes"]]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise damaged("clevr", folder, error) from None
    return of_files("clevr", folder, parts, classes)


def kitti_distance() -> dict[str, ImageDataset]:
    """KITTI (Geiger et al. 2012): 7,481 images, a tenth to test on; labels are distances to the closest vehicle."""
    [images] = fetch("vtab-kitti-distance", "Kitti", None, {"train": True}, folder="Kitti")
    folder = data_folder() / "Kitti" / "raw" / "training"
    try:
        labels = [interval(closest_vehicle(Path(path).read_text()), KITTI_METERS) for path in images.targets]
    except (OSError, ValueError, LookupError) as error:
        raise damaged("kitti", folder, error) from None
    files = sorted(zip(map(Path, images.images), labels, strict=True))
    return split_off_test(of_files("kitti", folder, {"all": files}, METERS)["all"], 0.1)


def closest_vehicle(text: str) -> float:
    """Meters to the closest car, van or truck of KITTI's label file, along the camera's axis; 1,000 without any."""
    rows = [line.split() for line in text.splitlines()]
    return min((float(row[13]) for row in rows if row and row[0] in VEHICLES), default=1000.0)


def interval(value: float, limits: Sequence[float]) -> int:
    """Which of the intervals above each limit holds the value, from 0."""
    return sum(limit < value for limit in limits) - 1


def image_folder(folder: Path) -> ImageDataset:
    """The images of a folder of class folders, in the order of their names."""
    import torchvision.datasets as datasets

    try:
        images = datasets.ImageFolder(folder)
    except (OSError, RuntimeError) as error:
        raise damaged(folder.name, folder, error) from None
    pairs = [(Path(path), label) for path, label in images.samples]
    return of_files(folder.name, folder, {"all": pairs}, images.classes)["all"]


def of_files(name: str, folder: Path, parts: dict[str, FileList], classes: Sequence[str]) -> dict[str, ImageDataset]:
    """Datasets of image files below a folder.

    Raises:
        RunError: a file is missing.
    """
    paths = [path for files in parts.values() for path, _ in files]
    there: dict[Path, set[str]] = {}
    for parent in {path.parent for path in paths}:
        there[parent] = {path.name for path in parent.iterdir()} if parent.is_dir() else set()
    missing = [path for path in paths if path.name not in there[path.parent]]
    if missing:
        raise damaged(name, folder, f"{len(missing):,} of {len(paths):,} images are missing, first {missing[0].name}")
    store = FolderStore(folder)
    return {
        part: ImageDataset(
            store=store,
            names=tuple(path.relative_to(folder).as_posix() for path, _ in files),
            labels=np.array([label for _, label in files], dtype=np.int64),
            classes=tuple(classes),
        )
        for part, files in parts.items()
    }


def split_off_test(images: ImageDataset, fraction: float) -> dict[str, ImageDataset]:
    kept, held_out = stratified_split(images.labels, images.names, fraction, SEED)
    return {"train": images.subset(kept), "test": images.subset(held_out)}


def damaged(name: str, folder: Path, problem: object) -> RunError:
    words = " ".join(str(problem).split())
    return RunError(
        f"the copy of {name} in {folder} is damaged or incomplete ({printable(words)}): copy it again, or remove "
        "it and let torchvision download it"
    )


class PatchStore:
    """The images of PatchCamelyon's HDF5 files; "train/000007" is the eighth of one. They take 8 GB unpacked."""

    in_memory = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.opened: dict[tuple[int, str], Any] = {}  # by process, since processes cannot share a file of this kind

    def patches(self, split: str) -> Any:
        """A file's (N, 96, 96, 3) uint8 array, on disk."""
        key = os.getpid(), split
        if key not in self.opened:
            import h5py

            try:
                self.opened[key] = h5py.File(self.folder / PATCHES.format(split, "x"))["x"]
            except (OSError, KeyError) as error:
                raise damaged("pcam", self.folder, error) from None
        return self.opened[key]

    def pixels(self, name: str) -> np.ndarray:
        split, _, number = name.partition("/")
        return np.asarray(self.patches(split)[int(number)])

    def open(self, name: str, max_pixels: int, min_side: int | None = None) -> Image.Image:
        return Image.fromarray(self.pixels(name))

    def raw(self, name: str) -> None:
        return None

    def content(self, name: str) -> bytes:
        return hashlib.sha256(self.pixels(name).tobytes()).digest()

    def outline(self, name: str) -> bytes:
        return self.content(name)

    def missing(self, name: str) -> bool:
        return not (self.folder / PATCHES.format(name.partition("/")[0], "x")).is_file()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "opened": {}}


CLEVR = ("clevr/CLEVR_v1.0",)
COPIES = {
    "caltech101": Copy(files=("caltech101/101_ObjectCategories",), read=caltech101),
    "cifar100": Copy(files=("cifar-100-python",), read=cifar100),
    "dtd": Copy(files=("dtd/dtd",), read=textures),
    "flowers102": Copy(files=("flowers-102",), read=flowers102),
    "pets": Copy(files=("oxford-iiit-pet",), read=pets),
    "svhn": Copy(files=("train_32x32.mat", "test_32x32.mat"), read=svhn),
    "sun397": Copy(files=("SUN397",), read=lambda: split_off_test(sun397()["all"], 0.2)),
    "pcam": Copy(
        files=tuple(f"pcam/{PATCHES.format(split, kind)}" for split in ("train", "test") for kind in "xy"), read=pcam
    ),
    "eurosat": Copy(files=("eurosat/2750",), read=lambda: split_off_test(eurosat()["all"], 0.2)),
    "clevr-count": Copy(files=CLEVR, read=clevr_count),
    "clevr-distance": Copy(files=CLEVR, read=clevr_distance),
    "kitti-distance": Copy(files=("Kitti/raw/training",), read=kitti_distance),
}
