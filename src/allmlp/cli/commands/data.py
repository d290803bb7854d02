"""mixer data inspect, mixer data dedup"""

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from allmlp.cli.arguments import parse
from allmlp.cli.docstrings import help_from_docstrings
from allmlp.errors import UserError, printable
from allmlp.files import to_json

if TYPE_CHECKING:
    from allmlp.inspection.contents import Contents

HELP = """usage: mixer data inspect SOURCE [OPTIONS]
       mixer data dedup SOURCE --against SOURCE… [OPTIONS]

inspect: what is in a data set: classes, sizes, formats, unreadable files, duplicates
dedup:   lists the images of a data set that are also test images of others, for --exclude

examples: mixer data inspect photos/ --page photos.html
          mixer data dedup photos/ --against cifar10 pets --out removals.csv

mixer data inspect --help and mixer data dedup --help show the options; both print one JSON object with --json."""
MAX_ROWS = 30  # of a table

Source = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="SOURCE",
        help="A name (digits, cifar10, …), a folder of images, or a .zip of one.",
        help_behavior_hint="(required)",
    ),
]


@dataclass(frozen=True, kw_only=True)
@help_from_docstrings
class InspectArguments:
    source: Source
    page: Path | None = None
    """Also write an HTML page to this file, with examples and the pairs of duplicates."""
    exclude: str | None = None
    """A file that lists images to leave out, one name a line or CSV, such as mixer data dedup writes."""
    max_pixels: int = 64_000_000
    """Largest image that is read, in pixels; larger ones count as unreadable."""
    json: bool = False
    """Print one JSON object, with all pairs of duplicates."""


@dataclass(frozen=True, kw_only=True)
@help_from_docstrings
class DedupArguments:
    source: Source
    against: tuple[str, ...]
    """SOURCEs whose test images are compared with; may name SOURCE itself."""
    part: Literal["train", "val", "test", "all"] = "train"
    """Images of SOURCE to look through."""
    out: Path = Path("removals.csv")
    """The list to write: train on SOURCE with --exclude and this file."""
    exact: bool = False
    """Only images with the same file or the same pixels, not those that look the same."""
    max_pixels: int = 64_000_000
    """Largest image that is read, in pixels; larger ones count as unreadable."""
    json: bool = False
    """Print one JSON object."""


INSPECT = """Reads every image of a data set once, and says what is in it.

examples: mixer data inspect photos/ --page photos.html
          mixer data inspect cifar10"""
DEDUP = """Lists the images of a data set that are also test images of others, to train without them.

example: mixer data dedup photos/ --against cifar10 pets --out removals.csv
         mixer train photos/ --exclude removals.csv

The paper de-duplicates its pre-training data in this way (Section 3)."""


def run(args: Sequence[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(HELP)
    elif args[0] == "inspect":
        inspect(parse(InspectArguments, args[1:], command="data inspect", description=INSPECT))
    elif args[0] == "dedup":
        dedup(parse(DedupArguments, args[1:], command="data dedup", description=DEDUP))
    else:
        near = difflib.get_close_matches(args[0], ("inspect", "dedup"), 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"mixer data {args[0]}: {hint}there are inspect and dedup (mixer data --help)")


def inspect(arguments: InspectArguments) -> None:
    check_folder("--page", arguments.page)
    from allmlp.api.progress import progress_bar
    from allmlp.data.sources import load_source
    from allmlp.inspection import contents
    from allmlp.inspection.inspection_page import write_inspection_page

    splits = load_source(
        arguments.source,
        val_fraction=0.0,
        test_fraction=0.0,
        max_pixels=arguments.max_pixels,
        exclude=arguments.exclude,
    )
    with progress_bar() as bar:
        found = contents.inspect(splits, lambda done, total: bar.update(done, total, f"{done:,} of {total:,} images"))
    if arguments.page is not None:
        write_inspection_page(arguments.page, found)
    if arguments.json:
        print(to_json(found.to_json_object()))
        return
    print_contents(found)
    if arguments.page is not None:
        print(f"page     {arguments.page}")


def print_contents(found: "Contents") -> None:
    from allmlp.cli.display import print_table
    from allmlp.inspection.contents import count_duplicates

    described, total, classes = found.to_json_object(), found.total, found.splits.classes
    parts = ", ".join(f"{counts.sum():,} {part}" for part, counts in found.counts.items())
    print(f"{found.splits.description}: {total.sum():,} images ({parts}) of {len(classes):,} classes")
    print(
        f"commonest class {printable(described['largest_class'])}, {described['commonest_share']:.1%} of the images; "
        f"the largest class has {described['imbalance']:.1f} times the images of the smallest"
    )
    for name, (least, median, most) in described["sizes"].items():
        print(f"{name} from {least} to {most} pixels, median {median}")
    if described["kinds"]:
        print("stored as " + ", ".join(f"{kind} ({count:,})" for kind, count in described["kinds"].items()))
    for remark in found.splits.remarks():
        print(remark)
    order = (-total).argsort(kind="stable")[:MAX_ROWS].tolist()
    rows = [[classes[k], *(f"{counts[k]:,}" for counts in found.counts.values())] for k in order]
    title = "classes" if len(order) == len(classes) else f"the {len(order)} largest of {len(classes):,} classes"
    print_table(title, ["class", *found.counts], rows)
    if found.table.unreadable:
        print(f"{len(found.table.unreadable):,} images cannot be read:")
        for reason in list(found.table.unreadable.values())[:MAX_ROWS]:
            print(f"  {printable(reason)}")
    duplicates = found.duplicates()
    if not duplicates:
        print("no duplicates")
        return
    rows = [
        [kind, *(f"{count:,}" for count in counts.values())] for kind, counts in count_duplicates(duplicates).items()
    ]
    print_table(
        f"duplicates: pairs of images, in {len(found.groups):,} groups",
        ["how", "pairs", "across parts", "under two classes"],
        rows,
    )
    worst = sorted(duplicates, key=lambda one: (not one.across_parts, not one.two_classes))[:MAX_ROWS]
    rows = [[one.kind, *(f"{p.part}, {p.label}: {p.name}" for p in (one.first, one.second))] for one in worst]
    title = f"{len(worst)} of {len(duplicates):,} pairs (--json lists all, --page shows them)"
    print_table(title, ["how", "first", "second"], rows, names=3)


def dedup(arguments: DedupArguments) -> None:
    check_folder("--out", arguments.out)
    if not arguments.against:
        raise UserError("--against names no source: give those whose test images are compared with")
    from allmlp.api.progress import progress_bar
    from allmlp.cli.display import describe_unreadable, print_table
    from allmlp.data.duplicates.removals import write_removals
    from allmlp.data.sources import load_source
    from allmlp.inspection.dedup import find_removals

    options = {"val_fraction": 0.0, "test_fraction": 0.0, "max_pixels": arguments.max_pixels}
    images = load_source(arguments.source, **options).split(arguments.part)
    tests = []
    for source in arguments.against:
        splits = load_source(source, **options)
        if "test" not in splits.splits:
            raise UserError(f"--against {source}: it has no test part to compare with; name a source that has one")
        if source == arguments.source and arguments.part in ("test", "all"):
            raise UserError(
                f"--against {source} with --part {arguments.part}: each test image would be its own duplicate"
            )
        tests.append((source, splits.split("test")))
    with progress_bar() as bar:
        removals, tables = find_removals(
            images, tests, arguments.exact, lambda source, done, total: bar.update(done, total, f"reading {source}")
        )
    write_removals(arguments.out, removals)
    by_source = {source: sum(one.source == source for one in removals) for source in arguments.against}
    if arguments.json:
        found = {
            "data": arguments.source,
            "images": len(images),
            "removals": len(removals),
            "by_source": by_source,
            "list": [one._asdict() for one in removals],
            "out": str(arguments.out),
        }
        print(to_json(found))
    else:
        print(f"{len(removals):,} of {len(images):,} images of {arguments.source} are test images of others too")
        rows = [[source, f"{len(test):,}", f"{by_source[source]:,}"] for source, test in tests]
        print_table("compared with", ["source", "test images", "found"], rows)
        print(f"list     {arguments.out}")
        if removals:
            print(f"use      mixer train --data {arguments.source} --exclude {arguments.out}")
    unreadable = dict.fromkeys(name for _, table in tables for name in table.unreadable)
    if unreadable:
        print(describe_unreadable(list(unreadable)), file=sys.stderr)


def check_folder(option: str, path: Path | None) -> None:
    if path is not None and not path.parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}; create it first")
