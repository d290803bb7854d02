"""Duplicates that are planted in CIFAR-10 and found again, false ones, and those that CIFAR-10 itself has.

    python benchmarks/duplicates.py --cifar10 cifar10.zip --sheet sheet.png      # eight minutes on two cores

For each seed, 6,000 of its 60,000 images are added once more: 2,000 as the same bytes, 2,000 encoded anew (JPEG of
quality 50 to 95, or PNG), 2,000 resized (20 to 128 pixels, bilinear, bicubic or Lanczos; JPEG of quality 90, or PNG).
A copy is found if it is paired with its original. The images that are not planted are judged by pixels that the
search does not compare: the correlation of the details (the image less its blur) of the two originals at full
resolution, the best of all shifts up to 5 pixels and scales up to 1.2. From 0.6 on a pair counts as a true near
duplicate, below 0.45 as a false one, between as undecided; random pairs show what chance reaches. An image of a false
or undecided pair is falsely flagged. At the end, the pairs of CIFAR-10 itself that wider limits of the search would
find are judged in the same way.
"""

import argparse
import io
import math
import resource
import tempfile
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from common import machine, print_table, write_results
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from allmlp.data.dataset import ImageDataset
from allmlp.data.duplicates import matching
from allmlp.data.duplicates.matching import Match, clusters, matches_between, matches_within
from allmlp.data.duplicates.signatures import Signatures, sign_all
from allmlp.data.sources import load_source
from allmlp.data.stores import ZipStore
from allmlp.device import available_cores

Pair = tuple[int, int]  # positions of originals, the lesser first
FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
SIDES = [side for side in range(20, 129) if side != 32]
SHIFTS, SCALES = range(-5, 6), (1 / 1.2, 1 / 1.12, 1 / 1.06, 1.0, 1.06, 1.12, 1.2)
TRUE, FALSE = 0.6, 0.45  # correlations of details
ASKED = {"same bytes": 1.0, "encoded anew": 0.99, "resized": 0.95}


class Planted(NamedTuple):
    """A copy of an image."""

    kind: str
    detail: str  # what was done, for the results
    original: int
    data: bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", required=True, help="CIFAR-10 as image files: a folder or zip of train/ and test/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--planted", type=int, default=2000, help="of each kind; fewer to try the script")
    parser.add_argument("--sheet", type=Path, help="PNG to write, with a pair of each of twenty groups CIFAR-10 has")
    options = parser.parse_args()

    start = time.perf_counter()
    splits = load_source(options.cifar10, val_fraction=0.0, test_fraction=0.0)
    images = splits.split("all")
    loaded = time.perf_counter()
    table = sign_all(images)
    signed = time.perf_counter()
    own = matches_within(table)
    matched = time.perf_counter()
    if len(table) != len(images) or images.raw(0) is None:
        raise SystemExit(f"{options.cifar10}: not all of it are image files that can be read")
    seconds = {"list": loaded - start, "sign": signed - loaded, "match": matched - signed, "all": matched - start}
    search = {
        "images": len(images),
        "cores": available_cores(),
        "seconds": {step: round(value, 1) for step, value in seconds.items()},
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }
    print(f"{len(images):,} images on {search['cores']} cores: {search['seconds']} s", flush=True)

    with ProcessPoolExecutor(2, mp_context=get_context("fork"), initializer=use, initargs=(images,)) as pool:
        runs = []
        for seed in options.seeds:
            runs.append(plant_and_find(table, seed, options.planted, pool))
            print(f"seed {seed}: {runs[-1]['recall']}", flush=True)
        random_pairs = np.random.default_rng(0).integers(0, len(images), (2000, 2)).tolist()
        chance = np.array(list(pool.map(correlation, random_pairs, chunksize=50)))
        judged = judge([(one.first, one.second) for one in own], pool)
        limits = try_limits(table, len(splits.splits["train"]), pool)
    own_pairs = describe_own(own, judged, images, len(splits.splits["train"]))
    results = {
        "machine": machine(torch.device("cpu")),
        "search": search,
        "runs": runs,
        "random_pairs": {"pairs": len(chance), "largest": np.sort(chance)[:-4:-1].round(3).tolist()},
        "limits": limits,
        "own": own_pairs,
    }
    write_results("duplicates", results)
    show(results)
    if options.sheet is not None:
        write_sheet(options.sheet, own, images)


# Planting and finding


def plant(images: ImageDataset, seed: int, count: int) -> list[Planted]:
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(images))[: 3 * count].tolist()
    planted = []
    for number, index in enumerate(chosen):
        kind = list(ASKED)[number // count]
        data = images.raw(index)
        assert data is not None
        detail, image, quality = "", images.read(index), int(rng.integers(50, 96))
        if kind == "resized":
            side, how, quality = int(rng.choice(SIDES)), FILTERS[rng.integers(3)], 90
            image = image.resize((side, side), how)
            detail = f"{'20 to 31' if side < 32 else '33 to 64' if side <= 64 else '65 to 128'} px, "
        if kind != "same bytes":
            file, form = io.BytesIO(), ("JPEG", "PNG")[number % 2]
            image.save(file, form, quality=quality)
            data, detail = file.getvalue(), detail + form
        planted.append(Planted(kind, detail or "file", index, data))
    return planted


def sign_planted(planted: Sequence[Planted]) -> Signatures:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "planted.zip"
        names = [f"{i}.jpg" for i in range(len(planted))]
        with zipfile.ZipFile(path, "w") as file:
            for name, one in zip(names, planted, strict=True):
                file.writestr(name, one.data)
        labels = np.zeros(len(names), dtype=np.int64)
        return sign_all(ImageDataset(store=ZipStore(path), names=names, labels=labels, classes=("planted",)))


def joined(first: Signatures, second: Signatures) -> Signatures:
    """One table of both, for matching alone: its dataset is the first one's."""
    arrays = {
        name: np.concatenate([getattr(first, name), getattr(second, name)])
        for name in ("files", "pixels", "codes", "thumbnails", "sizes")
    }
    return replace(first, indices=np.arange(len(first) + len(second)), kinds=first.kinds + second.kinds, **arrays)


def plant_and_find(table: Signatures, seed: int, count: int, pool: ProcessPoolExecutor) -> dict:
    """Recall by kind, within one data set and against another, and false pairs."""
    planted = plant(table.dataset, seed, count)
    copies = sign_planted(planted)
    assert len(copies) == len(planted), copies.unreadable
    originals = np.concatenate([np.arange(len(table)), [one.original for one in planted]])
    start = time.perf_counter()
    within = matches_within(joined(table, copies))
    matched = time.perf_counter()
    between = matches_between(copies, table)
    pairs = {(one.first, one.second) for one in within}
    direct = [(one.original, len(table) + row) in pairs for row, one in enumerate(planted)]
    removed = {one.first for one in between if planted[one.first].original == one.second}
    # of two copies or of originals alike, any two: the originals tell whether the pair is a true one
    sources = [tuple(sorted((int(originals[one.first]), int(originals[one.second])))) for one in within]
    judged = judge([pair for pair in sources if pair[0] != pair[1]], pool)
    wrong: dict[str, set[int]] = {"false": set(), "undecided": set()}
    listed: dict[str, set[str]] = defaultdict(set)
    for one, pair in zip(within, sources, strict=True):
        if (verdict := verdict_of(judged.get(pair, 1.0))) != "true":
            wrong[verdict] |= {one.first, one.second}
            listed[verdict].add(describe_pair(table.dataset, pair, judged[pair]))
    flagged = {row for one in within for row in (one.first, one.second)}
    return {
        "seed": seed,
        "match_seconds": round(matched - start, 1),
        "recall": recall(planted, direct, lambda one: one.kind),
        "recall_against": recall(planted, [row in removed for row in range(len(planted))], lambda one: one.kind),
        "recall_by_form": recall(planted, direct, lambda one: f"{one.kind}: {one.detail}"),
        "images": len(originals),
        "images_flagged": len(flagged),
        "images_in_false_pairs": len(wrong["false"]),
        "images_in_undecided_pairs": len(wrong["undecided"] - wrong["false"]),
        "share_falsely_flagged": len(wrong["false"] | wrong["undecided"]) / len(originals),
        "false_pairs": sorted(listed["false"]),
        "undecided_pairs": sorted(listed["undecided"]),
    }


def recall(planted: Sequence[Planted], found: Sequence[bool], group_of: Callable[[Planted], str]) -> dict[str, float]:
    groups: dict[str, list[bool]] = {}
    for one, hit in zip(planted, found, strict=True):
        groups.setdefault(group_of(one), []).append(hit)
    return {group: float(np.mean(hits)) for group, hits in sorted(groups.items())}


# The judge: full resolution, details alone

dataset: ImageDataset  # in the processes of the pool


def use(images: ImageDataset) -> None:
    global dataset
    dataset = images


@cache
def pixels(index: int) -> np.ndarray:
    return np.asarray(dataset.read(index)).astype(np.float32)


def correlation(pair: Pair) -> float:
    """The best correlation of the details of two images, of all shifts and scales of the second."""
    base, other = (pixels(index) for index in pair)
    size = len(base)
    return max(aligned(base, scaled(other, round(size * scale))) for scale in SCALES)


def scaled(image: np.ndarray, side: int) -> np.ndarray:
    channels = [Image.fromarray(image[..., k]).resize((side, side), Image.Resampling.BICUBIC) for k in range(3)]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)


def aligned(base: np.ndarray, other: np.ndarray) -> float:
    best, middle = -1.0, (len(base) - len(other)) // 2
    for top in SHIFTS:
        for left in SHIFTS:
            rows, other_rows = overlap(len(base), len(other), middle + top)
            columns, other_columns = overlap(len(base), len(other), middle + left)
            a, b = details(base[rows, columns]), details(other[other_rows, other_columns])
            best = max(best, float((a * b).sum()) / math.sqrt(float((a * a).sum() * (b * b).sum()) + 1e-9))
    return best


def overlap(size: int, other: int, offset: int) -> tuple[slice, slice]:
    begin, end = max(offset, 0), min(size, offset + other)
    return slice(begin, end), slice(begin - offset, end - offset)


def details(image: np.ndarray) -> np.ndarray:
    fine = image - gaussian_filter(image, (1.5, 1.5, 0))
    return fine - fine.mean((0, 1))


def judge(pairs: Sequence[Pair], pool: ProcessPoolExecutor) -> dict[Pair, float]:
    """Of each pair of originals, the correlation; those of earlier calls are remembered."""
    new = sorted(set(pairs) - remembered.keys())
    remembered.update(zip(new, pool.map(correlation, new, chunksize=20), strict=True))
    return {pair: remembered[pair] for pair in pairs}


remembered: dict[Pair, float] = {}


def verdict_of(correlated: float) -> str:
    return "true" if correlated >= TRUE else "false" if correlated < FALSE else "undecided"


# What CIFAR-10 itself has


def describe_own(own: Sequence[Match], judged: dict[Pair, float], images: ImageDataset, train: int) -> dict:
    """``train``: how many of the images, the first, are the training part."""
    where = {one: ("train", "across", "test")[(one.first >= train) + (one.second >= train)] for one in own}
    groups = clusters(own, len(images))
    across = [one for one in own if where[one] == "across"]
    return {
        "pairs": len(own),
        "by_kind": dict(Counter(one.kind for one in own)),
        "within_train": sum(place == "train" for place in where.values()),
        "within_test": sum(place == "test" for place in where.values()),
        "test_against_train": len(across),
        "test_images_in_train": len({one.second for one in across}),
        "under_two_classes": sum(bool(images.labels[one.first] != images.labels[one.second]) for one in own),
        "groups": len(groups),
        "largest_group": max(map(len, groups), default=0),
        "verdicts": dict(Counter(verdict_of(judged[one.first, one.second]) for one in own)),
        "list": [describe_pair(images, one[:2], judged[one[:2]]) for one in own],
    }


def describe_pair(images: ImageDataset, pair: Pair, correlated: float) -> str:
    return f"{images.names[pair[0]]} | {images.names[pair[1]]} | {correlated:.2f}"


def try_limits(table: Signatures, train: int, pool: ProcessPoolExecutor) -> list[dict]:
    """CIFAR-10's own pairs with other limits of the bits and of the thumbnails' difference, judged."""
    bits, differences = (6, 8, 10, 12), (0.2, 0.3, 0.35, 0.4, 0.5)
    usual, matching.MAX_BITS = matching.MAX_BITS, max(bits)
    found = []
    for i, j in matching.candidates(table.codes, table.codes, same=True):
        apart = matching.difference(table.thumbnails[i], table.thumbnails[j])
        near = apart < max(differences)
        i, j = i[near], j[near]
        differing = np.bitwise_count(table.codes[i] ^ table.codes[j])
        found += zip(*(column.tolist() for column in (i, j, differing, apart[near])), strict=True)
    matching.MAX_BITS = usual
    judged = judge([(i, j) for i, j, _, _ in found], pool)
    rows = []
    for most_bits in bits:
        for most in differences:
            pairs = [(i, j) for i, j, differing, apart in found if differing <= most_bits and apart < most]
            verdicts = {pair: verdict_of(judged[pair]) for pair in pairs}
            wrong = {row for pair, verdict in verdicts.items() if verdict == "false" for row in pair}
            counts = Counter(verdicts.values())
            rows.append(
                {
                    "bits": most_bits,
                    "difference": most,
                    **{verdict: counts[verdict] for verdict in ("true", "undecided", "false")},
                    "images_in_false_pairs": len(wrong),
                    "test_images_in_train": len({j for i, j in pairs if i < train <= j and verdicts[i, j] == "true"}),
                }
            )
    return rows


def write_sheet(path: Path, own: Sequence[Match], images: ImageDataset, count: int = 20, zoom: int = 5) -> None:
    """One random pair of each of ``count`` random groups."""
    rng = np.random.default_rng(0)
    groups = clusters(own, len(images))
    chosen = [groups[k] for k in sorted(rng.permutation(len(groups))[:count].tolist())]
    side, columns = 32 * zoom, 4
    sheet = Image.new("RGB", (columns * (2 * side + 20), -(-count // columns) * (side + 30)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, group in enumerate(chosen):
        inside = [one for one in own if one.first in group]
        one = inside[rng.integers(len(inside))]
        left, top = number % columns * (2 * side + 20), number // columns * (side + 30)
        for k, row in enumerate((one.first, one.second)):
            sheet.paste(images.read(row).resize((side, side), Image.Resampling.NEAREST), (left + k * side, top))
            draw.text((left + k * side, top + side), images.names[row], fill="black")
    sheet.save(path)


def show(results: dict) -> None:
    runs, search, own = results["runs"], results["search"], results["own"]
    rows = []
    for kind, asked in ASKED.items():
        found = [[run[key][kind] for run in runs] for key in ("recall", "recall_against")]
        rows.append([kind, f">= {asked:.0%}", *(f"{min(values):.2%} to {max(values):.2%}" for values in found)])
    print_table(["planted", "asked", "found within", "found against"], rows)
    forms = sorted({form for run in runs for form in run["recall_by_form"]})
    print_table(["form", "least"], [[form, f"{min(r['recall_by_form'][form] for r in runs):.2%}"] for form in forms])
    for run in runs:
        counts = f"{run['images_in_false_pairs']} in false, {run['images_in_undecided_pairs']} in undecided pairs"
        share = f"{run['share_falsely_flagged']:.4%} of {run['images']:,}"
        print(f"seed {run['seed']}: falsely flagged {share} images ({counts}; asked: at most 0.1%)")
    for pair in unique(pair for run in runs for pair in run["false_pairs"]):
        print(f"  false: {pair}")
    for pair in unique(pair for run in runs for pair in run["undecided_pairs"]):
        print(f"  undecided: {pair}")
    chance = results["random_pairs"]
    print(f"largest correlations of {chance['pairs']:,} random pairs: {chance['largest']}")
    print(
        f"{search['images']:,} images: {search['seconds']} s on {search['cores']} cores, {search['peak_memory_mb']} MB"
    )
    rows = [[str(value) for value in row.values()] for row in results["limits"]]
    print_table(list(results["limits"][0]), rows)
    print("CIFAR-10 itself: " + ", ".join(f"{key} {value}" for key, value in own.items() if key != "list"))


def unique(items: Iterable[str]) -> list[str]:
    return sorted(set(items))


if __name__ == "__main__":
    main()
