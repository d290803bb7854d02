"""SOURCE, as every verb takes it, to labelled images: a built-in name, a folder, or a zip of one.

A folder holds ``train/``, ``val/`` or ``validation/``, ``test/``, each with one folder a class; or the class folders
themselves, which are then split (``data/split.py``). Validation is always cut from train, never chosen on test.
"""

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from allmlp.data.builtin import BUILT_IN, DOWNLOADED, FOLDERS
from allmlp.data.dataset import DatasetSplits, ImageDataset
from allmlp.data.decode import EXTENSIONS, MAX_PIXELS, is_hidden, is_image_name
from allmlp.data.split import stratified
from allmlp.data.stores import FolderStore, Store, ZipStore
from allmlp.errors import UserError

PART_NAMES = {"train": "train", "val": "val", "validation": "val", "test": "test"}


def load_source(
    source: str,
    *,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    split_seed: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> DatasetSplits:
    """Finds the labelled images of a SOURCE and splits them where they do not come split.

    Args:
        source: "digits" or another built-in name (``data/named.py``), a folder, or a .zip file.
        val_fraction: of the training images, cut off where there is no validation part.
        test_fraction: of all images, cut off where there are no parts at all.
        split_seed: another one gives another split.
        max_pixels: larger images are refused.

    Raises:
        UserError: no such source (with the nearest names), no images, an empty class, classes that do not match.
        RunError: a built-in one that could not be downloaded, or whose copy is damaged.
    """
    path = Path(source)
    if source in BUILT_IN:
        parts, how, left_out = BUILT_IN[source](), f"{source}, built in", {}
        how += f" (not the folder ./{source})" if path.is_dir() else ""
    elif copies := [name for name, folder in FOLDERS.items() if (path / folder).is_dir()]:
        if len(copies) > 1:
            raise UserError(f"{source} holds {' and '.join(copies)}: give the name of one, with ALLMLP_DATA={source}")
        parts, how, left_out = DOWNLOADED[copies[0]](path), f"{copies[0]} in {source}", {}
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
    parts: dict[str, ImageDataset],
    how: str,
    left_out: dict[str, int],
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> DatasetSplits:
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
    return DatasetSplits(splits=ordered, classes=classes, description=how, left_out=left_out)


def hold_out(source: DatasetSplits, fraction: float, seed: int) -> DatasetSplits:
    """For choosing settings: train and val both cut from the source's train; its own val and test are left out."""
    train = source.split("train")
    kept, val = stratified(train.labels, train.names, fraction, seed)
    if not len(val):
        raise UserError(
            f"--holdout {fraction} of {len(train)} images leaves none to choose by: each class has but one; give one "
            "--learning-rate instead of choosing"
        )
    parts = {"train": train.subset(kept), "val": train.subset(val)}
    how = f"{source.description}; {fraction:.0%} of each training class held out to choose by (split seed {seed})"
    return replace(source, splits=parts, description=how)


def read_tree(store: FolderStore | ZipStore, source: str) -> tuple[dict[str, ImageDataset], dict[str, int]]:
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
    parts: dict[str, ImageDataset] = {}
    loose = [name for name in images if name.split("/")[0] not in named]
    for folder, part_name in named.items():
        parts[part_name], lying = read_classes(store, images, folders, f"{folder}/", f"{source}/{folder}")
        loose += lying
    return parts, count_loose(left_out, loose)


def read_classes(
    store: Store, images: Sequence[str], folders: Sequence[str], prefix: str, where: str
) -> tuple[ImageDataset, list[str]]:
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
    part = ImageDataset(store=store, names=tuple(members), labels=labels, classes=tuple(classes))
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
