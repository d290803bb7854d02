"""Which folders of a tree are parts (train, val, test), which are classes, and what has no labels."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from allmlp.data.folders.part_names import NOUN, PART_OF_WORD, find_parts
from allmlp.data.folders.walk import Tree
from allmlp.errors import UserError, printable

MAX_NAMED = 5  # folders in a message


class Contents(NamedTuple):
    """What a folder holds: how many images of its own, and which folders with images."""

    images: int
    folders: frozenset[str]


class Group(NamedTuple):
    """A part, or "all", whose class folders are those below ``prefix``, without the excluded ones."""

    part: str
    prefix: str  # "" or "train/"
    excluded: frozenset[str] = frozenset()


class Arrangement(NamedTuple):
    groups: list[Group]  # train first, or "all" alone
    unlabeled: list[str]  # folders of parts that hold images, but no class folders
    notes: list[str]


def arrange(tree: Tree, source: str) -> Arrangement:
    """Tells parts and classes apart, by the names of the folders and by what they hold.

    Raises:
        UserError: there are no class folders, one part twice, or folders that may be parts as well as classes.
    """
    tops = contents(tree, "")
    parts = find_parts(tops)
    labeled = {name: part for name, part in parts.items() if tops[name].folders}
    others = [name for name in tops if name not in parts]
    if labeled:
        check_unique(labeled, source)
        unlabeled = [name for name in parts if name not in labeled]
        if "train" not in labeled.values() and any(tops[name].folders & set(others) for name in labeled):
            groups = [Group("train", "", frozenset(parts))]
        else:
            groups = []
            for name in unlabeled:
                if parts[name] == "train":
                    raise no_classes(f"{source}/{name}", tops[name].images)
            check_lone_part(labeled, others, tops, source)
        groups += [Group(part, inner_prefix(tree, name, part)) for name, part in labeled.items()]
        return Arrangement(sorted(groups, key=lambda group: group.part != "train"), unlabeled, [])
    if not others:
        first = next(iter(parts), None)
        images = len(tree.images) if first is None else tops[first].images
        raise no_classes(source if first is None else f"{source}/{first}", images)
    called_train = [name for name in parts if name.casefold() == "train"]  # the vehicle
    unlabeled = [name for name in parts if name not in called_train]
    check_distinct({name: tops[name] for name in [*others, *called_train]}, source)
    notes = [f"the folder {name} counts as a class: it holds no class folders" for name in called_train]
    return Arrangement([Group("all", "", frozenset(unlabeled))], unlabeled, notes)


def contents(tree: Tree, prefix: str) -> dict[str, Contents]:
    """The folders directly below ``prefix`` that hold images, at any depth, and what they hold."""
    images: Counter[str] = Counter()
    folders: dict[str, set[str]] = {}
    for folder in tree.folders:
        if folder.images and folder.path.startswith(prefix) and folder.path != prefix:
            name, *below = folder.path.removeprefix(prefix).rstrip("/").split("/")
            images[name] += 0 if below else folder.images
            folders.setdefault(name, set()).update(below[:1])
    return {name: Contents(images[name], frozenset(folders[name])) for name in sorted(folders)}


def find_outer_folder(tree: Tree) -> str | None:
    """The only folder at the top with images, if it holds them in folders and is no part."""
    tops = contents(tree, "")
    if len(tops) != 1 or find_parts(tops):
        return None
    [(name, top)] = tops.items()
    return None if top.images else name


def inner_prefix(tree: Tree, name: str, part: str) -> str:
    """Below which folder the classes of a part lie: zips often hold seg_train/seg_train/, or train/images/."""
    prefix = f"{name}/"
    while True:
        inside = contents(tree, prefix)
        [inner, *more] = inside
        same = inner == name or find_parts([inner]) == {inner: part} or re.fullmatch(NOUN, inner.casefold())
        if more or not same or inside[inner].images or not inside[inner].folders:
            return prefix
        prefix += f"{inner}/"


def no_classes(location: str, images: int) -> UserError:
    return UserError(f"{location} holds {images} images but no class folders: put each class in a separate folder")


def check_unique(labeled: Mapping[str, str], source: str) -> None:
    for part in labeled.values():
        same = [name for name in labeled if labeled[name] == part]
        if len(same) > 1:
            raise UserError(
                f"{source} has the folders {' and '.join(map(printable, same))} for the same split, {part}: keep one "
                "of them"
            )


def check_lone_part(labeled: Mapping[str, str], others: list[str], tops: Mapping[str, Contents], source: str) -> None:
    """Raises a UserError if the only part has the folders of a folder beside it: it may be a class, or that a part."""
    for name in labeled if len(labeled) == 1 else ():
        alike = [other for other in others if tops[other].folders == tops[name].folders and len(tops[name].folders) > 1]
        if alike:
            raise may_be_parts([name, *alike], tops[name].folders, source)


def check_distinct(classes: Mapping[str, Contents], source: str) -> None:
    """Raises a UserError if all classes hold the same folders, since they are parts then, with names of their own."""
    if len(classes) < 2 or any(found.images for found in classes.values()):
        return
    held = [found.folders for found in classes.values()]
    shared, either = frozenset.intersection(*held), frozenset.union(*held)
    if len(shared) > 1 and 2 * len(shared) >= len(either):
        raise may_be_parts(classes, shared, source)


def may_be_parts(names: Iterable[str], shared: frozenset[str], source: str) -> UserError:
    first, *_ = names = list(names)
    if shared <= PART_OF_WORD.keys():
        return UserError(
            f"the folders {listed(names)} of {source} hold {listed(shared)} each: put the parts outermost, as in "
            f"{min(shared)}/{printable(first)}"
        )
    return UserError(
        f"the folders {listed(names)} of {source} hold the same folders ({listed(shared)}), so they may be parts or "
        f"classes: call parts train, val and test, or give one of them as the data ({source}/{printable(first)}); "
        "for classes, give the folders inside them different names"
    )


def listed(names: Iterable[str]) -> str:
    """The first names, escaped, and how many more there are."""
    escaped = [printable(name) for name in sorted(names)]
    return ", ".join(escaped[:MAX_NAMED]) + (f" and {len(escaped) - MAX_NAMED:,} more" if escaped[MAX_NAMED:] else "")
