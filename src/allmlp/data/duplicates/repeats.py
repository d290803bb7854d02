"""A quick look at the files of a data set before training: images in two parts, and images under two classes."""

from collections.abc import Iterator, Mapping

from allmlp.data.dataset import ImageDataset
from allmlp.errors import printable

Pair = tuple[str, str]  # names of images
Place = tuple[str, int]  # part, and position in it

MAX_IMAGES = 200_000  # with more, reading all files would delay a run
REMEDY = "list all with mixer data inspect {source}, and remove the wrong ones, or name them in a file for --exclude"


def describe_repeats(parts: Mapping[str, ImageDataset], source: str) -> list[str]:
    """Warnings, one line each, of images with the same content: held-out ones that are trained on, and two classes.

    Args:
        parts: "train" and others, with the same classes.
        source: the name of the data, for the remedy.
    """
    total = sum(map(len, parts.values()))
    if total > MAX_IMAGES:
        return [
            f"{total:,} images are too many to look for duplicates before a run: mixer data inspect {source} does it"
        ]
    across: dict[str, list[Pair]] = {}
    two_classes: list[Pair] = []
    for (first_part, first), (part, index) in repeated(parts):
        pair = parts[first_part].names[first], parts[part].names[index]
        if first_part != part:
            across.setdefault(f"{part} images are {first_part} images too", []).append(pair)
        if parts[first_part].labels[first] != parts[part].labels[index]:
            two_classes.append(pair)
    if two_classes:
        across["images are under two classes"] = two_classes
    remedy = REMEDY.format(source=source)
    return [
        f"{len(pairs):,} {what} (the same file), such as {' and '.join(map(printable, pairs[0]))}: {remedy}"
        for what, pairs in across.items()
    ]


def repeated(parts: Mapping[str, ImageDataset]) -> Iterator[tuple[Place, Place]]:
    """The first place of each image that is there again, and the other place; files are read whole where needed."""
    outlines: dict[bytes, list[Place]] = {}
    for part, dataset in parts.items():
        for index in range(len(dataset)):
            if outline := dataset.outline(index):
                outlines.setdefault(outline, []).append((part, index))
    for places in outlines.values():
        if len(places) == 1:
            continue
        first: dict[bytes, Place] = {}
        for part, index in places:
            if content := parts[part].content(index):
                if content in first:
                    yield first[content], (part, index)
                else:
                    first[content] = part, index
