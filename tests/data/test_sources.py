"""Sources: folders and zips in all usual layouts, and the errors for the rest."""

import io
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from allmlp.data.dataset import DatasetSplits, ImageDataset
from allmlp.data.decode import UnreadableImage
from allmlp.data.sources import hold_out, load_source
from allmlp.data.stores import ArrayStore
from allmlp.errors import UserError

CLASSES = ("ant", "bee", "cat")


def picture(name: str, kind: str = "PNG") -> bytes:
    """A small image whose pixels are a function of its name."""
    pixels = np.random.default_rng(list(name.encode())).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def names_in(folder: str, per_class: int = 10) -> list[str]:
    return [f"{folder}{c}/{i}.png" for c in CLASSES for i in range(per_class)]


def make_folder(root: Path, names: list[str]) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(name) if path.suffix.lower() != ".txt" else b"words")
    return root


def make_zip(path: Path, names: list[str], outer: str = "", directories: bool = False, extra: tuple = ()) -> Path:
    """Packed in a random order; ``extra`` are entries of any bytes."""
    names = random.Random(1).sample(names, len(names))
    with zipfile.ZipFile(path, "w") as file:
        for name in extra:
            file.writestr(name, b"\0\5\x16\7 AppleDouble")
        if directories:
            folders = {"/".join(n.split("/")[:i]) for n in names for i in range(1, n.count("/") + 1)}
            for folder in sorted(folders, reverse=True):
                file.writestr(f"{outer}{folder}/", b"")
        for name in names:
            file.writestr(outer + name, picture(name))
    return path


def content(source: DatasetSplits, prefix: str = "") -> dict[str, list[tuple[str, int]]]:
    """Names (without a prefix) and labels of every split."""
    return {
        name: [(n.removeprefix(prefix), int(label)) for n, label in zip(dataset.names, dataset.labels, strict=True)]
        for name, dataset in source.splits.items()
    }


LAYOUTS = {
    "one level": names_in(""),
    "train, val, test": names_in("train/") + names_in("val/", 2) + names_in("test/", 3),
    "train, test": names_in("train/") + names_in("test/", 3),
    "deeper below a class": [name.replace("/", "/deep/er/") for name in names_in("")],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("directories", [False, True])
def test_a_zip_gives_what_the_folder_gives(tmp_path: Path, layout: str, directories: bool) -> None:
    names = LAYOUTS[layout]
    folder = load_source(str(make_folder(tmp_path / "f", names)), split_seed=3)
    packed = load_source(str(make_zip(tmp_path / "f.zip", names, directories=directories)), split_seed=3)
    assert content(packed) == content(folder)
    assert packed.classes == folder.classes == CLASSES
    for name, dataset in folder.splits.items():
        for i in range(0, len(dataset), 5):
            assert np.array_equal(packed.splits[name].read(i), dataset.read(i))


def test_files_of_macos_in_a_zip_are_no_images(tmp_path: Path) -> None:
    names = names_in("")
    extra = ("__MACOSX/ant/._0.png", "__MACOSX/._ant", "__MACOSX/dog/._1.png")
    plain = load_source(str(make_zip(tmp_path / "a.zip", names)))
    packed = load_source(str(make_zip(tmp_path / "b.zip", names, extra=extra)))
    assert content(packed) == content(plain)
    assert packed.classes == CLASSES


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_outer_folder_in_a_zip_is_ignored(tmp_path: Path, layout: str) -> None:
    names = LAYOUTS[layout]
    options = {"val_fraction": 0, "test_fraction": 0}
    folder = load_source(str(make_folder(tmp_path / "f", names)), **options)
    extra = ("__MACOSX/photos/ant/._0.png",)
    packed = load_source(str(make_zip(tmp_path / "p.zip", names, "photos/", True, extra)), **options)
    assert content(packed, "photos/") == content(folder)
    assert packed.classes == CLASSES
    dataset = packed.split("train")
    assert np.array_equal(dataset.read(4), folder.split("train").read(4))


@pytest.mark.parametrize("layout", ["one level", "train, test"])
def test_one_outer_folder_in_a_zip_changes_no_split(tmp_path: Path, layout: str) -> None:
    names = LAYOUTS[layout]
    folder = load_source(str(make_folder(tmp_path / "f", names)))
    packed = load_source(str(make_zip(tmp_path / "p.zip", names, "photos/")))
    assert content(packed, "photos/") == content(folder)


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_three_splits_are_kept(tmp_path: Path, validation: str) -> None:
    names = names_in("train/") + names_in(f"{validation}/", 2) + names_in("test/", 3)
    source = load_source(str(make_folder(tmp_path, names)))
    assert list(source.splits) == ["train", "val", "test"]
    for folder, split in (("train", "train"), (validation, "val"), ("test", "test")):
        assert set(source.split(split).names) == {name for name in names if name.startswith(f"{folder}/")}
    assert source.left_out == {}


def test_names_and_labels_agree(tmp_path: Path) -> None:
    source = load_source(str(make_folder(tmp_path, names_in(""))))
    for dataset in source.splits.values():
        for name, label in zip(dataset.names, dataset.labels, strict=True):
            assert dataset.classes[label] == name.split("/")[0]


def test_validation_is_split_off_train_never_off_test(tmp_path: Path) -> None:
    names = names_in("train/") + names_in("test/", 3)
    source = load_source(str(make_folder(tmp_path, names)), val_fraction=0.3, test_fraction=0.9)
    assert {name: len(dataset) for name, dataset in source.splits.items()} == {"train": 21, "val": 9, "test": 9}
    assert all(name.startswith("train/") for name in source.split("val").names)
    assert all(name.startswith("test/") for name in source.split("test").names)
    assert set(source.split("train").names) | set(source.split("val").names) == set(names_in("train/"))
    assert "30% of each training class" in source.description
    assert "test" not in source.description.replace(str(tmp_path), "")


def test_class_folders_alone_are_split_into_three(tmp_path: Path) -> None:
    folder = str(make_folder(tmp_path, names_in("")))
    source = load_source(folder, val_fraction=0.25, test_fraction=0.2)
    assert {name: len(dataset) for name, dataset in source.splits.items()} == {"train": 18, "val": 6, "test": 6}
    together = [name for dataset in source.splits.values() for name in dataset.names]
    assert sorted(together) == sorted(names_in(""))
    assert load_source(folder, split_seed=1).split("test").names != source.split("test").names
    assert "20% of each class split off for test (split seed 0)" in source.description


def test_fractions_of_zero_split_nothing_off(tmp_path: Path) -> None:
    source = load_source(str(make_folder(tmp_path, names_in(""))), val_fraction=0, test_fraction=0)
    assert {name: len(dataset) for name, dataset in source.splits.items()} == {"train": 30}


@pytest.mark.parametrize("ending", [".JPEG", ".Jpg", ".jpg", ".jpeg", ".PNG", ".WebP", ".bmp", ".GIF", ".TIF", ".tiff"])
def test_every_spelling_of_an_extension_is_an_image(tmp_path: Path, ending: str) -> None:
    kind = {"jpeg": "JPEG", "jpg": "JPEG", "tif": "TIFF"}.get(ending[1:].lower(), ending[1:].upper())
    for c in CLASSES:
        (tmp_path / c).mkdir()
        (tmp_path / c / f"a.b c{ending}").write_bytes(picture(c, kind))
    source = load_source(str(tmp_path))
    assert source.split("train").names == tuple(f"{c}/a.b c{ending}" for c in CLASSES)
    assert source.split("train").read(2).size == (6, 5)


def test_other_files_are_counted_by_extension(tmp_path: Path) -> None:
    others = ["ant/notes.txt", "ant/B.TXT", "bee/table.csv", "ant/README"]
    folder = make_folder(tmp_path, names_in("") + others)
    assert load_source(str(folder)).left_out == {".txt": 2, ".csv": 1, "README": 1}


@pytest.mark.parametrize("layout", ["", "train/"])
def test_images_outside_class_folders_are_counted_and_ignored(tmp_path: Path, layout: str) -> None:
    loose = [f"{layout}lying.png", f"{layout}about.png"]
    source = load_source(str(make_folder(tmp_path, names_in(layout) + loose)))
    assert source.left_out == {"images outside the class folders": 2}
    assert sum(len(dataset) for dataset in source.splits.values()) == 30


def test_folders_next_to_the_splits_are_ignored(tmp_path: Path) -> None:
    source = load_source(str(make_folder(tmp_path, [*names_in("train/"), "extra/ant/1.png", "top.png"])))
    assert source.left_out == {"images outside the class folders": 2}
    assert source.classes == CLASSES


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path / "f", names_in(""))
    (tmp_path / "f" / "dog").mkdir()
    with pytest.raises(UserError, match=r"class 'dog' of .* holds no images: add some, or remove the folder"):
        load_source(str(tmp_path / "f"))
    packed = make_zip(tmp_path / "f.zip", names_in(""))
    with zipfile.ZipFile(packed, "a") as file:
        file.writestr("dog/", b"")
    with pytest.raises(UserError, match=r"class 'dog' of .* holds no images"):
        load_source(str(packed))


def test_a_class_without_images_in_one_split_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path, names_in("train/") + names_in("test/"))
    (tmp_path / "test" / "dog").mkdir()
    with pytest.raises(UserError, match=r"class 'dog' of .*/test holds no images"):
        load_source(str(tmp_path))


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    source = load_source(str(make_folder(tmp_path, [*names_in(""), ".thumbnails/ant.png"])))
    assert source.classes == CLASSES


def test_no_images_at_all(tmp_path: Path) -> None:
    make_folder(tmp_path, ["ant/a.txt", "bee/b.txt"])
    with pytest.raises(UserError, match=r"holds no images \(2 files, none of \.bmp, .*\): give a folder with images"):
        load_source(str(tmp_path))


@pytest.mark.parametrize("folder", ["", "train/"])
def test_images_without_class_folders(tmp_path: Path, folder: str) -> None:
    make_folder(tmp_path, [f"{folder}{i}.png" for i in range(4)])
    with pytest.raises(UserError, match=r"holds 4 images but no class folders: put each class in a separate folder"):
        load_source(str(tmp_path))


def test_both_val_and_validation(tmp_path: Path) -> None:
    make_folder(tmp_path, names_in("train/") + names_in("val/") + names_in("validation/"))
    with pytest.raises(UserError, match="has the folders val and validation for the same split: keep one of them"):
        load_source(str(tmp_path))


def test_a_class_that_only_test_has(tmp_path: Path) -> None:
    make_folder(tmp_path, [*names_in("train/"), *names_in("test/"), "test/dog/1.png"])
    with pytest.raises(UserError, match="class 'dog' is in test but not in train: add its images there, or remove it"):
        load_source(str(tmp_path))


def test_a_class_that_test_lacks_shifts_no_label(tmp_path: Path) -> None:
    test = [name for name in names_in("test/") if "/ant/" not in name]
    source = load_source(str(make_folder(tmp_path, names_in("train/") + test)))
    dataset = source.split("test")
    assert dataset.classes == CLASSES
    assert [CLASSES[label] for label in dataset.labels] == [name.split("/")[1] for name in dataset.names]
    assert set(dataset.labels) == {1, 2}


@pytest.mark.parametrize(
    ("wrong", "near"), [("digit", "digits"), ("cifar-10", "cifar10 or cifar100"), ("flowers", "flowers102")]
)
def test_the_error_for_an_unknown_name_lists_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"no data at '{wrong}': did you mean {near}\? give a folder"):
        load_source(wrong)


def test_the_error_for_any_other_name_lists_all_names() -> None:
    with pytest.raises(
        UserError,
        match=r"no data at '/no/where': give a folder .* or one of digits, cifar10, cifar100, pets, flowers102$",
    ):
        load_source("/no/where")


def test_a_file_that_is_not_a_zip(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a\.tar is not a \.zip file: give a folder of images"):
        load_source(str(tmp_path / "a.tar"))


@pytest.mark.parametrize("data", [b"", b"no zip at all", picture("a")])
def test_an_invalid_zip(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.zip is not a valid zip file .*: pack or copy it again"):
        load_source(str(tmp_path / "a.zip"))


# Zips with entries that cannot be unpacked


def damaged_zip(path: Path, method: int, damage: Callable[[bytearray, int, int], None]) -> Path:
    """A zip whose entry ant/1.png is damaged; its local header starts at an offset, its data end at another."""
    with zipfile.ZipFile(path, "w", method) as file:
        for name in names_in("", 3):
            file.writestr(name, picture(name))
    with zipfile.ZipFile(path) as file:
        info = file.getinfo("ant/1.png")
    data = bytearray(path.read_bytes())
    start = info.header_offset + 30 + len(info.filename)
    damage(data, info.header_offset, start + info.compress_size)
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


@pytest.mark.parametrize(
    ("method", "damage"),
    [
        pytest.param(zipfile.ZIP_STORED, spoil, id="stored"),
        pytest.param(zipfile.ZIP_DEFLATED, spoil, id="deflated"),
        pytest.param(zipfile.ZIP_BZIP2, spoil, id="bzip2"),
        pytest.param(zipfile.ZIP_LZMA, spoil, id="lzma"),
        pytest.param(zipfile.ZIP_STORED, encrypt, id="encrypted"),
    ],
)
def test_an_entry_that_cannot_be_unpacked_is_one_unreadable_image(tmp_path: Path, method: int, damage) -> None:
    path = damaged_zip(tmp_path / "a.zip", method, damage)
    dataset = load_source(str(path), val_fraction=0, test_fraction=0).split("train")
    with pytest.raises(UnreadableImage, match=r"a\.zip/ant/1\.png cannot be unpacked: .*; create the zip again"):
        dataset.read(dataset.names.index("ant/1.png"))
    for name in set(dataset.names) - {"ant/1.png"}:
        dataset.read(dataset.names.index(name))


def test_a_zip_of_a_future_version_is_not_valid(tmp_path: Path) -> None:
    def age(data: bytearray, header: int, end: int) -> None:
        data[data.find(b"PK\1\2") + 6] = 119

    with pytest.raises(UserError, match="is not a valid zip file"):
        load_source(str(damaged_zip(tmp_path / "a.zip", zipfile.ZIP_STORED, age)))


def test_a_name_that_is_not_utf8_is_read(tmp_path: Path) -> None:
    make_folder(tmp_path, names_in(""))
    name = "ant/\udcff.png"  # how Python represents the byte 0xff
    (tmp_path / name).write_bytes(picture("x"))
    assert name in load_source(str(tmp_path)).split("all").names


def test_a_zip_store_is_opened_again_after_pickling(tmp_path: Path) -> None:
    dataset = load_source(str(make_zip(tmp_path / "a.zip", names_in("")))).split("train")
    dataset.read(0)
    copy = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(copy.read(3), dataset.read(3))


def test_max_pixels_reaches_the_decoder(tmp_path: Path) -> None:
    dataset = load_source(str(make_folder(tmp_path, names_in(""))), max_pixels=29).split("train")
    with pytest.raises(UnreadableImage, match="6 × 5 pixels, above the limit of 29"):
        dataset.read(0)


# Datasets


def small_dataset(classes: tuple[str, ...], labels: list[int]) -> ImageDataset:
    names = tuple(f"{i}.png" for i in range(len(labels)))
    pixels = np.arange(len(labels), dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    return ImageDataset(store=ArrayStore(pixels, names), names=names, labels=np.array(labels), classes=classes)


def test_relabelling_matches_names_so_a_missing_class_shifts_no_label() -> None:
    dataset = small_dataset(("bee", "dog"), [0, 1, 1, 0]).relabeled(("ant", "dog", "cat", "bee"))
    assert dataset.labels.tolist() == [3, 1, 1, 3]
    assert dataset.classes == ("ant", "dog", "cat", "bee")
    assert dataset.names == ("0.png", "1.png", "2.png", "3.png")


def test_relabelling_with_a_class_the_model_does_not_know() -> None:
    with pytest.raises(
        UserError, match=r"1 class\(es\) of the data are unknown to the model \('dog'\); its classes are 'ant'"
    ):
        small_dataset(("bee", "dog"), [0, 1]).relabeled(("ant", "bee"))


def test_a_subset_keeps_names_labels_and_pixels_together() -> None:
    dataset = small_dataset(("a", "b"), [0, 1, 1, 0]).subset(np.array([3, 1]))
    assert (dataset.names, dataset.labels.tolist(), len(dataset)) == (("3.png", "1.png"), [0, 1], 2)
    assert [np.asarray(dataset.read(i)).max() for i in range(2)] == [3, 1]


def test_all_is_every_image_of_every_split(tmp_path: Path) -> None:
    source = load_source(str(make_folder(tmp_path, names_in("train/") + names_in("test/", 3))))
    dataset = source.split("all")
    assert sorted(dataset.names) == sorted(names_in("train/") + names_in("test/", 3))
    assert [CLASSES[label] for label in dataset.labels] == [name.split("/")[1] for name in dataset.names]
    assert [dataset.read(i).size for i in range(len(dataset))] == [(6, 5)] * 39


def test_the_error_for_a_missing_split_lists_the_others(tmp_path: Path) -> None:
    source = load_source(str(make_folder(tmp_path, names_in("test/"))))
    with pytest.raises(UserError, match="the data has no train split: use test or all"):
        source.split("train")


# Unusual names


@pytest.mark.parametrize("hidden", ["ant/._1.png", "ant/.ipynb_checkpoints/1.png", ".thumbs/1.png"])
def test_hidden_files_are_no_images(tmp_path: Path, hidden: str) -> None:
    source = load_source(str(make_folder(tmp_path, [*names_in(""), hidden])))
    assert source.classes == CLASSES
    assert source.left_out == {"hidden files": 1}
    assert sum(len(dataset) for dataset in source.splits.values()) == 30


def test_split_names_in_capitals(tmp_path: Path) -> None:
    source = load_source(str(make_folder(tmp_path, names_in("Train/") + names_in("TEST/"))))
    assert set(source.splits) == {"train", "val", "test"}
    assert source.classes == CLASSES


def test_a_link_to_a_parent_folder_is_not_followed_again(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "f", names_in(""))
    (folder / CLASSES[0] / "again").symlink_to(folder)
    assert sum(len(dataset) for dataset in load_source(str(folder)).splits.values()) == 30


# Held out for choosing settings


def counts(dataset: ImageDataset) -> list[int]:
    return np.bincount(dataset.labels, minlength=len(dataset.classes)).tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("fraction", "each"), [(0.1, 1), (0.2, 2), (0.25, 3), (0.01, 1), (0.99, 9)])
def test_held_out_images_come_from_training_ones_alone(tmp_path: Path, layout: str, fraction: float, each: int) -> None:
    """At least the fraction of each class, but never its last image. The source's val and test splits are dropped."""
    source = load_source(str(make_folder(tmp_path, LAYOUTS[layout])), val_fraction=0, test_fraction=0)
    held = hold_out(source, fraction, 0)
    assert list(held.splits) == ["train", "val"]
    train, val = (set(dataset.names) for dataset in held.splits.values())
    assert train | val == set(source.split("train").names)
    assert not train & val
    assert counts(held.split("val")) == [each] * 3
    assert held.classes == source.classes == held.split("val").classes
    labels = dict(zip(source.split("train").names, source.split("train").labels, strict=True))
    for dataset in held.splits.values():
        assert all(labels[name] == label for name, label in zip(dataset.names, dataset.labels, strict=True))
    assert (
        held.description
        == f"{source.description}; {fraction:.0%} of each training class held out to choose by (split seed 0)"
    )
    assert "held out" not in source.description
    assert len(source.split("train")) == 30


def test_held_out_images_are_a_function_of_the_seed(tmp_path: Path) -> None:
    source = load_source(str(make_folder(tmp_path, LAYOUTS["train, test"])), val_fraction=0)
    first, again, other = (content(hold_out(source, 0.2, seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_the_error_if_no_image_can_be_held_out_has_a_remedy(tmp_path: Path) -> None:
    source = load_source(str(make_folder(tmp_path, names_in("train/", 1) + names_in("test/", 2))), val_fraction=0)
    with pytest.raises(UserError, match=r"--holdout 0\.5 of 3 images leaves none to choose by.* one --learning-rate"):
        hold_out(source, 0.5, 0)


def test_without_training_images_nothing_is_held_out(tmp_path: Path) -> None:
    source = load_source(str(make_folder(tmp_path, names_in("test/", 2))))
    with pytest.raises(UserError, match="the data has no train split: use test"):
        hold_out(source, 0.5, 0)
