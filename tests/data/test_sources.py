"""Sources: folders and zips in all usual layouts, and the errors for the rest."""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from trees import CLASSES, WHOLE, make_folder, make_zip, names_in, picture

from allmlp.data import stores
from allmlp.data.dataset import DatasetSplits, ImageDataset
from allmlp.data.decode import UnreadableImage
from allmlp.data.sources import hold_out, load_source
from allmlp.data.stores import ArrayStore
from allmlp.errors import UserError


def content(source: DatasetSplits, prefix: str = "") -> dict[str, list[tuple[str, str]]]:
    """Names (without a prefix) and classes of every split."""
    return {
        name: [(n.removeprefix(prefix), d.classes[label]) for n, label in zip(d.names, d.labels, strict=True)]
        for name, d in source.splits.items()
    }


LAYOUTS = {
    "one level": names_in(""),
    "train, val, test": names_in("train/") + names_in("val/", 2) + names_in("test/", 3),
    "train, test": names_in("Train/") + names_in("TEST/", 3),
    "deeper below a class": [name.replace("/", "/deep/er/") for name in names_in("")],
}
EXTRA = ("__MACOSX/ant/._0.png", "__MACOSX/._ant", "__MACOSX/dog/._1.png")


@pytest.mark.parametrize(("layout", "outer"), [*zip(LAYOUTS, ["", "photos/"] * 2, strict=True)])
def test_a_zip_gives_what_the_folder_gives(tmp_path: Path, layout: str, outer: str) -> None:
    """With or without entries for folders, files of macOS, and one outer folder."""
    names = LAYOUTS[layout]
    folder = load_source(str(make_folder(tmp_path / "f", names)), split_seed=3)
    path = make_zip(tmp_path / "f.zip", names, outer, directories=bool(outer), extra=EXTRA)
    packed = load_source(str(path), split_seed=3)
    assert content(packed) == content(folder)
    assert packed.classes == folder.classes == CLASSES
    top = 1 if layout.startswith("train") else 0
    for name, dataset in folder.splits.items():
        assert all(image.split("/")[top] == c for image, c in content(folder)[name])
        copy = pickle.loads(pickle.dumps(packed.splits[name]))  # opens the zip again
        for i in range(0, len(dataset), 5):
            assert np.array_equal(packed.splits[name].read(i), dataset.read(i))
            assert np.array_equal(copy.read(i), dataset.read(i))


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_splits_of_the_source_are_kept(tmp_path: Path, validation: str) -> None:
    names = names_in("train/") + names_in(f"{validation}/", 2) + names_in("test/", 3)
    source = load_source(str(make_folder(tmp_path, names)))
    assert list(source.splits) == ["train", "val", "test"]
    for split, folder in (("train", "train"), ("val", validation), ("test", "test")):
        assert set(source.split(split).names) == {name for name in names if name.startswith(f"{folder}/")}
    assert sorted(source.split("all").names) == sorted(names)
    assert source.left_out == {}


def test_splits_that_the_source_lacks_are_split_off_train_never_off_test(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "two", names_in("train/") + names_in("test/", 3))
    source = load_source(str(folder), val_fraction=0.3, test_fraction=0.9)
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 21, "val": 9, "test": 9}
    assert {*source.split("train").names, *source.split("val").names} == set(names_in("train/"))
    assert "30% of each training class" in source.description
    assert "test" not in source.description.replace(str(tmp_path), "")
    one = str(make_folder(tmp_path / "one", names_in("")))
    source = load_source(one, val_fraction=0.25, test_fraction=0.2)
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 18, "val": 6, "test": 6}
    assert sorted(source.split("all").names) == sorted(names_in(""))
    assert load_source(one, split_seed=1).split("test").names != source.split("test").names
    assert "20% of each class split off for test (split seed 0)" in source.description
    assert list(load_source(one, **WHOLE).splits) == ["train"]
    with pytest.raises(UnreadableImage, match="6 × 5 pixels, above the limit of 29"):
        load_source(one, max_pixels=29).split("train").read(0)


@pytest.mark.parametrize(
    ("names", "more", "left_out"),
    [
        ("", ["ant/a.txt", "ant/B.TXT", "bee/t.csv", "ant/README.md"], {".txt": 2, ".csv": 1, ".md": 1}),
        ("", ["lying.png", "about.png"], {"images outside the class folders": 2}),
        ("train/", ["extra/ant/1.png", "train/top.png"], {"images outside the class folders": 2}),
        ("", ["ant/._1.png", ".thumbs/ant.png", "ant/.ipynb_checkpoints/1.png"], {"hidden files": 3}),
        ("", ["ant/\udcff.png", "bee/a.b c.JPEG", "cat/1.TIF"], {}),  # \udcff is Python's for the byte 0xff
    ],
)
def test_other_files_are_counted(tmp_path: Path, names: str, more: list[str], left_out: dict[str, int]) -> None:
    source = load_source(str(make_folder(tmp_path, names_in(names) + more)))
    assert source.left_out == left_out
    assert source.classes == CLASSES
    assert sorted(source.split("all").names) == sorted(names_in(names) + ([] if left_out else more))


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ([*names_in(""), "dog/a.raw"], ["'dog'", "holds no images", "1 .raw", "remove the folder"]),
        ([*names_in("train/"), *names_in("test/"), "test/dog/1.png"], ["'dog'", "in test but not in train"]),
        (["ant/a.txt", "bee/b.txt"], ["no images", "2 files", ".bmp"]),
        ([f"{i}.png" for i in range(4)], ["4 images", "no class folders"]),
        ([f"train/{i}.png" for i in range(4)], ["4 images", "no class folders"]),
        (names_in("train/") + names_in("val/") + names_in("validation/"), ["val and validation", "keep one"]),
    ],
)
def test_folders_that_are_no_source(tmp_path: Path, names: list[str], parts: list[str]) -> None:
    for source in (make_folder(tmp_path / "f", names), make_zip(tmp_path / "f.zip", names)):
        with pytest.raises(UserError) as caught:
            load_source(str(source))
        assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("file", "data", "parts"),
    [
        ("digit", None, ["'digit'", "digits?"]),
        ("cifar-10", None, ["cifar10 or cifar100?"]),
        ("/no/where", None, ["'/no/where'", "folder", "digits, cifar10, cifar100, pets, flowers102"]),
        ("a.tar", b"x", ["a.tar", ".zip"]),
        ("a.zip", b"", ["a.zip", "not a valid zip", "copy it again"]),
        ("a.zip", b"no zip at all", ["a.zip", "not a valid zip"]),
    ],
)
def test_names_and_files_that_are_no_source(
    file: str, data: bytes | None, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if data is not None:
        Path(file).write_bytes(data)
    with pytest.raises(UserError) as caught:
        load_source(file)
    assert all(part in str(caught.value) for part in parts)


def test_folders_of_runs_are_no_classes(tmp_path: Path) -> None:
    """Finished, begun, or of a search; below runs/ or beside the classes, in a folder and in a zip."""
    finished = [f"runs/digits-20261126-120000/{name}" for name in ("recipe.json", "metrics.jsonl", "examples/0-0.png")]
    begun = ["runs/photos-20261126-120001-2/.lock"]
    search = [f"tuned/{name}" for name in ("recipe.json", "transfer.json", "search/rate-0.1/examples/1-1.png")]
    names = [*names_in(""), *finished, *begun, *search, "bee/recipe.json"]
    folder = make_folder(tmp_path / "f", names)
    for source in (folder, make_zip(tmp_path / "f.zip", names)):
        found = load_source(str(source), **WHOLE)
        assert (found.classes, len(found.split("train"))) == (CLASSES, 30)
        assert found.left_out == {"files of training runs": 6, ".json": 1}
    (folder / "bee" / "metrics.jsonl").touch()  # but it holds images itself, unlike a run
    assert load_source(str(folder), **WHOLE).classes == CLASSES


def test_a_class_that_test_lacks_shifts_no_label(tmp_path: Path) -> None:
    test = [name for name in names_in("test/") if "/ant/" not in name]
    dataset = load_source(str(make_folder(tmp_path, names_in("train/") + test))).split("test")
    assert dataset.classes == CLASSES
    assert [CLASSES[label] for label in dataset.labels] == [name.split("/")[1] for name in dataset.names]


def test_a_link_to_a_folder_is_followed_once(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "f", names_in(""))
    (folder / "ant" / "again").symlink_to(folder)
    make_folder(tmp_path / "elsewhere", ["x.png", "y.png"])
    (folder / "bee" / "link").symlink_to(tmp_path / "elsewhere")
    names = load_source(str(folder), **WHOLE).split("train").names
    assert list(names) == sorted([*names_in(""), "bee/link/x.png", "bee/link/y.png"])


def test_a_zip_of_very_many_entries_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "MANY_ENTRIES", 29)
    load_source(str(make_zip(tmp_path / "a.zip", names_in(""))))
    assert "30 entries" in caplog.text
    assert "unpack it" in caplog.text


# Zips with entries that cannot be unpacked


def damaged_zip(path: Path, method: int, damage: Callable[[bytearray, int, int], None]) -> Path:
    """A zip whose entry ant/1.png is damaged; its local header starts at an offset, its data end at another."""
    with zipfile.ZipFile(path, "w", method) as file:
        for name in names_in("", 3):
            file.writestr(name, picture(name))
    with zipfile.ZipFile(path) as file:
        info = file.getinfo("ant/1.png")
    data = bytearray(path.read_bytes())
    damage(data, info.header_offset, info.header_offset + 30 + len(info.filename) + info.compress_size)
    path.write_bytes(data)
    return path


def spoil(data: bytearray, header: int, end: int) -> None:
    for at in range(end - 40, end - 20):
        data[at] ^= 0x5A


def encrypt(data: bytearray, header: int, end: int) -> None:
    """Sets the flag in both headers, as an encrypted entry has it."""
    data[header + 6] |= 1
    at = -1
    while (at := data.find(b"PK\1\2", at + 1)) >= 0:
        if data[at + 46 : at + 46 + 9] == b"ant/1.png":
            data[at + 8] |= 1


def age(data: bytearray, header: int, end: int) -> None:
    data[data.find(b"PK\1\2") + 6] = 119


DAMAGES = {
    "stored": (zipfile.ZIP_STORED, spoil),
    "deflated": (zipfile.ZIP_DEFLATED, spoil),
    "bzip2": (zipfile.ZIP_BZIP2, spoil),
    "lzma": (zipfile.ZIP_LZMA, spoil),
    "encrypted": (zipfile.ZIP_STORED, encrypt),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_an_entry_that_cannot_be_unpacked_is_one_unreadable_image(tmp_path: Path, kind: str) -> None:
    path = damaged_zip(tmp_path / "a.zip", *DAMAGES[kind])
    dataset = load_source(str(path), **WHOLE).split("train")
    for i, name in enumerate(dataset.names):
        if name == "ant/1.png":
            with pytest.raises(UnreadableImage, match=r"a\.zip/ant/1\.png cannot be unpacked: .*; create the zip"):
                dataset.read(i)
        else:
            dataset.read(i)


def test_a_zip_of_a_future_version_is_not_valid(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a valid zip file"):
        load_source(str(damaged_zip(tmp_path / "a.zip", zipfile.ZIP_STORED, age)))


# Datasets


def test_subsets_and_relabeling_keep_names_labels_and_pixels_together() -> None:
    """Classes are matched by name."""
    names = tuple(f"{i}.png" for i in range(4))
    pixels = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    labels = np.array([0, 1, 1, 0])
    whole = ImageDataset(store=ArrayStore(pixels, names), names=names, labels=labels, classes=("bee", "dog"))
    dataset = whole.subset(np.array([3, 1]))
    assert (dataset.names, dataset.labels.tolist(), len(dataset)) == (("3.png", "1.png"), [0, 1], 2)
    assert [np.asarray(dataset.read(i)).max() for i in range(2)] == [3, 1]
    relabeled = dataset.relabeled(("ant", "dog", "cat", "bee"))
    assert (relabeled.names, relabeled.labels.tolist()) == (dataset.names, [3, 1])
    assert relabeled.classes == ("ant", "dog", "cat", "bee")
    with pytest.raises(UserError, match=r"'dog'.*'ant', 'bee'.*: rename"):
        dataset.relabeled(("ant", "bee"))


# Held out for choosing settings


@pytest.mark.parametrize(("fraction", "each"), [(0.1, 1), (0.25, 3), (0.01, 1), (0.99, 9)])
def test_held_out_images_come_from_training_ones_alone(tmp_path: Path, fraction: float, each: int) -> None:
    """At least the fraction of each class, but never its last image. The source's val and test splits are dropped."""
    source = load_source(str(make_folder(tmp_path, LAYOUTS["train, val, test"])))
    held, again, other = (hold_out(source, fraction, seed) for seed in (0, 0, 1))
    assert content(held) == content(again) != content(other)
    assert list(held.splits) == ["train", "val"]
    assert sorted(content(held)["train"] + content(held)["val"]) == sorted(content(source)["train"])
    assert np.bincount(held.split("val").labels).tolist() == [each] * 3
    assert held.classes == source.classes == held.split("val").classes
    assert held.description.startswith(f"{source.description}; {fraction:.0%} of each training class held out")
    assert len(source.split("train")) == 30


def test_nothing_to_hold_out(tmp_path: Path) -> None:
    names = names_in("train/", 1) + names_in("test/", 2)
    with pytest.raises(UserError, match=r"--holdout 0\.5 of 3 images .* one --learning-rate"):
        hold_out(load_source(str(make_folder(tmp_path / "a", names)), **WHOLE), 0.5, 0)
    with pytest.raises(UserError, match="no train split: use test or all"):
        hold_out(load_source(str(make_folder(tmp_path / "b", names_in("test/", 2)))), 0.5, 0)
