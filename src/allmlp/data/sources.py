"""From a SOURCE, as every command takes it, to labeled images: a built-in name, a folder, or a zip of one.

A source without split folders is split here by a seeded, stratified rule (``data/split.py``). Validation images always
come from the training images, never from the test images.
"""

import contextlib
import difflib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path

import numpy as np

from allmlp.data.builtin.catalog import BUILT_IN, NOTES
from allmlp.data.builtin.copies import copies_in
from allmlp.data.builtin.imagenet import is_imagenet
from allmlp.data.builtin.vtab import VTAB_COPIES, check_single_task, is_task_folder, read_task_folder
from allmlp.data.builtin.vtab_copies import read_copy
from allmlp.data.dataset import DatasetSplits, ImageDataset
from allmlp.data.decode import MAX_PIXELS
from allmlp.data.duplicates.removals import leave_out
from allmlp.data.folders.layout import Found, read_tree
from allmlp.data.split import stratified_split
from allmlp.data.stores import FolderStore, ZipStore
from allmlp.errors import UserError

_walks: ContextVar[dict[Path, Found] | None] = ContextVar("walks", default=None)


@contextlib.contextmanager
def walk_once() -> Iterator[None]:
    """Within this context, a folder or zip is walked once, however often it is loaded: by each run of a search."""
    walks = _walks.get()
    token = _walks.set({} if walks is None else walks)
    try:
        yield
    finally:
        _walks.reset(token)


def walk_source(path: Path, walk: Callable[[], Found]) -> Found:
    """What a walk through the folder or zip finds, or found before."""
    walks = _walks.get()
    if walks is None:
        return walk()
    if path not in walks:
        walks[path] = walk()
    return walks[path]


def load_source(
    source: str,
    *,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    split_seed: int = 0,
    max_pixels: int = MAX_PIXELS,
    exclude: str | None = None,
) -> DatasetSplits:
    """Finds the labeled images of a SOURCE and makes the splits that it does not have.

    Args:
        source: "digits" or another built-in name (``data/builtin/catalog.py``, ``vtab_copies.py``), a folder, also that
            of a VTAB task, or a .zip file.
        val_fraction: fraction of the training images for validation, if the source has no validation split.
        test_fraction: fraction of all images for testing, if the source has no splits at all.
        split_seed: seed of both splits.
        max_pixels: images with more pixels count as unreadable.
        exclude: a file that lists images to leave out, before any split is made (``duplicates/removals.py``).

    Raises:
        UserError: an unknown source (the message lists the nearest names), no images, an empty class, or splits whose
            classes do not match.
        RunError: a built-in dataset cannot be downloaded, or its copy is damaged.
    """
    path = Path(source)
    if not source:  # Path("") would be the working folder
        raise UserError(
            f"no data at '', an empty name (an unset variable?): give a folder, a .zip, or one of {', '.join(BUILT_IN)}"
        )
    if source in BUILT_IN:
        found, description = named(source, None), f"{source}, built in"
        description += f" (not the folder ./{source})" if path.is_dir() else ""
    elif source in VTAB_COPIES:
        found, description = read_copy(VTAB_COPIES[source]), f"{source}, built in"
    elif is_task_folder(path):
        found, description = walk_source(path, lambda: read_task_folder(path)), f"the VTAB task in {source}"
    elif is_imagenet(path):
        found, description = named("imagenet", path), f"ImageNet in {source}"
    elif copies := copies_in(path):
        if len(copies) > 1:
            raise UserError(
                f"{source} holds {' and '.join(copies)}: give one of these names as the source and set "
                f"ALLMLP_DATA={source}"
            )
        found, description = named(copies[0], path), f"{copies[0]} in {source}"
    elif path.is_dir():
        check_single_task(path)
        found = walk_source(path, lambda: read_tree(FolderStore(path), source))
        description = f"the folder {source}"
    elif path.is_file():
        if path.suffix.lower() != ".zip":
            raise UserError(f"{source} is not a .zip file: give a folder of images, a .zip of one, or a name")
        found = walk_source(path, lambda: read_tree(ZipStore(path), source))
        description = f"the zip {source}"
    else:
        near = difflib.get_close_matches(source, [*BUILT_IN, *VTAB_COPIES], 2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(
            f"no data at {source!r}: {hint}give a folder of images, a .zip of one, or one of {', '.join(BUILT_IN)}"
        )
    datasets = {name: replace(dataset, max_pixels=max_pixels) for name, dataset in found.datasets.items()}
    if exclude is not None:
        datasets, removed, notes = leave_out(datasets, Path(exclude), source)
        found = found._replace(left_out=found.left_out | removed, notes=(*found.notes, *notes))
    return make_splits(found._replace(datasets=datasets), description, val_fraction, test_fraction, split_seed)


def named(name: str, folder: Path | None) -> Found:
    """A source of the catalog, in a folder that holds a copy or (None) in the data folder."""
    return Found(BUILT_IN[name](folder), {}, (NOTES[name],) if name in NOTES else ())


def make_splits(found: Found, description: str, val_fraction: float, test_fraction: float, seed: int) -> DatasetSplits:
    """Adds the splits that a source lacks; if it has none, its single dataset is "all"."""
    splits, choose_by = dict(found.datasets), found.choose_by
    if "all" in splits:
        everything = splits.pop("all")
        kept, held_out = stratified_split(everything.labels, everything.names, test_fraction, seed)
        splits["train"] = everything.subset(kept)
        if len(held_out):
            splits["test"] = everything.subset(held_out)
            description += f"; {test_fraction:.0%} of each class split off for test (split seed {seed})"
    if "train" in splits and "val" not in splits:
        train = splits["train"]
        own = choose_by if val_fraction else frozenset[str]()
        kept, held_out, how = held_out_images(train, own, val_fraction, seed, "split off for validation")
        if len(held_out):
            splits["train"], splits["val"] = train.subset(kept), train.subset(held_out)
            description += f"; {how}"
            choose_by = choose_by - own
    splits = {name: splits[name] for name in ("train", "val", "test") if name in splits}
    first = next(iter(splits))
    classes = splits[first].classes
    for name, dataset in splits.items():
        unknown = sorted(set(dataset.classes) - set(classes))
        if unknown:
            raise UserError(f"class {unknown[0]!r} is in {name} but not in {first}: add its images there, or remove it")
    splits = {name: dataset.relabeled(classes) for name, dataset in splits.items()}
    return DatasetSplits(
        splits=splits,
        classes=classes,
        description=description,
        left_out=found.left_out,
        notes=found.notes,
        choose_by=choose_by,
    )


def held_out_images(
    train: ImageDataset, choose_by: frozenset[str], fraction: float, seed: int, purpose: str
) -> tuple[np.ndarray, np.ndarray, str]:
    """The indices of the training images that are kept and held out, and a description of these with their purpose.

    A source's own choice is taken, where it has one; else a fraction of each class.
    """
    if choose_by:
        chosen = np.fromiter((name in choose_by for name in train.names), dtype=bool, count=len(train))
        return np.flatnonzero(~chosen), np.flatnonzero(chosen), f"its own {chosen.sum():,} images {purpose}"
    kept, held_out = stratified_split(train.labels, train.names, fraction, seed)
    return kept, held_out, f"{fraction:.0%} of each training class {purpose} (split seed {seed})"


def hold_out(data: DatasetSplits, fraction: float, seed: int) -> DatasetSplits:
    """For choosing settings: new train and val splits, both made of the training images. Other splits are dropped.

    The source's own choice of held-out images replaces ``fraction``, where it has one (VTAB-1k's 800 and 200).
    """
    train = data.split("train")
    kept, held_out, how = held_out_images(train, data.choose_by, fraction, seed, "held out to choose by")
    if not len(held_out):
        raise UserError(
            f"--holdout {fraction} of {len(train)} images leaves none to choose by, because every class has a single "
            "image: give one --learning-rate instead of several"
        )
    splits = {"train": train.subset(kept), "val": train.subset(held_out)}
    return replace(data, splits=splits, description=f"{data.description}; {how}", choose_by=frozenset())
