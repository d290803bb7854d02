"""The sources by name: torchvision's classes on small copies in the original formats, trained on and evaluated.

Every image has a single color that encodes its class and part, so that the lists of files and labels are checked
independently of the reader.
"""

import gzip
import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from allmlp.data.builtin import arrays
from allmlp.data.builtin.catalog import BUILT_IN, NOTES
from allmlp.data.sources import load_source
from allmlp.errors import RunError, UserError

torchvision_sets = pytest.importorskip("torchvision.datasets")

PARTS = {"train": 0, "val": 100, "test": 200, "all": 50}  # part → its level of blue
DIGITS = tuple("0123456789")


def paint(label: int, part: str, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    return np.full((*size, 3), (12 * (label % 20), 12 * (label // 20), PARTS[part]), dtype=np.uint8)


def meaning(pixels: np.ndarray) -> tuple[int, str]:
    red, green, blue = (float(pixels[..., i].mean()) for i in range(3))
    return round(red / 12) + 20 * round(green / 12), min(PARTS, key=lambda part: abs(PARTS[part] - blue))


def jpeg(path: Path, label: int, part: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(paint(label, part)).save(path, "JPEG", quality=95)


def labels(classes: int, per_class: int) -> list[int]:
    return np.random.default_rng(0).permutation(np.repeat(np.arange(classes), per_class)).tolist()


def write_mnist(root: Path, folder: str = "MNIST", packed: bool = False) -> None:
    """Numbers in big-endian order, as on the authors' page; gray level 20 · label, and 5 more in the test part."""
    raw = root / folder / "raw" if folder else root
    raw.mkdir(parents=True)
    for name, part, per_class in (("train", "train", 4), ("t10k", "test", 2)):
        own = labels(10, per_class)
        pixels = np.stack([np.full((28, 28), 20 * label + 5 * (part == "test"), dtype=np.uint8) for label in own])
        files = {
            f"{name}-images-idx3-ubyte": struct.pack(">4I", 0x803, len(own), 28, 28) + pixels.tobytes(),
            f"{name}-labels-idx1-ubyte": struct.pack(">2I", 0x801, len(own)) + bytes(own),
        }
        for file, data in files.items():
            (raw / (f"{file}.gz" if packed else file)).write_bytes(gzip.compress(data) if packed else data)


def write_svhn(root: Path) -> None:
    """MATLAB files of (H, W, 3, N) pixels, where the digit 0 has the label 10."""
    root.mkdir(parents=True, exist_ok=True)
    for part, per_class in (("train", 4), ("test", 2)):
        own = labels(10, per_class)
        pixels = np.stack([paint(label, part, (32, 32)) for label in own], axis=-1)
        savemat(
            root / f"{part}_32x32.mat", {"X": pixels, "y": np.array([[label or 10] for label in own], dtype=np.uint8)}
        )


def write_stl10(root: Path) -> None:
    """Bytes of (N, 3, W, H), labels from 1."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    (folder / "class_names.txt").write_text("\n".join(f"kind {i}" for i in range(10)) + "\n")
    (folder / "unlabeled_X.bin").write_bytes(b"")
    for part, per_class in (("train", 4), ("test", 2)):
        own = labels(10, per_class)
        pixels = np.stack([paint(label, part, (96, 96)).transpose(2, 1, 0) for label in own])
        (folder / f"{part}_X.bin").write_bytes(pixels.tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes(label + 1 for label in own))


def write_food101(root: Path) -> None:
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for part, per_class in (("train", 3), ("test", 2)):
        found = {f"dish_{label}": [f"dish_{label}/{part}{i}" for i in range(per_class)] for label in (2, 0, 1, 3)}
        (folder / "meta" / f"{part}.json").write_text(json.dumps(found))
        for label, names in found.items():
            for name in names:
                jpeg(folder / "images" / f"{name}.jpg", int(label[-1]), part)


def write_dtd(root: Path) -> None:
    folder = root / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    for part in ("train", "val", "test"):
        names = [f"texture{label}/texture{label}_{part}{i}.jpg" for label in (1, 0, 2) for i in range(3)]
        (folder / "labels" / f"{part}1.txt").write_text("\n".join(names) + "\n")
        (folder / "labels" / f"{part}2.txt").write_text("")  # another partition
        for name in names:
            jpeg(folder / "images" / name, int(name[7]), part)


def write_eurosat(root: Path) -> None:
    for label in range(4):
        for i in range(6):
            jpeg(root / "eurosat" / "2750" / f"Land{label}" / f"Land{label}_{i}.jpg", label, "all")


def write_caltech101(root: Path) -> None:
    folder = root / "caltech101" / "101_ObjectCategories"
    for label in range(4):
        for i in range(1, 7):
            jpeg(folder / f"thing{label}" / f"image_{i:04d}.jpg", label, "all")
    jpeg(folder / "BACKGROUND_Google" / "image_0001.jpg", 9, "all")


def write_sun397(root: Path) -> None:
    places = ["/a/abbey", "/c/church/indoor", "/c/church/outdoor"]
    for label, place in enumerate(places):
        for i in range(6):
            jpeg(root / "SUN397" / place[1:] / f"sun_{i}x.jpg", label, "all")
    (root / "SUN397" / "ClassName.txt").write_text("\n".join(places) + "\n")


def write_gtsrb(root: Path) -> None:
    """PPM files; the test images' classes are in a list with semicolons."""
    folder = root / "gtsrb" / "GTSRB"
    lines = ["Filename;Width;Height;Roi.X1;ClassId"]
    for label in range(43):
        for i in range(3):
            path = folder / "Training" / f"{label:05d}" / f"{i:05d}_00000.ppm"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(paint(label, "train")).save(path)
    (folder / "Final_Test" / "Images").mkdir(parents=True)
    for i, label in enumerate(labels(43, 1)):
        Image.fromarray(paint(label, "test")).save(folder / "Final_Test" / "Images" / f"{i:05d}.ppm")
        lines.append(f"{i:05d}.ppm;8;8;1;{label}")
    (root / "gtsrb" / "GT-final_test.csv").write_text("\n".join(lines) + "\n")


WRITERS: dict[str, Callable[[Path], None]] = {
    "mnist": write_mnist,
    "fashion-mnist": lambda root: write_mnist(root, "FashionMNIST"),
    "svhn": write_svhn,
    "stl10": write_stl10,
    "food101": write_food101,
    "dtd": write_dtd,
    "eurosat": write_eurosat,
    "caltech101": write_caltech101,
    "sun397": write_sun397,
    "gtsrb": write_gtsrb,
}
CLASSES = {
    "mnist": DIGITS, "svhn": DIGITS, "stl10": tuple(f"kind {i}" for i in range(10)),
    "fashion-mnist": tuple(torchvision_sets.FashionMNIST.classes), "food101": tuple(f"dish_{i}" for i in range(4)),
    "dtd": ("texture0", "texture1", "texture2"), "eurosat": tuple(f"Land{i}" for i in range(4)),
    "caltech101": tuple(f"thing{i}" for i in range(4)), "sun397": ("abbey", "church/indoor", "church/outdoor"),
    "gtsrb": tuple(f"{i:05d}" for i in range(43)),
}  # fmt: skip
COUNTS = {
    "mnist": {"train": 40, "test": 20}, "fashion-mnist": {"train": 40, "test": 20}, "svhn": {"train": 40, "test": 20},
    "stl10": {"train": 40, "test": 20}, "food101": {"train": 12, "test": 8}, "dtd": {"train": 9, "val": 9, "test": 9},
    "gtsrb": {"train": 129, "test": 43}, "eurosat": {"all": 24}, "caltech101": {"all": 24}, "sun397": {"all": 18},
}  # fmt: skip
every_name = pytest.mark.parametrize("name", WRITERS)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """name → a folder that holds only a copy of this set; read-only by convention."""
    made = {name: tmp_path_factory.mktemp(name) for name in WRITERS}
    for name, folder in made.items():
        WRITERS[name](folder)
    return made


@pytest.fixture(autouse=True)
def without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every download fails. Checksums are not verified, since those of the small copies differ."""

    def fail(url: str, root: str | Path = "", filename: str = "", *_args: object, **_options: object) -> None:
        if not filename or not (Path(root) / filename).is_file():
            raise RuntimeError("no network")

    for name in ("mnist", "svhn", "stl10", "food101", "dtd", "eurosat", "caltech", "sun397", "gtsrb"):
        module = getattr(torchvision_sets, name)
        for function in ("download_and_extract_archive", "download_url"):
            monkeypatch.setattr(module, function, fail, raising=False)
        monkeypatch.setattr(module, "check_integrity", lambda path, _md5=None: Path(path).is_file(), raising=False)
    monkeypatch.setattr(arrays, "DEBIAN_FASHION_MNIST", tmp_path / "no-package")


def seen(dataset, gray: bool) -> list[tuple[int, str]]:
    found = [np.asarray(dataset.read(i)) for i in range(len(dataset))]
    if gray:
        assert all((pixels[..., :1] == pixels).all() for pixels in found)
        return [(int(pixels[0, 0, 0]) // 20, "test" if pixels[0, 0, 0] % 20 == 5 else "train") for pixels in found]
    return [meaning(pixels) for pixels in found]


@every_name
def test_images_labels_classes_and_parts(
    name: str, copies: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALLMLP_DATA", str(copies[name]))
    source = load_source(name, val_fraction=0, test_fraction=0)
    assert source.classes == CLASSES[name]
    counts = {"train" if part == "all" else part: number for part, number in COUNTS[name].items()}
    assert {part: len(dataset) for part, dataset in source.splits.items()} == counts
    for part, dataset in source.splits.items():
        original = "all" if "all" in COUNTS[name] else part
        assert seen(dataset, "mnist" in name) == [(label, original) for label in dataset.labels.tolist()]
    assert list(source.split("all").names) == list(dict.fromkeys(source.split("all").names))
    assert source.notes == ((NOTES[name],) if name in NOTES else ())
    monkeypatch.setenv("ALLMLP_DATA", str(tmp_path))
    given = load_source(str(copies[name]))
    assert given.description.startswith(f"{name} in {copies[name]}")
    assert set(given.split("all").names) == set(source.split("all").names)
    assert {"train", "val", "test"} == set(given.splits)


@every_name
def test_trained_on_and_evaluated(
    name: str, mixer, tiny, copies: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALLMLP_DATA", str(copies[name]))
    sizes = ("--image-size", 16, "--patch-size", 8, "--workers", 0)
    answer = mixer("train", "photos", "--data", name, "--steps", 1, *sizes, *tiny, "--out", tmp_path / "run")
    assert answer.status == 0, answer.err
    scored = mixer("evaluate", tmp_path / "run", "--data", name, "--workers", 0, "--json")
    assert scored.status == 0, scored.err
    assert json.loads(scored.out)["images"] == len(load_source(name).split("test"))


@every_name
def test_a_damaged_copy_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of a copy that holds no picture, cut in half; and one file that is gone."""
    WRITERS[name](tmp_path / "copy")
    folder = tmp_path / "copy"
    lists = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".jpg", ".ppm")]
    pictures = sorted(path for path in folder.rglob("*") if path.suffix in (".jpg", ".ppm") and "BACK" not in str(path))
    damaged: list[tuple[Path, bytes | None]] = [(path, path.read_bytes()) for path in lists if path.stat().st_size]
    damaged += [(path, None) for path in pictures[:1] if name not in ("eurosat", "sun397", "gtsrb")]
    for path, whole in damaged:
        if path.name == "class_names.txt":
            continue
        kept = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2]) if whole is not None else path.unlink()
        with pytest.raises(RunError) as caught:
            load_source(str(folder))
        assert name in str(caught.value)
        assert "copy" in str(caught.value)
        assert "\n" not in str(caught.value)
        path.write_bytes(kept)
    load_source(str(folder))


@every_name
def test_a_download_that_fails(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLMLP_DATA", str(tmp_path))
    with pytest.raises(RunError, match=rf"^{name} could not be downloaded or read \(.*\): check the network") as caught:
        load_source(name)
    assert "\n" not in str(caught.value)


def test_debians_fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "package", "", packed=True)
    monkeypatch.setattr(arrays, "DEBIAN_FASHION_MNIST", tmp_path / "package")
    monkeypatch.setenv("ALLMLP_DATA", str(tmp_path / "data"))
    source = load_source("fashion-mnist", val_fraction=0)
    assert source.classes == CLASSES["fashion-mnist"]
    for part, dataset in source.splits.items():
        assert seen(dataset, True) == [(label, part) for label in dataset.labels.tolist()]
    write_mnist(tmp_path / "data", "FashionMNIST")  # a copy in the data folder comes first
    (tmp_path / "package" / "train-images-idx3-ubyte.gz").write_bytes(b"damaged")
    load_source("fashion-mnist")
    monkeypatch.setenv("ALLMLP_DATA", str(tmp_path / "nothing"))
    with pytest.raises(RunError, match=r"fashion-mnist could not be read .*install the package .* again"):
        load_source("fashion-mnist")


def test_rows_stay_rows() -> None:
    pixels = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    found = arrays.last_channel(pixels)
    assert found.shape == (2, 4, 5, 3)
    assert found[1, 2, 3, 0] == pixels[1, 0, 2, 3]


def test_the_order_does_not_depend_on_the_disk(copies: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    listed = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: sorted(listed(self, pattern), reverse=True))
    names = list(load_source(str(copies["sun397"]), test_fraction=0, val_fraction=0).split("all").names)
    assert names == sorted(names)


def test_the_catalog_is_complete() -> None:
    asked = "fashion-mnist mnist svhn stl10 food101 dtd eurosat caltech101 sun397 gtsrb imagenet"
    assert set(asked.split()) | {"digits", "cifar10", "cifar100", "pets", "flowers102"} == set(BUILT_IN)


# ImageNet

SYNSETS = ["n01440764", "n01443537", "n01484850"]
VAL = [2, 0, 1, 0, 2, 1]  # classes of the validation images in order


def write_train(folder: Path) -> None:
    for label, synset in enumerate(SYNSETS):
        for i in range(4):
            jpeg(folder / synset / f"{synset}_{i}.JPEG", label, "train")


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def write_val(folder: Path, flat: bool) -> None:
    for number, label in enumerate(VAL, 1):
        jpeg(folder / ("" if flat else SYNSETS[label]) / val_name(number), label, "test")


def kaggle(root: Path) -> None:
    write_train(root / "ILSVRC/Data/CLS-LOC/train")
    write_val(root / "ILSVRC/Data/CLS-LOC/val", flat=True)
    rows = [f"ILSVRC2012_val_{n:08d},{SYNSETS[label]} 1 2 3 4 {SYNSETS[0]} 5 6 7 8 " for n, label in enumerate(VAL, 1)]
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(reversed(rows)) + "\n")


def synset_list(root: Path) -> None:
    write_train(root / "train")
    write_val(root / "val", flat=True)
    (root / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(SYNSETS[i] for i in VAL) + "\n")


def caffe(root: Path) -> None:
    write_train(root / "Data/CLS-LOC/train")
    write_val(root / "Data/CLS-LOC/val", flat=True)
    (root / "ImageSets/CLS-LOC").mkdir(parents=True)
    lines = (f"{val_name(n)} {label}" for n, label in enumerate(VAL, 1))
    (root / "ImageSets/CLS-LOC/val.txt").write_text("\n".join(lines))


def meta(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    names = {synset: (f"thing {i}", "other name") for i, synset in enumerate(SYNSETS)}
    torch.save((names, [SYNSETS[i] for i in VAL]), root / "meta.bin")


def torchvisions(root: Path) -> None:
    write_train(root / "train")
    write_val(root / "val", flat=False)
    meta(root)


def flat_with_meta(root: Path) -> None:
    write_train(root / "train")
    write_val(root / "val", flat=True)
    meta(root)


def plain(root: Path) -> None:
    write_train(root / "train")
    write_val(root / "val", flat=False)


LAYOUTS = [kaggle, synset_list, caffe, torchvisions, flat_with_meta, plain]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_imagenet(layout, mixer, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout(tmp_path / "data" / "imagenet")
    monkeypatch.setenv("ALLMLP_DATA", str(tmp_path / "data"))
    source = load_source("imagenet", val_fraction=0)
    assert source.classes == tuple(SYNSETS)
    assert {part: len(dataset) for part, dataset in source.splits.items()} == {"train": 12, "test": 6}
    for part, dataset in source.splits.items():
        assert seen(dataset, False) == [(label, part) for label in dataset.labels.tolist()]
    test = source.split("test")
    numbers = {int(name.split("val_")[1][:8]): int(label) for name, label in zip(test.names, test.labels, strict=True)}
    assert numbers == dict(enumerate(VAL, 1))
    if layout is not plain:  # an ordinary tree: its val/ is for validation
        given = load_source(str(tmp_path / "data" / "imagenet"), val_fraction=0)
        assert given.description.startswith("ImageNet in ")
        assert list(given.split("test").names) == list(test.names)
    sizes = ("--image-size", 16, "--patch-size", 8, "--workers", 0)
    words = ("train", "photos", "--data", "imagenet", "--steps", 1, *sizes, *tiny, "--out", tmp_path / "run")
    assert mixer(*words).status == 0
    scored = mixer("evaluate", tmp_path / "run", "--data", "imagenet", "--workers", 0, "--json")
    assert json.loads(scored.out)["images"] == 6


def edit(path: Path, change: Callable[[list[str]], Iterable[str]]) -> None:
    path.write_text("\n".join(change(path.read_text().splitlines())))


def lines_of(name: str, change: Callable[[list[str]], Iterable[str]]) -> Callable[[Path], object]:
    """Damage to a list."""
    return lambda root: edit(root / name, change)


KAGGLE, SYNSET_LIST = "LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt"
DAMAGE: list[tuple[Callable[[Path], None], Callable[[Path], object], type[Exception], str]] = [
    (plain, lambda root: [p.unlink() for p in root.rglob("train/*/*.JPEG")], UserError, "no folder of a synset"),
    (synset_list, lambda root: (root / SYNSET_LIST).unlink(), UserError, "no labels"),
    (synset_list, lines_of(SYNSET_LIST, lambda lines: lines[:-1]), RunError, "has 5 labels, and .* 6 images"),
    (kaggle, lines_of(KAGGLE, lambda lines: lines[:-1]), RunError, "1 images are not in it"),
    (kaggle, lines_of(KAGGLE, lambda lines: ["a,b"]), RunError, "6 images are not in it"),
    (kaggle, lines_of(KAGGLE, lambda lines: [lines[0], "x,cat 1 2"]), RunError, "'cat' is no synset"),
    (kaggle, lambda root: next(root.rglob(val_name(3))).unlink(), RunError, "1 of its images are not there"),
    (caffe, lines_of("ImageSets/CLS-LOC/val.txt", lambda lines: ["a.JPEG 7"]), RunError, "is no synset"),
    (torchvisions, lambda root: (root / "meta.bin").write_bytes(b"damaged"), RunError, "could not be read .*meta.bin"),
    (flat_with_meta, lambda root: (root / "meta.bin").write_bytes(b"damaged"), RunError, "could not be read"),
]


@pytest.mark.parametrize(("layout", "damage", "kind", "said"), DAMAGE)
def test_imagenet_that_is_damaged(layout, damage, kind, said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout(tmp_path / "imagenet")
    damage(tmp_path / "imagenet")
    monkeypatch.setenv("ALLMLP_DATA", str(tmp_path))
    with pytest.raises(kind, match=said) as caught:
        load_source("imagenet")
    assert "\n" not in str(caught.value)


def test_imagenet_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLMLP_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"no ImageNet at .*imagenet, and it cannot be downloaded: put there ILSVRC"):
        load_source("imagenet")
    write_train(tmp_path / "imagenet" / "train")
    with pytest.raises(UserError, match=r"has no .*val: put there"):
        load_source("imagenet")
