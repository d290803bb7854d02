"""One walk through a folder or zip: its folders and images, and the other files by kind.

Names are packed at once (``data/names.py``): no step keeps a Python object per image.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import NamedTuple, TypeVar

from allmlp.data.decode import is_hidden, is_image_name
from allmlp.data.formats import FIRST_BYTES, looks_like_image, may_be_image
from allmlp.data.names import Names, normal_form, pack
from allmlp.data.stores import FolderStore, ZipStore
from allmlp.errors import UserError, printable

T = TypeVar("T")
LOCK, RUN_FILES = ".lock", "files of training runs"
RUN_NAME = re.compile(r"-\d{8}-\d{6}(-\d+)?/$")
RUN_RECORDS = frozenset({"starts.json", "metrics.jsonl", "summary.json", "transfer.json"})
SYSTEM_FOLDERS = {  # in lower case: of operating systems, network storage, photo galleries and tools
    *("lost+found", "$recycle.bin", "recycler", "system volume information", "network trash folder", "temporary items"),
    *("#recycle", "@recycle", "@eadir", "#snapshot", "@snapshot", "pwg_representative"),
    *("thumbs", "_thumbs", "thumbnail", "thumbnails", "_thumbnails"),
    *("__pycache__", "node_modules", "lightning_logs", "mlruns", "wandb"),
}
UNREADABLE_FOLDERS = "folders that cannot be read"
REPLACED_ENTRIES = "entries of the zip whose name is there twice"
MAX_PROBES = 1000  # files of an ending that are no images, after which the others of that ending are not opened
MAX_KINDS, OTHER_FILES = 1000, "other files"  # kinds of ignored files that are counted separately


class Folder(NamedTuple):
    path: str  # "" or "some/folder/"
    start: int  # its own images are images[start:stop], in order
    stop: int

    @property
    def images(self) -> int:
        return self.stop - self.start


class Tree(NamedTuple):
    """What one walk found. Folders of runs, hidden ones and those of the system are not in it."""

    store: FolderStore | ZipStore
    folders: list[Folder]  # parents first; what is below a folder follows it
    images: Names  # in the order of the folders
    ignored: Counter[str]  # number of other files by kind
    others: dict[str, Counter[str]]  # of the folders without images: kinds of their own other files
    unreadable: dict[str, str]  # folder → why it cannot be read


def walk(store: FolderStore | ZipStore, source: str) -> Tree:
    """Finds the images of a store; ``source`` names it in messages. See ``visits``."""
    ignored: Counter[str] = Counter()
    folders: list[Folder] = []
    others: dict[str, Counter[str]] = {}
    unreadable: dict[str, str] = {}
    runs: list[str] = []

    def images() -> Iterator[str]:
        found = 0
        for visit in visits(store, source, ignored, runs):
            start, found = found, found + len(visit.images)
            yield from (visit.path + name for name in visit.images)
            folders.append(Folder(visit.path, start, found))
            if visit.others and not visit.images:
                others[visit.path] = visit.others
            if visit.problem is not None:
                unreadable[visit.path] = visit.problem

    names = pack(images())
    return Tree(store, without_parents_of_runs(folders, runs), names, ignored, others, unreadable)


def image_names(store: FolderStore | ZipStore, source: str, ignored: Counter[str]) -> Iterator[str]:
    """Yields the names of all images of a store, and counts its other files by kind (see ``visits``)."""
    for visit in visits(store, source, ignored, []):
        yield from (visit.path + name for name in visit.images)


class Visit(NamedTuple):
    """What one folder holds itself."""

    path: str
    images: list[str]
    others: Counter[str]
    problem: str | None


def visits(store: FolderStore | ZipStore, source: str, ignored: Counter[str], runs: list[str]) -> Iterator[Visit]:
    """Yields every folder that may hold data, parents first.

    Args:
        store, source: what is walked, and its name for messages.
        ignored: counts the files that are no images, and all those in other folders, by kind.
        runs: gets the folders of training runs, whose examples are no data.

    Raises:
        UserError: the store cannot be read, or one folder is there twice, in two forms of Unicode.
    """
    if replaced := store.replaced_entries():
        ignored[REPLACED_ENTRIES] += replaced
    for path, files, problem in store.walk():
        if problem is not None and not path:
            raise UserError(f"{source} cannot be read ({problem}): check its permissions")
        if path != normal_form(path):
            raise UserError(
                f"{source} holds the folder {printable(path)} twice, in two forms of Unicode that look alike: move the "
                "files of one into the other"
            )
        if is_run(path, files):
            runs.append(path)
        excluded = excluded_kind(path, runs)
        images, others = [], Counter[str]()
        for file in files:
            if excluded is None and is_image_name(file):
                images.append(file)
                continue
            kind = excluded or file_kind(file)
            probed = excluded is None and ignored[kind] + others[kind] < MAX_PROBES
            if probed and is_image_by_content(store, path, file):
                images.append(file)
            elif file != LOCK:
                others[kind if kind in ignored or len(ignored) + len(others) < MAX_KINDS else OTHER_FILES] += 1
        ignored.update(others)
        if excluded is None:
            ignored.update([UNREADABLE_FOLDERS] if problem is not None else [])
            yield Visit(path, images, others, problem)


def is_image_by_content(store: FolderStore | ZipStore, path: str, file: str) -> bool:
    """Whether a file without a known ending is an image, such as a.jpg?w=100: its first bytes tell."""
    return may_be_image(file) and not is_hidden(file) and looks_like_image(store.head(path + file, FIRST_BYTES))


def excluded_kind(path: str, runs: list[str]) -> str | None:
    """How all files of a folder are counted if none of them can be data, because of what folder it is."""
    if path.startswith(tuple(runs)):
        return RUN_FILES
    if is_hidden(path):
        return "hidden files"
    system = next((piece for piece in path.split("/") if piece.casefold() in SYSTEM_FOLDERS), None)
    return None if system is None else f"files in {system}"


def is_run(path: str, files: list[str]) -> bool:
    """Whether a folder is that of a training run, perhaps one that has just begun."""
    if files == [LOCK]:
        return RUN_NAME.search(path) is not None
    return "recipe.json" in files and not RUN_RECORDS.isdisjoint(files) and not any(map(is_image_name, files))


def without_parents_of_runs(folders: list[Folder], runs: list[str]) -> list[Folder]:
    """The folders, without those that hold runs and no image, such as runs/: they are no empty classes."""
    parents = {run[: i + 1] for run in runs for i, letter in enumerate(run) if letter == "/"}
    with_images = {f.path[: i + 1] for f in folders if f.images for i, letter in enumerate(f.path) if letter == "/"}
    return [folder for folder in folders if folder.path not in parents - with_images]


def enter(tree: Tree, outer: str) -> Tree:
    """The tree below its folder ``outer``; images elsewhere are not in it."""
    prefix = f"{outer}/"
    below = [folder for folder in tree.folders if folder.path.startswith(prefix)]
    first = below[0].start
    moved = [Folder(f.path.removeprefix(prefix), f.start - first, f.stop - first) for f in below]
    return tree._replace(
        store=tree.store.subfolder(outer),
        folders=moved,
        images=tree.images.subset(slice(first, below[-1].stop)).without_prefix(prefix),
        others=without_prefix(tree.others, prefix),
        unreadable=without_prefix(tree.unreadable, prefix),
    )


def without_prefix(by_path: dict[str, T], prefix: str) -> dict[str, T]:
    return {path.removeprefix(prefix): value for path, value in by_path.items() if path.startswith(prefix)}


def file_kind(name: str) -> str:
    """How an ignored file is counted: by its extension, by its name if it has none, or as hidden."""
    return "hidden files" if is_hidden(name) else PurePosixPath(name).suffix.lower() or name
