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

from mlp_mixer.data.images import EXTENSIONS, MAX_PIXELS, is_hidden, is_image_name
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

    def image(self, index: int, enough: int | None = None) -> Image.Image:
        """Upright RGB; a JPEG perhaps at a fraction of its size, its shorter side still of ``enough`` pixels."""
        return self.store.open(self.names[index], self.max_pixels, enough)

    def subset(self, indices: np.ndarray) -> "Part":
        return replace(self, names=tuple(self.names[i] for i in indices), labels=self.labels[indices])

    def relabelled(self, classes: Sequence[str]) -> "Part":
        """The same images with labels by name in another list of classes (a model's), so a missing one shifts none."""
        position = {name: i for i, name in enumerate(classes)}
        unknown = [name for name in self.classes if name not in position]
        if unknown:
            raise UserError(
                f"{len(unknown)} class(es) of the data are unknown to the model ({', '.join(map(repr, unknown[:5]))}); "
                f"it knows {', '.join(map(repr, list(classes)[:10]))}{' …' if len(classes) > 10 else ''}: "
                "rename the class folders, or train on them"
            )
        labels = np.array([position[name] for name in self.classes], dtype=np.int64)[self.labels]
        return replace(self, classes=tuple(classes), labels=labels)


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
    files = list(store.names())
    images = [name for name in files if is_image_name(name)]
    if not images:
        kinds = ", ".join(sorted(EXTENSIONS))
        raise UserError(f"{source} holds no images ({len(files)} files, none of {kinds}): give a folder with images")
    while (outer := outer_folder(images)) is not None:
        store, source = store.inside(outer), f"{source}/{outer}"
        files, images = ([name.removeprefix(f"{outer}/") for name in names] for names in (files, images))
    left_out = Counter(kind_of(name) for name in files if not is_image_name(name))
    folders = [name for name in store.folders() if not is_hidden(name)]
    named = {name: PART_NAMES[name.lower()] for name in folders if name.lower() in PART_NAMES}
    for part_name in named.values():
        twins = [folder for folder in named if named[folder] == part_name]
        if len(twins) > 1:
            raise UserError(f"{source} has {' and '.join(twins)}, the same part twice: keep one of them")
    if not named:
        part, loose = read_classes(store, images, folders, "", source)
        return {"all": part}, count_loose(left_out, loose)
    parts: dict[str, Part] = {}
    loose = [name for name in images if name.split("/")[0] not in named]
    for folder, part_name in named.items():
        parts[part_name], lying = read_classes(store, images, folders, f"{folder}/", f"{source}/{folder}")
        loose += lying
    return parts, count_loose(left_out, loose)


def read_classes(
    store: Store, images: Sequence[str], folders: Sequence[str], prefix: str, where: str
) -> tuple[Part, list[str]]:
    """One folder a class below the prefix, images at any depth; the part, and the images outside the class folders."""
    classes = sorted({name.removeprefix(prefix).split("/")[0] for name in folders if name.startswith(prefix)})
    below = sorted(name for name in images if name.startswith(prefix))
    members = [name for name in below if "/" in name.removeprefix(prefix)]
    counts = Counter(name.removeprefix(prefix).split("/")[0] for name in members)
    if not classes:
        raise UserError(
            f"{where} holds {len(below)} images but no class folders: put each class in a folder of its own"
        )
    for name in classes:
        if not counts[name]:
            raise UserError(f"class {name!r} of {where} holds no images: add some, or remove the folder")
    position = {name: i for i, name in enumerate(classes)}
    labels = np.array([position[name.removeprefix(prefix).split("/")[0]] for name in members], dtype=np.int64)
    part = Part(store=store, names=tuple(members), labels=labels, classes=tuple(classes))
    return part, sorted(set(below) - set(members))


def outer_folder(images: Sequence[str]) -> str | None:
    """The one folder of folders that everything lies in, as zips are often packed; None where there is none."""
    tops = {name.split("/")[0] for name in images}
    if len(tops) > 1 or min(tops).lower() in PART_NAMES or min(name.count("/") for name in images) < 2:
        return None
    return min(tops)


def kind_of(name: str) -> str:
    return "hidden files" if is_hidden(name) else PurePosixPath(name).suffix.lower() or PurePosixPath(name).name


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
    try:
        data = {name: CIFAR10(folder, train=name == "train", download=root is None) for name in ("train", "test")}
    except (OSError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RunError(
            f"CIFAR-10 could not be had ({reason}): check the network, or put its cifar-10-batches-py folder into "
            f"{folder} (MLP_MIXER_DATA names another place)"
        ) from None
    classes = tuple(data["train"].classes)
    names = {
        name: tuple(f"{name}/{classes[label]}/{i:05d}.png" for i, label in enumerate(part.targets))
        for name, part in data.items()
    }
    pixels = np.concatenate([part.data for part in data.values()])
    store = ArrayStore(pixels, names["train"] + names["test"])
    return {
        name: Part(store=store, names=names[name], labels=np.array(part.targets, dtype=np.int64), classes=classes)
        for name, part in data.items()
    }


BUILT_IN: dict[str, Callable[[], dict[str, Part]]] = {"digits": digits, "cifar10": cifar10}
