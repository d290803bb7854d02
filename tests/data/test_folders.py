"""What the folders of a source are: parts by all their names, classes, or neither; and names of other systems."""

import os
import unicodedata
import zipfile
from pathlib import Path

import pytest
from trees import CLASSES, WHOLE, make_folder, make_zip, names_in, picture

from allmlp.data import stores
from allmlp.data.dataset import DatasetSplits
from allmlp.data.folders.part_names import find_parts
from allmlp.data.folders.walk import SYSTEM_FOLDERS
from allmlp.data.sources import load_source
from allmlp.errors import UserError

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def sizes(source: DatasetSplits) -> dict[str, int]:
    return {name: len(split) for name, split in source.splits.items()}


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["train", "val", "test"], "train val test"),
        (["Training", "VALID", "Testing"], "train val test"),
        (["training_set", "dev-set", "test set"], "train val test"),
        (["trn", "validation", "tst"], "train val test"),
        (["train_images", "valdata", "evaluation"], "train val test"),
        (["seg_train", "seg_test", "seg_pred"], "train test"),
        (["train2017", "val2017"], "train val"),
        (["flowers train 224", "flowers valid 224"], "train val"),
        (["cats_train", "cats_test", "dogs_train", "dogs_test"], "train test train test"),
        (["trainA", "trainB", "testA", "testB"], "train train test test"),
        (["cat", "dog", "test1"], "test"),  # of a competition
        (["test_a", "test_b"], "test test"),
        (["test_a", "bee"], ""),
        (["freight_train", "bullet_train"], ""),  # nothing of theirs is for validation or testing
        (["pasta", "training wheels", "contest", "valley", "devil"], ""),
    ],
)
def test_parts_by_their_usual_names(names: list[str], parts: str) -> None:
    assert sorted(find_parts(names).values()) == sorted(parts.split())


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("training/", "dev/", "testing/"),
        ("training_set/", "validation_set/", "test_set/"),
        ("seg_train/seg_train/", "seg_val/seg_val/", "seg_test/seg_test/"),
        ("train/images/", "valid/images/", "test/images/"),
        ("data/Train2017/", "data/Val2017/", "data/Test2017/"),
    ],
)
def test_parts_are_no_classes(tmp_path: Path, train: str, val: str, test: str) -> None:
    names = names_in(train) + names_in(val, 2) + names_in(test, 3) + ["preview.png"]
    for source in (make_folder(tmp_path / "f", names), make_zip(tmp_path / "f.zip", names)):
        found = load_source(str(source))
        assert found.classes == CLASSES
        assert sizes(found) == {"train": 30, "val": 6, "test": 9}
        assert found.left_out == {"images outside the class folders": 1}


@pytest.mark.parametrize(
    ("names", "classes", "left_out"),
    [
        (["bus/1.png", "bus/2.png", "train/1.png", "train/2.png"], "bus train", {}),  # vehicles
        (
            [f"{part}/{c}/{i}.png" for part in ("train", "test") for c in ("bus", "train") for i in "ab"],
            "bus train",
            {},
        ),
        ([*names_in(""), "test/1.png", "test/2.png"], "ant bee cat", {"images of test without labels": 2}),
        ([*names_in(""), "test1/1.png"], "ant bee cat", {"images of test1 without labels": 1}),
        ([*names_in("train/"), "test/7.png"], "ant bee cat", {"images of test without labels": 1}),
        ([*names_in("train/"), "val/x/7.png"], "ant bee cat", {"images of val/x without labels": 1}),
        ([*names_in("train/"), "test/unknown/7.png"], "ant bee cat", {"images of test/unknown without labels": 1}),
        ([*names_in(""), *names_in("test/", 2)], "ant bee cat", {}),  # classes for training beside the part
        ([*names_in("", 1), "fly/", "lost+found/", "fly/more/"], "ant bee cat", {}),
        ([*names_in("train/"), "val/ant/1.png", "val/bee/"], "ant bee cat", {}),
        ([*names_in("train/"), "val/ant/1.png", "val/bee/1.heif", "val/bee/2.raw"], "ant bee cat", None),
    ],
)
def test_what_is_a_class(tmp_path: Path, names: list[str], classes: str, left_out: dict[str, int] | None) -> None:
    for source in (make_folder(tmp_path / "f", names), make_zip(tmp_path / "f.zip", names)):
        found = load_source(str(source))
        assert found.classes == tuple(classes.split())
        if left_out is not None:
            assert found.left_out == left_out
        files = [name for name in names if not name.endswith("/")]
        assert sum(sizes(found).values()) + sum(found.left_out.values()) == len(files)


def test_folders_without_images_are_told(tmp_path: Path) -> None:
    found = load_source(str(make_folder(tmp_path, [*names_in("train/"), "train/fly/", "val/ant/1.png", "val/bee/"])))
    assert [note.replace(str(tmp_path), "SOURCE") for note in found.notes] == [
        "folders of SOURCE/train without images are no classes: fly",
        "SOURCE/val has no images of bee",
    ]
    assert found.remarks() == list(found.notes)


@pytest.mark.parametrize("name", [*sorted(SYSTEM_FOLDERS), "@eaDir", "Thumbnails", ".thumbs", "__MACOSX"])
def test_folders_of_systems_are_no_classes(tmp_path: Path, name: str) -> None:
    extra = [f"{name}/1.png", f"bee/{name}/ant/2.png"]
    found = load_source(str(make_folder(tmp_path, names_in("") + extra)), **WHOLE)
    assert (found.classes, sizes(found)) == (CLASSES, {"train": 30})
    assert list(found.left_out.values()) == [2]


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (
            names_in("fold1/") + names_in("fold2/"),
            ["fold1, fold2", "ant, bee, cat", "train, val and test", "f.*/fold1"],
        ),
        (names_in("color/") + names_in("gray/", 1) + ["gray/dog/1.png"], ["color, gray", "same folders"]),
        (names_in("train/") + names_in("unseen/"), ["train, unseen", "same folders"]),
        ([f"{c}/{part}/1.png" for c in CLASSES for part in ("train", "test")], ["outermost, as in test/ant"]),
        (names_in("val/") + names_in("Valid/"), ["Valid and val|val and Valid", "same split, val"]),
        ([f"{part}{k}/1.png" for part in ("train", "test") for k in "AB"], ["no class folders"]),
        (["train/1.png", *names_in("test/")], ["train holds 1 images but no class folders"]),
        ([*names_in("train/"), "train/fly/1.raw", "train/fly/b/2.raw"], ["'fly'", "2 .raw", "remove the folder"]),
        (["ant/1.raw", "bee/2.txt", "bee/b.txt"], ["no images", "3 files", "2 .txt, 1 .raw"]),
    ],
)
def test_what_may_be_a_class_or_not_is_refused(tmp_path: Path, names: list[str], parts: list[str]) -> None:
    for source in (make_folder(tmp_path / "f", names), make_zip(tmp_path / "f.zip", names)):
        for part in parts:
            with pytest.raises(UserError, match=part):
                load_source(str(source))


# Links, and folders that cannot be read


def test_linked_folders_are_read_wherever_they_are(tmp_path: Path) -> None:
    """A folder may be reached in several ways; a loop is a folder that holds itself."""
    folder = make_folder(tmp_path / "f", [*names_in("train/"), "val/ant/x.png"])
    (folder / "val" / "bee").symlink_to("../train/bee")
    (folder / "test").symlink_to("train")
    (folder / "train" / "ant" / "loop").symlink_to(folder)
    (folder / "train" / "cat" / "self").symlink_to(".")
    assert sizes(load_source(str(folder))) == {"train": 30, "val": 11, "test": 30}


def test_links_between_many_folders_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "MAX_LINKED_FOLDERS", 500)
    folder = make_folder(tmp_path / "f", [f"{i}/1.png" for i in range(12)])
    for i in range(12):
        for k in range(12):
            (folder / str(i) / f"to-{k}").symlink_to(folder / str(k))
    with pytest.raises(UserError, match=r"more than 500 links to folders, the last in .*: remove"):
        load_source(str(folder))


def test_folders_that_cannot_be_read_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "f", [*names_in(""), "bee/private/1.png", "lost+found/"])
    closed = {str(folder / "bee" / "private"), str(folder / "lost+found")}
    scandir = os.scandir

    def scan(path: str) -> object:
        if path in closed:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    found = load_source(str(folder), **WHOLE)
    assert (found.classes, sizes(found)) == (CLASSES, {"train": 30})
    assert found.left_out == {"folders that cannot be read": 1}
    assert found.notes == ("folders that cannot be read: bee/private/: check their permissions",)
    closed.add(str(folder / "ant"))  # the class would disappear
    with pytest.raises(UserError, match=r"'ant' of .*f cannot be read \(Permission denied\)"):
        load_source(str(folder))
    closed.add(str(folder))
    with pytest.raises(UserError, match=r"f cannot be read \(Permission denied\)"):
        load_source(str(folder))


# Names across systems


@pytest.mark.parametrize("form", [NFC, NFD])
def test_letters_have_one_form_on_all_systems(tmp_path: Path, form: str) -> None:
    """So a folder, its zip and weights of another system have the same classes and the same split."""
    names = [f"{c}/{form}-{i}.png" for c in (form, "tea") for i in range(9)]
    folder = make_folder(tmp_path / "f", names)
    found = load_source(str(folder))
    assert found.classes == (NFC, "tea")
    expected = make_folder(tmp_path / "expected", [name.replace(form, NFC) for name in names])
    for source in (folder, make_zip(tmp_path / "f.zip", names), make_zip(tmp_path / "o.zip", names, outer=f"{form}/")):
        found = load_source(str(source))
        for name, split in load_source(str(expected)).splits.items():
            assert found.split(name).names == split.names
            assert [found.split(name).read(i).tobytes() for i in range(len(split))]
    assert found.split("train").relabeled(("tea", NFD)).labels.tolist() == [
        1 - label for label in found.split("train").labels
    ]


def test_two_forms_of_one_name(tmp_path: Path) -> None:
    """Folders that look alike are refused, not two classes; a zip has no folders but in names."""
    names = [f"{NFC}/1.png", f"{NFD}/2.png", "tea/1.png"]
    with pytest.raises(UserError, match="twice, in two forms of Unicode"):
        load_source(str(make_folder(tmp_path / "f", names)))
    assert load_source(str(make_zip(tmp_path / "f.zip", names))).classes == (NFC, "tea")
    both = make_folder(tmp_path / "files", [f"a/{NFC}.png", f"a/{NFD}.png", "b/1.png"])
    dataset = load_source(str(both), **WHOLE).split("train")
    assert len({dataset.read(i).tobytes() for i in range(len(dataset))}) == 3


def raw_zip(path: Path, names: list[str], system: int = 3) -> Path:
    """A zip with these names as they are, which was made on a system of this number."""
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            info = zipfile.ZipInfo("x")
            info.filename, info.create_system = name, system
            file.writestr(info, picture(name))
    return path


def test_names_in_zips_of_other_systems(tmp_path: Path) -> None:
    names = names_in("photos/")
    expected = load_source(str(make_folder(tmp_path / "f", names)), **WHOLE).split("train").names
    backslashes = [name.replace("/", "\\") for name in names]
    for path in (
        raw_zip(tmp_path / "a.zip", backslashes),
        raw_zip(tmp_path / "b.zip", [*backslashes[:-1], names[-1]], system=0),
        raw_zip(tmp_path / "c.zip", [f"./{name}" for name in names]),
        raw_zip(tmp_path / "d.zip", [f"/{name}" for name in names]),
    ):
        dataset = load_source(str(path), **WHOLE).split("train")
        assert dataset.names == expected
        dataset.read(0)
    kept = load_source(str(raw_zip(tmp_path / "e.zip", ["a\\b/1.png", "c/1.png"])), **WHOLE)
    assert kept.classes == ("a\\b", "c")  # a folder of Linux may be called so


def test_utf_8_that_a_zip_does_not_declare(tmp_path: Path) -> None:
    """As macOS's Finder writes it. Names of code page 437 stay what they are."""
    path = make_zip(tmp_path / "f.zip", [f"{NFD}/1.png", "tea/1.png"])
    data = path.read_bytes()
    flags = data.replace(b"PK\1\2\x14\x03\x14\0\0\x08", b"PK\1\2\x14\x03\x14\0\0\0")
    assert flags != data
    path.write_bytes(flags.replace(b"PK\3\4\x14\0\0\x08", b"PK\3\4\x14\0\0\0"))
    found = load_source(str(path), **WHOLE)
    assert found.classes == (NFC, "tea")
    found.split("train").read(0)
    assert load_source(str(raw_zip(tmp_path / "g.zip", ["ü/1.png", "tea/1.png"])), **WHOLE).classes == ("tea", "ü")


def test_an_entry_that_a_later_one_replaces_is_counted(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = raw_zip(tmp_path / "a.zip", [*names_in(""), "ant/1.png", "ant/1.png"])
    found = load_source(str(path), **WHOLE)
    assert (sizes(found), found.left_out) == ({"train": 30}, {"entries of the zip whose name is there twice": 2})
