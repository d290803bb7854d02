"""Lists of images to leave out, honored by every reader, and the quick look for repeated files before training."""

from pathlib import Path

import numpy as np
import pytest
from trees import picture, write_tree

from allmlp.data.dataset import ImageDataset
from allmlp.data.duplicates import repeats
from allmlp.data.duplicates.removals import Removal, read_removals, write_removals
from allmlp.data.duplicates.repeats import describe_repeats
from allmlp.data.sources import load_source
from allmlp.data.stores import ArrayStore
from allmlp.errors import UserError

TREE = {f"{part}/{label}/{i}.png": picture(f"{part}{label}{i}") for part in ("train", "test")
        for label in "ab" for i in range(4)}  # fmt: skip


@pytest.fixture(params=["data", "data.zip"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(write_tree(tmp_path / request.param, TREE))


def names(source: str, exclude: Path | None) -> dict[str, list[str]]:
    found = load_source(source, val_fraction=0.0, exclude=None if exclude is None else str(exclude))
    return {part: list(dataset.names) for part, dataset in found.splits.items()}


def test_what_is_listed_is_left_out(source: str, tmp_path: Path) -> None:
    everything = names(source, None)
    gone = [everything["train"][1], everything["test"][2]]
    path = tmp_path / "removals.csv"
    write_removals(path, [Removal(name, "same file", "other", "x, y.png") for name in gone])
    assert read_removals(path) == gone
    left = names(source, path)
    assert left == {part: [name for name in listed if name not in gone] for part, listed in everything.items()}
    assert load_source(source, exclude=str(path)).left_out[f"listed in {path}"] == 2
    plain = tmp_path / "plain.txt"
    plain.write_text("\ufeff" + "\n\n".join(gone) + "\n", encoding="utf-8")
    assert names(source, plain) == left


def test_names_with_commas_quotes_and_other_letters(tmp_path: Path) -> None:
    odd = ["a/one, two.png", 'a/"q".png', "b/cafe\u0301.png", "b/name.png"]
    write_tree(tmp_path / "data", {name: picture(name) for name in ["a/k.png", "b/k.png", *odd]})
    path = tmp_path / "list.csv"
    write_removals(path, [Removal(name, "same file", "s", "m") for name in odd])
    left = load_source(str(tmp_path / "data"), test_fraction=0, val_fraction=0, exclude=str(path)).split("train")
    assert list(left.names) == ["a/k.png", "b/k.png"]


def test_built_in_sources_and_splits(tmp_path: Path) -> None:
    before = load_source("digits")
    gone = list(before.split("test").names[:5])
    (tmp_path / "list").write_text("\n".join(gone))
    after = load_source("digits", exclude=str(tmp_path / "list"))
    assert not set(gone) & {name for part in after.splits.values() for name in part.names}
    assert sum(map(len, after.splits.values())) == 1797 - 5


def test_lists_that_do_not_fit(source: str, tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    train = names(source, None)["train"]
    path.write_text(f"{train[0]}\nno/such.png\n")
    assert load_source(source, exclude=str(path)).notes == (f"1 of the 2 names in {path} are not in {source}",)
    path.write_text("no/such.png\n")
    with pytest.raises(UserError, match=r"--exclude .*: none of its 1 names is in .*'no/such\.png'.*dedup"):
        load_source(source, exclude=str(path))
    path.write_text("\n \n")
    with pytest.raises(UserError, match="it holds no names"):
        load_source(source, exclude=str(path))
    path.write_text("\n".join(train))
    with pytest.raises(UserError, match=r"it lists all 8 images of .* train part"):
        load_source(source, exclude=str(path))
    with pytest.raises(UserError, match=r"--exclude .*missing\.csv"):
        load_source(source, exclude=str(tmp_path / "missing.csv"))
    write_removals(path, [])
    assert names(source, path) == names(source, None)  # a search that found none


# Repeated files


def test_held_out_images_that_are_trained_on(source: str, tmp_path: Path) -> None:
    assert describe_repeats(load_source(source).splits, source) == []
    tree = TREE | {"test/a/copy.png": TREE["train/a/1.png"], "test/b/other.png": TREE["train/a/2.png"]}
    planted = str(write_tree(tmp_path / f"planted{Path(source).suffix}", tree))
    warnings = describe_repeats(load_source(planted, val_fraction=0).splits, planted)
    assert [warning.split(" (")[0] for warning in warnings] == [
        "2 test images are train images too",
        "1 images are under two classes",
    ]
    assert "train/a/1.png and test/a/copy.png" in warnings[0]
    assert f"mixer data inspect {planted}" in warnings[0]


def test_files_that_begin_alike_are_not_the_same(tmp_path: Path) -> None:
    start = picture("1") + bytes(5000)
    tree = {"train/a/1.png": start + b"x", "test/a/1.png": start + b"y"}
    tree |= {"train/b/1.png": picture("2"), "test/b/1.png": picture("3")}
    data = str(write_tree(tmp_path / "data", tree))
    assert describe_repeats(load_source(data).splits, data) == []
    tree["test/a/2.png"] = tree["train/a/1.png"]
    data = str(write_tree(tmp_path / "more", tree))
    assert "1 test images are train images too" in describe_repeats(load_source(data).splits, data)[0]


def test_images_in_memory_and_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    pixels[3] = pixels[0]
    store = ArrayStore(pixels, ["a", "b", "c", "d"])
    parts = {
        part: ImageDataset(store=store, names=listed, labels=np.array([0, 1]), classes=("x", "y"))
        for part, listed in (("train", ("a", "b")), ("test", ("c", "d")))
    }
    assert "1 test images are train images too (the same file), such as a and d" in describe_repeats(parts, "s")[0]
    monkeypatch.setattr(repeats, "MAX_IMAGES", 3)
    assert describe_repeats(parts, "s") == [
        "4 images are too many to look for duplicates before a run: mixer data inspect s does it"
    ]
