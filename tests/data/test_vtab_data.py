"""VTAB's tasks: folders with lists, as people have them, and small copies in torchvision's formats. No network."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vtab_folders import COUNTS, USUAL_NAMES, write_task, write_vtab

from allmlp.config.vtab import TASKS
from allmlp.data.builtin.vtab import (
    FOLDERS,
    describe_missing,
    find_sources,
    read_task_folder,
    task_called,
    tasks_called,
)
from allmlp.data.builtin.vtab_copies import (
    CLEVR_DISTANCES,
    COPIES,
    KITTI_METERS,
    METERS,
    PATCHES,
    closest_vehicle,
    interval,
)
from allmlp.data.dataset import DatasetSplits, ImageDataset
from allmlp.data.sources import hold_out, load_source
from allmlp.errors import RunError, UserError


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ALLMLP_DATA", str(tmp_path / "store"))
    return tmp_path / "store"


# Names


def test_the_tables_are_of_the_same_tasks() -> None:
    assert list(FOLDERS) == list(TASKS)
    assert list(COPIES) == [task for task in TASKS if task in COPIES]
    assert [task_called(name) for name in USUAL_NAMES] == list(TASKS)
    assert [folder.names[0] for folder in FOLDERS.values()] == USUAL_NAMES
    names = [name for folder in FOLDERS.values() for name in folder.names]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("CIFAR-100", "cifar100"), ("vtab-dtd", "dtd"), ("Clevr dist", "clevr-distance"), ("smallnorb-ele", None),
        ("snorb_azim", "smallnorb-azimuth"), ("imagenet", None), ("", None),
    ],
)  # fmt: skip
def test_other_names(name: str, task: str | None) -> None:
    assert task_called(name) == ("smallnorb-elevation" if name == "smallnorb-ele" else task)


def test_tasks_are_in_the_benchmarks_order_and_named_once() -> None:
    assert tasks_called(["svhn", "cifar", "cifar100"]) == ["cifar100", "svhn"]
    assert len(tasks_called([])) == 19
    with pytest.raises(UserError, match=r"--tasks svnh: VTAB has no such task; did you mean svhn\? there are"):
        tasks_called(["dtd", "svnh"])


# Folders


def images_of(dataset: ImageDataset) -> list[tuple[int, int]]:
    """(list, label) of each image, by the gray that encodes them."""
    grays = [np.asarray(dataset.read(i))[4, 4, 0] for i in range(len(dataset))]
    return [(int(gray) // 100, int(gray) % 100 // 10) for gray in grays]


def lists_of(dataset: ImageDataset) -> list[int]:
    return [number for number, _ in images_of(dataset)]


def test_a_task_folder(tmp_path: Path) -> None:
    source = load_source(str(write_task(tmp_path / "kitti", classes=4)), val_fraction=0)
    assert source.classes == ("0", "1", "2", "3")
    assert lists_of(source.splits["train"]) == [0] * 8 + [1] * 4
    assert lists_of(source.splits["test"]) == [2] * 6
    for dataset in source.splits.values():
        assert [label for _, label in images_of(dataset)] == dataset.labels.tolist()
    assert source.notes == (
        f"{tmp_path / 'kitti'} is not VTAB-1k's: it has 8 + 4 training images and 4 classes, VTAB-1k 800 + 200 and 4",
    )


def test_settings_are_chosen_on_the_800_and_the_200(tmp_path: Path) -> None:
    source = load_source(str(write_task(tmp_path / "task")), val_fraction=0)
    for fraction, seed in ((0.2, 0), (0.5, 7)):
        held = hold_out(source, fraction, seed)
        assert {name: lists_of(held.splits[name]) for name in held.splits} == {"train": [0] * 8, "val": [1] * 4}
        assert held.description.endswith("; its own 4 images held out to choose by")
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 12, "test": 6}
    validated = load_source(str(tmp_path / "task"), val_fraction=0.1)
    assert {name: lists_of(split) for name, split in validated.splits.items()} == {
        "train": [0] * 8, "val": [1] * 4, "test": [2] * 6,
    }  # fmt: skip


def test_a_list_of_removals_is_honored_in_the_choice_too(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "task")
    (tmp_path / "out.txt").write_text("images/val200/0001.png\nimages/train800/0000.png\n")
    source = load_source(str(folder), val_fraction=0, exclude=str(tmp_path / "out.txt"))
    held = hold_out(source, 0.2, 0)
    assert (len(source.splits["train"]), len(held.splits["train"]), len(held.splits["val"])) == (10, 7, 3)


def test_the_benchmarks_sizes_need_no_note(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "dmlab")
    image = folder / "images" / "train800" / "0000.png"
    rows = []
    for i in range(1000):
        (folder / "images" / f"{i}.png").hardlink_to(image)
        rows.append(f"images/{i}.png {i % 6}")
    for name, chosen in (("train800", rows[:800]), ("val200", rows[800:]), ("train800val200", rows)):
        (folder / f"{name}.txt").write_text("\n".join(chosen))
    assert load_source(str(folder), val_fraction=0).notes == ()


def test_untidy_lists(tmp_path: Path) -> None:
    """Windows' line ends, tabs, blank lines, a byte-order mark, ./ and spaces in names."""
    folder = write_task(tmp_path / "task")
    shutil.move(folder / "images" / "test" / "0000.png", folder / "images" / "test" / "a photo.png")
    text = (folder / "test.txt").read_text().replace("0000.png 0", "a photo.png\t0").replace("images/", "./images/")
    (folder / "test.txt").write_bytes(("\ufeff" + text.replace("\n", "\r\n\r\n")).encode())
    source = load_source(str(folder))
    assert lists_of(source.splits["test"]) == [2] * 6
    assert source.splits["test"].names[0] == "images/test/a photo.png"


def edit(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_text(change((folder / name).read_text()))

    return apply


def relabel(folder: Path) -> None:
    for path in folder.glob("*.txt"):
        path.write_text(path.read_text().replace(" 1\n", " 3\n"))


MISTAKES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "lists missing": (
        lambda folder: [(folder / name).unlink() for name in ("val200.txt", "test.txt")],
        r"has no val200\.txt and no test\.txt: a VTAB task's folder holds train800\.txt, .*; copy all of them",
    ),
    "no label": (
        edit("test.txt", lambda text: text + "images/b.png\n"),
        r"test\.txt, line 7, 'images/b\.png': has no label; write the image's path, a space and its class number",
    ),
    "a label that is no number": (edit("test.txt", lambda text: text + "images/b.png ant\n"), r"line 7.*has no label"),
    "an image missing": (
        lambda folder: (folder / "images" / "val200" / "0002.png").unlink(),
        r"val200\.txt lists 4 images, of which 1 are not there, the first is .*images/val200/0002\.png: copy",
    ),
    "all images missing": (
        lambda folder: shutil.rmtree(folder / "images"),
        r"train800\.txt lists 8 images, of which 8 are not there",
    ),
    "a gap": (relabel, r"labels go up to 3, but no image has the label 1: number the classes from 0"),
    "a huge label": (edit("test.txt", lambda text: text.replace(" 1", " 99999999999")), "up to 99,999,999,999, but"),
    "an empty list": (edit("test.txt", lambda text: "\n"), r"test\.txt lists no images: copy it again"),
    "twice": (edit("test.txt", lambda text: text * 2), "line 7, .*: the image is listed twice; remove"),
    "elsewhere": (
        edit("test.txt", lambda text: text.replace("images/", "../images/", 1)),
        r"line 1, .*: the path must lead to an image below",
    ),
    "in both lists": (
        edit("val200.txt", lambda text: text + "images/train800/0000.png 0\n"),
        r"train800\.txt and val200\.txt have 1 images in common, the first is images/train800/0000\.png: remove",
    ),
    "lists that differ": (
        edit("train800val200.txt", lambda text: text.replace("0003.png 1", "0003.png 0", 1)),
        r"train800val200\.txt is not train800\.txt and val200\.txt together; the first difference is "
        r"images/train800/0003\.png: join the two lists \(cat",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_task_folder(mistake: str, tmp_path: Path) -> None:
    break_it, said = MISTAKES[mistake]
    folder = write_task(tmp_path / "task")
    break_it(folder)
    with pytest.raises(UserError, match=said) as caught:
        load_source(str(folder))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_of_tasks_is_no_data_set(tmp_path: Path) -> None:
    root = write_vtab(tmp_path / "vtab", ["dtd", "svhn"])
    with pytest.raises(UserError, match=r"holds 2 VTAB tasks \(dtd, svhn\): give one of them, such as .*dtd, or run"):
        load_source(str(root))


def test_where_the_data_of_tasks_is(tmp_path: Path, store: Path) -> None:
    root = write_vtab(tmp_path / "vtab", ["dtd", "Clevr-Dist"])
    (root / "notes").mkdir()
    (store / "cifar-100-python").mkdir(parents=True)
    sources = find_sources(root, ["cifar100", "dtd", "svhn", "clevr-distance", "dmlab"])
    assert sources.found == {
        "cifar100": "vtab-cifar100", "dtd": str(root / "dtd"), "clevr-distance": str(root / "Clevr-Dist"),
    }  # fmt: skip
    assert sources.missing.keys() == {"svhn", "dmlab"}
    text = describe_missing(sources)
    assert text.startswith("2 of 5 tasks have no data: put svhn in ")
    assert f"dmlab in {root / 'dmlab'}. A task's folder holds images/ and the lists train800.txt" in text
    assert "--download lets torchvision fetch svhn; --skip-missing" in text
    assert find_sources(root, ["svhn", "dmlab"], download=True) == (
        {"svhn": "vtab-svhn"},
        {"dmlab": str(root / "dmlab")},
    )


def test_a_copy_of_torchvisions_is_not_taken_for_a_task_folder(store: Path) -> None:
    """It may have the same name, and lie in the same place."""
    write_vtab(store, ["svhn"])
    (store / "dtd" / "dtd").mkdir(parents=True)
    (store / "eurosat").mkdir()  # neither
    sources = find_sources(store, ["dtd", "svhn", "eurosat"])
    assert sources.found == {"dtd": "vtab-dtd", "svhn": str(store / "svhn"), "eurosat": str(store / "eurosat")}
    with pytest.raises(UserError, match=r"eurosat has no train800\.txt and no val200\.txt"):
        read_task_folder(store / "eurosat")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: None, "No such file"),
        (lambda root: root.mkdir(), "it holds no folders"),
        (lambda root: (root / "cats").mkdir(parents=True), "no folder of any VTAB task .it holds cats."),
        (lambda root: write_task(root), "is one task's folder: give the folder around it"),
        (lambda root: write_vtab(root, ["dtd", "DTD"]), "two folders of the task dtd, DTD and dtd: keep one"),
    ],
)
def test_folders_without_tasks(make: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    make(tmp_path / "vtab")
    with pytest.raises(UserError, match=said):
        find_sources(tmp_path / "vtab", ["dtd"])


# Copies in torchvision's formats. An image's color is its label, and its blue the split that it has there.

BLUE = {"train": 0, "val": 100, "test": 200, "all": 50}


def color(label: int, split: str) -> tuple[int, int, int]:
    return 20 * (label % 12), 20 * (label // 12), BLUE[split]


def save(path: Path, label: int, split: str = "all", size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), color(label, split)).save(path)


def meaning(image: Image.Image) -> tuple[int, str]:
    red, green, blue = np.asarray(image).mean((0, 1))
    return round(red / 20) + 12 * round(green / 20), {v: k for k, v in BLUE.items()}[50 * round(blue / 50)]


def write_dtd(store: Path) -> None:
    for split in ("train", "val", "test"):
        names = [f"{c}/{c}_{split}_{i}.jpg" for c in ("banded", "cracked", "woven") for i in range(4)]
        for name in names:
            label = ["banded", "cracked", "woven"].index(name.split("/")[0])
            save(store / "dtd" / "dtd" / "images" / name, label, split)
        (store / "dtd" / "dtd" / "labels").mkdir(exist_ok=True)
        (store / "dtd" / "dtd" / "labels" / f"{split}1.txt").write_text("\n".join(names) + "\n")


def write_svhn(store: Path) -> None:
    """MATLAB files, in which the digit 0 has the label 10."""
    savemat = pytest.importorskip("scipy.io").savemat
    store.mkdir(exist_ok=True)
    for split, count in (("train", 1100), ("test", 30)):
        labels = np.arange(count) % 10
        pixels = np.array([color(label, split) for label in labels], dtype=np.uint8)
        images = np.broadcast_to(pixels.T[None, None], (32, 32, 3, count))
        savemat(store / f"{split}_32x32.mat", {"X": images, "y": np.where(labels == 0, 10, labels)[:, None]})


def write_caltech101(store: Path) -> None:
    for label, name in enumerate(("BACKGROUND_Google", "ant", "bee")):
        for i in range(1, 33):
            save(store / "caltech101" / "101_ObjectCategories" / name / f"image_{i:04d}.jpg", label)


def write_sun397(store: Path) -> None:
    names = ["/a/abbey", "/a/apartment_building/outdoor", "/b/bakery"]
    for label, name in enumerate(names):
        for i in range(10):
            save(store / "SUN397" / name[1:] / f"sun_{name[-3:]}{i}.jpg", label)
    (store / "SUN397" / "ClassName.txt").write_text("\n".join(names) + "\n")


def write_eurosat(store: Path) -> None:
    for label, name in enumerate(("AnnualCrop", "Forest", "River")):
        for i in range(10):
            save(store / "eurosat" / "2750" / name / f"{name}_{i}.jpg", label)


def write_pcam(store: Path) -> None:
    h5py = pytest.importorskip("h5py")
    (store / "pcam").mkdir(parents=True)
    for split in ("train", "test"):
        labels = np.arange(20) % 2
        pixels = np.array([color(label, split) for label in labels], dtype=np.uint8)
        with h5py.File(store / "pcam" / PATCHES.format(split, "x"), "w") as file:
            file["x"] = np.broadcast_to(pixels[:, None, None], (20, 96, 96, 3))
        with h5py.File(store / "pcam" / PATCHES.format(split, "y"), "w") as file:
            file["y"] = labels.reshape(-1, 1, 1, 1).astype(np.uint8)


def write_clevr(store: Path, label_of: Callable[[int, list[float]], int]) -> None:
    """Scenes of 3 to 10 objects at several distances; ``label_of(count, distances)`` colors their images."""
    folder = store / "clevr" / "CLEVR_v1.0"
    (folder / "scenes").mkdir(parents=True)
    for split in ("train", "val"):
        scenes = []
        for i in range(24):
            count, closest = 3 + i % 8, [7.5, 8.0, 8.2, 8.9, 9.3, 9.9, 11.0][i % 7]
            distances = [closest, *(closest + 0.1 * k for k in range(1, count))]
            name = f"CLEVR_{split}_{i:06d}.png"
            save(folder / "images" / split / name, label_of(count, distances), split)
            objects = [{"pixel_coords": [10, 20, distance]} for distance in reversed(distances)]
            scenes.append({"image_filename": name, "objects": objects})
        (folder / "scenes" / f"CLEVR_{split}_scenes.json").write_text(json.dumps({"scenes": scenes}))


def write_kitti(store: Path) -> None:
    row = "{} 0.00 0 -1.58 587.01 173.33 614.12 200.12 1.65 1.67 3.64 -0.65 1.71 {} -1.59"
    texts = [  # one of each class
        [("Car", 30.5), ("Van", 8.0), ("Pedestrian", 2.0)],
        [("Truck", 20.0), ("DontCare", -1000.0)],
        [("Car", 20.5), ("Tram", 3.0)],
        [("Pedestrian", 2.0)],
    ]
    raw = store / "Kitti" / "raw" / "training"
    (raw / "label_2").mkdir(parents=True)
    for i in range(40):
        save(raw / "image_2" / f"{i:06d}.png", i % 4)
        (raw / "label_2" / f"{i:06d}.txt").write_text("\n".join(row.format(*entry) for entry in texts[i % 4]) + "\n")


def write_cifar100(store: Path) -> None:
    folder = store / "cifar-100-python"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        labels = [i % 100 for i in range(200)]
        rows = np.array([np.repeat(color(label, split), 1024) for label in labels], dtype=np.uint8)
        (folder / split).write_bytes(pickle.dumps({"data": rows, "fine_labels": labels}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"fine {i}" for i in range(100)]}))


def distance_class(closest: float) -> int:
    return [closest <= 8, 8 < closest <= 8.5, 8.5 < closest <= 9, 9 < closest <= 9.5, 9.5 < closest <= 10, True].index(
        True
    )


WRITERS: dict[str, Callable[[Path], None]] = {
    "caltech101": write_caltech101,
    "cifar100": write_cifar100,
    "dtd": write_dtd,
    "svhn": write_svhn,
    "sun397": write_sun397,
    "pcam": write_pcam,
    "eurosat": write_eurosat,
    "clevr-count": lambda store: write_clevr(store, lambda count, distances: count - 3),
    "clevr-distance": lambda store: write_clevr(store, lambda count, distances: distance_class(min(distances))),
    "kitti-distance": write_kitti,
}
TESTS = {  # where the test images are, and how many training and test images there are
    "caltech101": ("all", 90, 6), "cifar100": ("test", 200, 200), "dtd": ("test", 24, 12), "svhn": ("test", 1000, 30),
    "sun397": ("all", 24, 6), "pcam": ("test", 20, 20), "eurosat": ("all", 24, 6), "clevr-count": ("val", 24, 24),
    "clevr-distance": ("val", 24, 24), "kitti-distance": ("all", 36, 4),
}  # fmt: skip


@pytest.fixture(autouse=True)
def without_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision verifies SVHN's files whenever it reads them, and would download CIFAR's again."""
    sets = pytest.importorskip("torchvision.datasets")
    for split in ("train", "test"):
        monkeypatch.setitem(sets.SVHN.split_list, split, [*sets.SVHN.split_list[split][:2], None])
    monkeypatch.setattr(sets.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr(sets.CIFAR100, "_load_meta", load_meta)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)


def load_meta(self: Any) -> None:
    self.classes = [f"fine {i}" for i in range(100)]


def load_copy(task: str) -> DatasetSplits:
    return load_source(f"vtab-{task}", val_fraction=0)


@pytest.mark.parametrize("task", WRITERS)
def test_copies_in_torchvisions_formats(task: str, store: Path) -> None:
    WRITERS[task](store)
    assert COPIES[task].is_there()
    assert find_sources(None, [task]).found == {task: f"vtab-{task}"}
    source = load_copy(task)
    tested, train_images, test_images = TESTS[task]
    assert {name: len(split) for name, split in source.splits.items()} == {"train": train_images, "test": test_images}
    for name, split in source.splits.items():
        found = [meaning(split.read(i)) for i in range(len(split))]
        assert [label for label, _ in found] == split.labels.tolist()
        assert ({place for _, place in found} == {tested}) is (name == "test" or tested == "all")
    assert not set(source.splits["train"].names) & set(source.splits["test"].names)
    assert source.classes == source.splits["test"].classes
    held = hold_out(source, 0.5, 3)
    val = 200 if task == "svhn" else train_images // 5
    assert {name: len(split) for name, split in held.splits.items()} == {"train": train_images - val, "val": val}
    [note] = source.notes
    assert f"of vtab-{task} are not VTAB-1k's: {train_images - val} + {val} were drawn here, with seed 0" in note
    again = load_copy(task).splits["train"]
    assert list(again.names) == list(source.splits["train"].names)
    assert len(source.split("all")) == train_images + test_images
    assert meaning(source.split("all").read(train_images)) == meaning(source.splits["test"].read(0))
    pickle.loads(pickle.dumps(source.splits["test"])).read(0)  # for a worker process


def test_caltech_has_its_background_class_and_thirty_training_images_of_each(store: Path) -> None:
    write_caltech101(store)
    source = load_copy("caltech101")
    assert source.classes == ("BACKGROUND_Google", "ant", "bee")
    assert np.bincount(source.splits["train"].labels).tolist() == [30, 30, 30]


def test_the_labels_of_clevr_and_kitti() -> None:
    """task_adaptation, data/clevr.py and data/kitti.py: the largest index of a threshold below the distance."""
    assert [interval(d, CLEVR_DISTANCES) for d in (7.9, 8.4, 8.55, 8.9, 9.1, 9.6, 10.1)] == [0, 1, 2, 2, 3, 4, 5]
    assert [interval(d, KITTI_METERS) for d in (7.9, 8.1, 19.9, 20.1, 998, 1000)] == [0, 1, 1, 2, 2, 3]
    for limits, values in (
        (CLEVR_DISTANCES, (0.1, 8.0, 8.01, 9.5, 9.51, 10.01, 50)),
        (KITTI_METERS, (-1, 8, 9, 21, 1e3)),
    ):
        for value in values:
            reference = np.max(np.flatnonzero(np.array([*limits]) - value < 0))
            assert interval(value, limits) == reference
    assert METERS[interval(closest_vehicle(""), KITTI_METERS)] == "no vehicle"


@pytest.mark.parametrize(
    ("task", "damage", "said"),
    [
        ("dtd", lambda store: next((store / "dtd").rglob("*_test_0.jpg")).unlink(), "1 of its 36 images are missing"),
        (
            "clevr-count",
            lambda store: (store / "clevr/CLEVR_v1.0/scenes/CLEVR_val_scenes.json").write_text("{"),
            "Expecting",
        ),
        ("kitti-distance", lambda store: (store / "Kitti/raw/training/label_2/000003.txt").unlink(), "000003"),
        ("pcam", lambda store: (store / "pcam" / PATCHES.format("test", "y")).write_bytes(b"x"), "file signature"),
    ],
)
def test_damaged_copies(task: str, damage: Callable[[Path], Any], said: str, store: Path) -> None:
    WRITERS[task](store)
    damage(store)
    with pytest.raises(RunError, match=rf"the copy of .* is (damaged or )?incomplete .*{said}.*copy it again"):
        load_copy(task)


def test_there_are_as_many_stand_ins_as_said(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "task")
    assert {name: len((folder / f"{name}.txt").read_text().splitlines()) for name in COUNTS} == COUNTS
