"""Built-in sources: the digits, and torchvision's classes on small copies in the original formats. No network."""

import http.client
import io
import pickle
import random
import re
import shutil
import sys
import urllib.error
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from allmlp.data.builtin.copies import PLACES
from allmlp.data.dataset import ImageDataset
from allmlp.data.decode import UnreadableImage
from allmlp.data.sources import load_source
from allmlp.errors import RunError, UserError

torchvision_sets = pytest.importorskip("torchvision.datasets")

BREEDS = ("Abyssinian", "american_bulldog", "Maine_Coon", *(f"breed_{i:02d}" for i in range(34)))
CLASSES = {
    "cifar10": tuple(f"thing {i}" for i in range(10)),
    "cifar100": tuple(f"fine {i}" for i in range(100)),
    "pets": ("Abyssinian", "American Bulldog", "Maine Coon", *(f"Breed {i:02d}" for i in range(34))),
    "flowers102": tuple(torchvision_sets.Flowers102.classes),
}
SPLITS = {"train": 0, "val": 100, "test": 200}  # torchvision's split → the level of blue that marks its images here
PER_CLASS = {"train": 2, "val": 1, "test": 1}

# Every image has a single color that encodes its class and split, so that images can be checked independently of the
# lists of files and labels.


def color(label: int, split: str) -> tuple[int, int, int]:
    return 20 * (label % 11), 20 * (label // 11), SPLITS[split]


def meaning(pixels: np.ndarray) -> tuple[int, str]:
    """The class and split that the color of an image encodes; JPEG may be off by some units."""
    red, green, blue = (float(pixels[..., i].mean()) for i in range(3))
    return round(red / 20) + 11 * round(green / 20), {v: k for k, v in SPLITS.items()}[100 * round(blue / 100)]


def shuffled(name: str, *splits: str) -> list[tuple[int, str]]:
    """(label, split) of the images of a copy, in random order."""
    labels = range(len(CLASSES[name]))
    images = [(label, split) for split in splits for label in labels for _ in range(PER_CLASS[split])]
    return random.Random(1).sample(images, len(images))


def write_jpeg(path: Path, label: int, split: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), color(label, split)).save(file, "JPEG", quality=95)
    path.write_bytes(file.getvalue())


def write_cifar(root: Path, name: str) -> None:
    """Python pickles in the authors' format: rows of 1,024 red, green and blue values."""
    folder = root / PLACES[name]
    folder.mkdir(parents=True)
    batches = {"train": "train", "test": "test"}  # file → split
    meta, classes, labels_key = "meta", "fine_label_names", "fine_labels"
    if name == "cifar10":
        batches = {f"data_batch_{i}": "train" for i in range(1, 6)} | {"test_batch": "test"}
        meta, classes, labels_key = "batches.meta", "label_names", "labels"
    for file, split in batches.items():
        images = shuffled(name, split)
        rows = np.array([np.repeat(color(*image), 32 * 32) for image in images], dtype=np.uint8)
        labels = [label for label, _ in images]
        entry = {"data": rows, labels_key: labels, "coarse_labels": [label // 5 for label in labels]}
        (folder / file).write_bytes(pickle.dumps(entry))
    (folder / meta).write_bytes(pickle.dumps({classes: list(CLASSES[name]), "coarse_label_names": ["coarse"] * 20}))


def write_pets(root: Path) -> None:
    """JPEGs, and lists of image, class, species and breed, each counted from 1."""
    folder = root / PLACES["pets"]
    for name in ("images", "annotations"):
        (folder / name).mkdir(parents=True)
    number = 0
    for file, split in (("trainval.txt", "train"), ("test.txt", "test")):
        lines = []
        for label, _ in shuffled("pets", split):
            number += 1
            lines.append(f"{BREEDS[label]}_{number} {label + 1} {1 if BREEDS[label][0].isupper() else 2} 1\n")
            write_jpeg(folder / "images" / f"{BREEDS[label]}_{number}.jpg", label, split)
        (folder / "annotations" / file).write_text("".join(lines))


def write_flowers102(root: Path) -> None:
    """JPEGs numbered from 1; a MATLAB file with their labels (from 1), and one with the image numbers of each split."""
    savemat = pytest.importorskip("scipy.io").savemat
    folder = root / PLACES["flowers102"]
    (folder / "jpg").mkdir(parents=True)
    images = shuffled("flowers102", *SPLITS)
    for number, (label, split) in enumerate(images, 1):
        write_jpeg(folder / "jpg" / f"image_{number:05d}.jpg", label, split)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[label + 1 for label, _ in images]], dtype=np.uint8)})
    numbers = {split: [n for n, (_, of) in enumerate(images, 1) if of == split] for split in SPLITS}
    keys = {"train": "trnid", "val": "valid", "test": "tstid"}
    savemat(folder / "setid.mat", {keys[split]: np.array([found], dtype=np.uint16) for split, found in numbers.items()})


WRITERS: dict[str, Callable[[Path], None]] = {
    "cifar10": partial(write_cifar, name="cifar10"),
    "cifar100": partial(write_cifar, name="cifar100"),
    "pets": write_pets,
    "flowers102": write_flowers102,
}
PHOTOGRAPHS = ("pets", "flowers102")
every_name = pytest.mark.parametrize("name", WRITERS)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """name → a folder that holds only a copy of this dataset; read-only by convention."""
    made = {name: tmp_path_factory.mktemp(name) for name in WRITERS}
    for name, folder in made.items():
        WRITERS[name](folder)
    return made


@pytest.fixture(autouse=True)
def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every download fails. Checksums are not verified, since those of the small copies differ."""
    on_download(monkeypatch, urllib.error.URLError("no network"))
    for module in (torchvision_sets.cifar, torchvision_sets.flowers102):
        monkeypatch.setattr(module, "check_integrity", lambda path, _md5=None: Path(path).is_file())


def on_download(monkeypatch: pytest.MonkeyPatch, effect: Exception | Callable[[], None]) -> list[Path]:
    """Replaces torchvision's download by ``effect``; returns the folders into which downloads were requested."""
    asked: list[Path] = []

    def fetch(_url: str, download_root: str | Path, **_options: object) -> None:
        asked.append(Path(download_root))
        if isinstance(effect, Exception):
            raise effect
        effect()

    for module in (torchvision_sets.cifar, torchvision_sets.oxford_iiit_pet, torchvision_sets.flowers102):
        monkeypatch.setattr(module, "download_and_extract_archive", fetch)
    monkeypatch.setattr(torchvision_sets.flowers102, "download_url", lambda *_args, **_options: None)
    return asked


@pytest.fixture
def kept_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    return lambda folder: monkeypatch.setenv("ALLMLP_DATA", str(folder))


def painted(dataset: ImageDataset) -> list[tuple[int, str]]:
    return [meaning(np.asarray(dataset.read(i))) for i in range(len(dataset))]


NAMES = {
    "cifar10": r"(train|test)/thing \d/\d{5}\.png",
    "cifar100": r"(train|test)/fine \d+/\d{5}\.png",
    "pets": r"images/[A-Za-z_0-9]+_\d+\.jpg",
    "flowers102": r"jpg/image_\d{5}\.jpg",
}


@every_name
def test_images_labels_classes_and_splits(name: str, copies: dict[str, Path], tmp_path: Path, kept_in) -> None:
    kept_in(copies[name])
    source = load_source(name, val_fraction=0.1)
    assert source.classes == CLASSES[name]
    assert source.description.startswith(f"{name}, built in; 10% of each training class split off for validation")
    assert list(source.splits) == ["train", "val", "test"]
    found = {split: painted(dataset) for split, dataset in source.splits.items()}
    for split, dataset in source.splits.items():
        assert dataset.classes == CLASSES[name]
        assert dataset.labels.dtype == np.int64
        assert [label for label, _ in found[split]] == dataset.labels.tolist()
        assert set(dataset.labels) == set(range(len(CLASSES[name])))
    count = {split: number * len(CLASSES[name]) for split, number in PER_CLASS.items()}
    count["train"] *= 5 if name == "cifar10" else 1  # files of the original
    count["val"] *= 1 if name == "flowers102" else 0  # whose train and val are ours to train on
    assert len(found["val"]) == len(CLASSES[name])  # a tenth of two to ten images of a class is one
    assert [split for _, split in found["test"]] == ["test"] * count["test"]
    originals = sorted(split for _, split in found["train"] + found["val"])
    assert originals == ["train"] * count["train"] + ["val"] * count["val"]
    everything = source.split("all")
    assert len(everything) == len(set(everything.names)) == sum(map(len, found.values()))
    assert [label for label, _ in painted(everything)] == everything.labels.tolist()
    assert all(re.fullmatch(NAMES[name], image) for image in everything.names)  # wherever the copy is
    kept_in(tmp_path)  # an empty data folder
    given = load_source(str(copies[name]))
    assert given.description.startswith(f"{name} in {copies[name]}; ")
    assert given.split("all").names == everything.names


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_stay_on_disk(name: str, copies: dict[str, Path], tmp_path: Path, kept_in) -> None:
    """They are decoded on demand, by our decoder."""
    kept_in(tmp_path)
    shutil.copytree(copies[name], tmp_path, dirs_exist_ok=True)
    dataset = load_source(name, max_pixels=29).split("all")
    with pytest.raises(UnreadableImage, match="6 × 5 pixels, above the limit of 29"):
        dataset.read(0)
    images = [tmp_path / PLACES[name] / image for image in dataset.names]
    images[0].write_bytes(b"no picture")
    Image.new("P", (7, 4)).save(images[1], "GIF")  # some files of Pets are GIFs with another extension
    assert (dataset.read(1).mode, dataset.read(1).size) == ("RGB", (7, 4))
    with pytest.raises(UnreadableImage, match=r"\.jpg cannot be read: its format is none of JPEG"):
        dataset.read(0)
    for path in images[:3]:
        path.unlink()
    with pytest.raises(RunError, match=rf"{name} in .* incomplete \(3 of its {len(images)} images .*\.jpg\)"):
        load_source(name)


@every_name
def test_missing_data_is_downloaded_into_the_data_folder(
    name: str, tmp_path: Path, kept_in, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    kept_in(folder)

    def arrive() -> None:
        if not (folder / PLACES[name]).exists():  # pets come in two archives
            WRITERS[name](folder)

    asked = on_download(monkeypatch, arrive)
    assert load_source(name).classes == CLASSES[name]
    assert set(asked) == {folder if name.startswith("cifar") else folder / PLACES[name]}


@pytest.mark.parametrize("setting", ["", None])
def test_the_data_folder_is_in_the_cache_by_default(
    setting: str | None, copies: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.delenv("ALLMLP_DATA", raising=False)
    if setting is not None:
        monkeypatch.setenv("ALLMLP_DATA", setting)
    shutil.copytree(copies["pets"], tmp_path / ".cache" / "allmlp")
    assert load_source("pets").classes == CLASSES["pets"]


def test_folders_that_could_be_meant_otherwise(
    copies: dict[str, Path], tmp_path: Path, kept_in, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that holds two copies, and one with the name of a dataset."""
    write_pets(tmp_path / "two")
    write_cifar(tmp_path / "two", "cifar100")
    with pytest.raises(UserError, match=rf"holds cifar100 and pets: .* ALLMLP_DATA={re.escape(str(tmp_path))}/two$"):
        load_source(str(tmp_path / "two"))
    kept_in(copies["pets"])
    monkeypatch.chdir(tmp_path)
    assert "not the folder" not in load_source("pets").description
    for kind in ("cat", "dog"):
        (tmp_path / "pets" / kind).mkdir(parents=True)
        for i in range(4):
            write_jpeg(tmp_path / "pets" / kind / f"{i}.jpg", 0, "train")
    assert load_source("pets").description.startswith("pets, built in (not the folder ./pets)")
    assert load_source("./pets").classes == ("cat", "dog")


ERRORS = [
    RuntimeError("not found\nor corrupted"),
    urllib.error.URLError("no route"),
    TimeoutError(),
    http.client.BadStatusLine("<html>"),
]


@pytest.mark.parametrize(("name", "error"), list(zip(WRITERS, ERRORS, strict=True)), ids=str)
def test_a_failed_download_is_a_failed_run(
    name: str, error: Exception, tmp_path: Path, kept_in, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_in(tmp_path)
    asked = on_download(monkeypatch, error)
    with pytest.raises(RunError, match=rf"^{name} could not be downloaded or read \(.+\): check the network") as caught:
        load_source(name)
    assert asked
    assert "\n" not in str(caught.value)
    assert f"{tmp_path / PLACES[name]} (ALLMLP_DATA sets another folder)" in str(caught.value)
    assert "remove damaged files" in str(caught.value)


@every_name
def test_an_empty_copy_in_a_folder_is_not_downloaded(name: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / PLACES[name]).mkdir()
    asked = on_download(monkeypatch, AssertionError())
    with pytest.raises(RunError, match=rf"^{name} could not .* \(Dataset not found.*\): copy .* again") as caught:
        load_source(str(tmp_path))
    assert not asked
    assert "download=" not in str(caught.value)  # an argument of torchvision, not of ours


def test_without_torchvision_the_remedy_is_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    for name in WRITERS:
        with pytest.raises(UserError, match=rf"{name} needs torchvision: pip install 'allmlp\[datasets\]'"):
            load_source(name)


@pytest.mark.parametrize("file", ["trainval.txt", "test.txt"])
def test_a_truncated_list(file: str, copies: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(copies["pets"], tmp_path, dirs_exist_ok=True)
    path = tmp_path / PLACES["pets"] / "annotations" / file
    text = path.read_text()
    for kept, said in (
        ("", "lacks some classes"),
        ("".join(sorted(text.splitlines(keepends=True))[:9]), "lacks some classes"),
        (text[:-4], "could not be downloaded or read"),
    ):
        path.write_text(kept)
        with pytest.raises(RunError, match=rf"{said}.*copy"):
            load_source(str(tmp_path))


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    expected, source = load_digits(), load_source("digits")
    dataset = source.split("all")
    assert list(source.splits) == ["train", "val", "test"]
    assert dataset.classes == tuple("0123456789")
    positions = [int(name.split("/")[1].removesuffix(".png")) for name in dataset.names]
    assert sorted(positions) == list(range(1797))
    assert dataset.labels.tolist() == expected.target[positions].tolist()
    pixels = np.stack([np.asarray(dataset.read(i)) for i in range(len(dataset))]).astype(float)
    assert np.abs(pixels - expected.images[positions][..., None] * 255 / 16).max() <= 0.5
