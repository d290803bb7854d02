"""SOURCE, as every verb takes it, to labelled images: a built-in name, a folder, or a zip of one.

A folder holds ``train/``, ``val/`` or ``validation/``, ``test/``, each with one folder a class; or the class folders
themselves, which are then split (``data/split.py``). Validation is always cut from train, never chosen on test.
"""

import difflib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from mlp_mixer.data.images import EXTENSIONS, MAX_PIXELS, is_image_name
from mlp_mixer.data.split import stratified
from mlp_mixer.data.stores import ArrayStore, FolderStore, Store, ZipStore
from mlp_mixer.errors import RunError, UserError

PART_NAMES = {"train": "train", "val": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class Part:
    """Labelled images: ``names[i]`` in ``store`` shows ``classes[labels[i]]``."""

    store: Store
    names: tuple[str, ...]
    labels: np.ndarray  # (N,) int64
    classes: tuple[str, ...]
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> Image.Image:
        return self.store.open(self.names[index], self.max_pixels)

    def subset(self, indices: np.ndarray) -> "Part":
        return replace(self, names=tuple(self.names[i] for i in indices), labels=self.labels[indices])

    def relabelled(self, classes: Sequence[str]) -> "Part":
        """The same images with labels by name in another list of classes (a model's), so a missing one shifts none."""
        unknown = [name for name in self.classes if name not in set(classes)]
        if unknown:
            raise UserError(
                f"{len(unknown)} class(es) of the data are unknown to the model ({', '.join(map(repr, unknown[:5]))}); "
                f"it knows {', '.join(map(repr, list(classes)[:10]))}{' …' if len(classes) > 10 else ''}: "
                "rename the class folders, or train on them"
            )
        position = np.array([classes.index(name) for name in self.classes], dtype=np.int64)
        return replace(self, classes=tuple(classes), labels=position[self.labels])


@dataclass(frozen=True, kw_only=True)
class Source:
    """The parts that are there ("train", "val", "test"), and how they came about, in words for the user."""

    parts: dict[str, Part]
    classes: tuple[str, ...]
    how: str
    left_out: dict[str, int] = field(default_factory=dict)  # files that are no images, by ending

    def part(self, name: str) -> Part:
        if name == "all":
            first = next(iter(self.parts.values()))
            labels = np.concatenate([part.labels for part in self.parts.values()])
            return replace(first, names=tuple(n for part in self.parts.values() for n in part.names), labels=labels)
        if name not in self.parts:
            raise UserError(f"there is no {name} part in this source: it has {', '.join(self.parts)}, or all")
        return self.parts[name]


def load_source(
    source: str,
    *,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    split_seed: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> Source:
    """Finds the labelled images of a SOURCE and splits them where they do not come split.

    Args:
        source: "digits", "cifar10", a folder, or a .zip file.
        val_fraction: of the training images, cut off where there is no validation part.
        test_fraction: of all images, cut off where there are no parts at all.
        split_seed: another one gives another split.
        max_pixels: larger images are refused.

    Raises:
        UserError: no such source (with the nearest names), no images, an empty class, classes that do not match.
    """
    path = Path(source)
    if source in BUILT_IN:
        parts, how, left_out = BUILT_IN[source](), f"{source}, built in", {}
    elif path.is_dir() and (path / "cifar-10-batches-py").is_dir():
        parts, how, left_out = cifar10(path), str(path), {}
    elif path.is_dir():
        parts, left_out = read_tree(FolderStore(path), source)
        how = f"the folder {source}"
    elif path.is_file():
        if path.suffix.lower() != ".zip":
            raise UserError(f"{source} is a file but no .zip: give a folder of images, a .zip of one, or a name")
        parts, left_out = read_tree(ZipStore(path), source)
        how = f"the zip {source}"
    else:
        near = difflib.get_close_matches(source, BUILT_IN, 2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(
            f"no data at {source!r}: {hint}give a folder of images, a .zip of one, or one of {', '.join(BUILT_IN)}"
        )
    parts = {name: replace(part, max_pixels=max_pixels) for name, part in parts.items()}
    return cut(parts, how, left_out, val_fraction, test_fraction, split_seed)


def cut(
    parts: dict[str, Part], how: str, left_out: dict[str, int], val_fraction: float, test_fraction: float, seed: int
) -> Source:
    """Splits what is not split yet; "all" is the name of a source that came without parts."""
    if "all" in parts:
        whole = parts.pop("all")
        kept, test = stratified(whole.labels, whole.names, test_fraction, seed)
        parts["train"] = whole.subset(kept)
        if len(test):
            parts["test"] = whole.subset(test)
        how += f"; {test_fraction:.0%} of each class cut off for test (split seed {seed})"
    if "train" in parts and "val" not in parts:
        train = parts["train"]
        kept, val = stratified(train.labels, train.names, val_fraction, seed)
        if len(val):
            parts["train"], parts["val"] = train.subset(kept), train.subset(val)
            how += f"; {val_fraction:.0%} of each training class cut off for validation (split seed {seed})"
    ordered = {name: parts[name] for name in ("train", "val", "test") if name in parts}
    first = next(iter(ordered))
    classes = ordered[first].classes
    for name, part in ordered.items():
        unknown = sorted(set(part.classes) - set(classes))
        if unknown:
            raise UserError(f"class {unknown[0]!r} is in {name} but not in {first}: add its images there, or remove it")
    ordered = {name: part.relabelled(classes) for name, part in ordered.items()}
    return Source(parts=ordered, classes=classes, how=how, left_out=left_out)


def read_tree(store: FolderStore | ZipStore, source: str) -> tuple[dict[str, Part], dict[str, int]]:
    """The parts of a folder or zip (or "all" of it, where it holds class folders), and how many files are no images."""
    files, folders = list(store.names()), store.folders()
    images = [name for name in files if is_image_name(name)]
    if not images:
        kinds = ", ".join(sorted(EXTENSIONS))
        raise UserError(f"{source} holds no images ({len(files)} files, none of {kinds}): give a folder with images")
    left_out = Counter(PurePosixPath(name).suffix.lower() or name for name in files if not is_image_name(name))
    prefix = outer_folder(images)
    inside = {name.removeprefix(prefix): name for name in images}
    top = {name.removeprefix(prefix).split("/")[0] for name in folders if name.startswith(prefix) and name != prefix}
    named = {folder: PART_NAMES[folder] for folder in sorted(top & PART_NAMES.keys())}
    if not named:
        part, loose = read_classes(store, inside, folders, prefix, source)
        return {"all": part}, count_loose(left_out, loose)
    if {"val", "validation"} <= named.keys():
        raise UserError(f"{source} has both val and validation: keep one of them")
    parts: dict[str, Part] = {}
    loose = [name for name in inside if name.split("/")[0] not in named]
    for folder, part_name in named.items():
        below = {
            name.removeprefix(f"{folder}/"): full for name, full in inside.items() if name.startswith(f"{folder}/")
        }
        parts[part_name], lying = read_classes(store, below, folders, f"{prefix}{folder}/", f"{source}/{folder}")
        loose += lying
    return parts, count_loose(left_out, loose)


def read_classes(
    store: Store, images: dict[str, str], folders: list[str], prefix: str, where: str
) -> tuple[Part, list[str]]:
    """One folder a class, images at any depth below it: the part, and the images that lie in no class folder."""
    below = (name.removeprefix(prefix) for name in folders if name.startswith(prefix))
    classes = sorted({name.split("/")[0] for name in below if name and not name.startswith((".", "__MACOSX"))})
    members = sorted(name for name in images if "/" in name and name.split("/")[0] in set(classes))
    loose = sorted(images.keys() - set(members))
    counts = Counter(name.split("/")[0] for name in members)
    if not classes:
        raise UserError(
            f"{where} holds {len(images)} images but no class folders: put each class in a folder of its own"
        )
    for name in classes:
        if not counts[name]:
            raise UserError(f"class {name!r} of {where} holds no images: add some, or remove the folder")
    position = {name: i for i, name in enumerate(classes)}
    labels = np.array([position[name.split("/")[0]] for name in members], dtype=np.int64)
    part = Part(store=store, names=tuple(images[name] for name in members), labels=labels, classes=tuple(classes))
    return part, loose


def outer_folder(images: Sequence[str]) -> str:
    """What all names start with where everything lies in one folder of folders, as zips are often packed; else ""."""
    tops = {name.split("/")[0] for name in images if not name.startswith("__MACOSX/")}
    if len(tops) == 1 and (top := next(iter(tops))) not in PART_NAMES and all(n.count("/") >= 2 for n in images):
        return f"{top}/"
    return ""


def count_loose(left_out: Counter[str], loose: Sequence[str]) -> dict[str, int]:
    return dict(left_out) | ({"images outside the class folders": len(loose)} if loose else {})


def digits() -> dict[str, Part]:
    """The 1,797 handwritten digits of 8×8 pixels inside scikit-learn (Alpaydin & Kaynak 1998): no download."""
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)  # (1797, 64) from 0 to 16
    grey = np.rint(values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    names = tuple(f"{label}/{i:04d}.png" for i, label in enumerate(labels))
    store = ArrayStore(np.repeat(grey[..., None], 3, axis=-1), names)
    classes = tuple(str(i) for i in range(10))
    return {"all": Part(store=store, names=names, labels=labels.astype(np.int64), classes=classes)}


def cifar10(root: Path | None = None) -> dict[str, Part]:
    """CIFAR-10 (Krizhevsky 2009) by torchvision: an existing copy in root, else downloaded into the cache folder."""
    try:
        from torchvision.datasets import CIFAR10
    except ImportError:
        raise UserError("cifar10 by name needs torchvision: pip install 'mlp-mixer[datasets]'") from None
    folder = root or Path(os.environ.get("MLP_MIXER_DATA", Path.home() / ".cache" / "mlp-mixer"))
    parts: dict[str, Part] = {}
    for name, train in (("train", True), ("test", False)):
        try:
            data = CIFAR10(folder, train=train, download=root is None)
        except (OSError, RuntimeError) as error:
            raise RunError(
                f"CIFAR-10 could not be had ({str(error).splitlines()[0]}): check the network, or put its "
                f"cifar-10-batches-py folder into {folder} (MLP_MIXER_DATA names another place)"
            ) from None
        names = tuple(f"{name}/{data.classes[label]}/{i:05d}.png" for i, label in enumerate(data.targets))
        labels = np.array(data.targets, dtype=np.int64)
        parts[name] = Part(store=ArrayStore(data.data, names), names=names, labels=labels, classes=tuple(data.classes))
    return parts


BUILT_IN: dict[str, Callable[[], dict[str, Part]]] = {"digits": digits, "cifar10": cifar10}
