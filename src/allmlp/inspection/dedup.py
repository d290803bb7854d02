"""Images of one source that are also test images of others: what to leave out before training on it.

As the paper de-duplicates its pre-training data against the test sets of the downstream tasks (Section 3).
"""

from collections.abc import Callable, Sequence

from allmlp.data.dataset import ImageDataset
from allmlp.data.duplicates.matching import matches_between
from allmlp.data.duplicates.removals import Removal
from allmlp.data.duplicates.signatures import Signatures, sign_all

OnProgress = Callable[[str, int, int], None]  # (source, images done, images of it)


def find_removals(
    images: ImageDataset, tests: Sequence[tuple[str, ImageDataset]], exact: bool, on_progress: OnProgress
) -> tuple[list[Removal], list[tuple[str, Signatures]]]:
    """The images to remove, each once, and the tables of signatures, the first that of the images themselves.

    Args:
        images: those to look through.
        tests: (source, its test images) to compare with.
        exact: only the same files and pixels.
        on_progress: called while images are read.

    Raises:
        UserError: imagehash is not installed.
        RunError: the folder or zip of a source is gone.
    """
    table = sign_all(images, lambda done, total: on_progress("the images", done, total))
    tables = [("", table)]
    found: dict[str, Removal] = {}
    for source, test in tests:
        other = sign_all(test, lambda done, total, source=source: on_progress(source, done, total))
        tables.append((source, other))
        for row, match, kind in matches_between(table, other):
            if not (exact and kind == "looks the same"):
                found.setdefault(table.name(row), Removal(table.name(row), kind, source, other.name(match)))
    return [found[name] for name in sorted(found)], tables
