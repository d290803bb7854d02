"""Memory and time that the names and labels of many images take: 2 ranks with 4 loader processes each. Linux.

    python benchmarks/many_files.py                      # 10,000,000 images, nine minutes on two shared cores
    python benchmarks/many_files.py --images 1000000

The images are names alone: ``os.walk`` is replaced by one that makes up 1,000 class folders, and opening an image by a
constant picture. Memory is the proportional set size (PSS) of all ten processes, summed every 0.2 s: memory that
several share counts once. What the names take is its difference to that with 10,000 images. The walk itself is timed
on a real tree of 200,000 empty files.
"""

import argparse
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common import machine, print_table, write_results
from PIL import Image

from allmlp.config.recipe import DataRecipe, Recipe
from allmlp.data.loader import training_batches
from allmlp.data.sources import load_source
from allmlp.data.stores import FolderStore
from allmlp.data.transforms import TrainingTransform
from allmlp.distributed.context import init_distributed
from allmlp.metadata import Preprocessing
from allmlp.runs.resume import fingerprint
from allmlp.training.build import build_data

RANKS, WORKERS, CLASSES = 2, 4, 1000
PICTURE = Image.new("RGB", (4, 4))


def made_up_walk(root: str, **_: object) -> Iterator[tuple[str, list[str], list[str]]]:
    """As ``os.walk``, of class folders with names like those of ImageNet."""
    folders = [f"n{i:08d}" for i in range(CLASSES)]
    yield str(root), folders, []
    for folder in folders:
        yield f"{root}/{folder}", [], [f"{folder}_{i}.JPEG" for i in range(int(os.environ["IMAGES"]) // CLASSES)]


if "IMAGES" in os.environ:  # here, so that it holds in spawned loader processes too
    os.walk = made_up_walk
    FolderStore.open = lambda *_: PICTURE


def run_rank(root: str, start_method: str) -> None:
    """Prints the seconds of each phase as JSON, waits for a line on standard input, and ends."""
    multiprocessing.set_start_method(start_method)
    with init_distributed(600, "cpu") as context:
        start = time.perf_counter()
        data = build_data(Recipe(data=DataRecipe(data=root, val_fraction=0.01, test_fraction=0.01)), context)
        built = time.perf_counter()
        fingerprint(data)
        hashed = time.perf_counter()
        transform = TrainingTransform(
            image_size=(4, 4), preprocessing=Preprocessing(), crop="none", crop_padding=0, flip=False
        )
        options = {"batch_size": 256, "steps": 40, "seed": 0, "workers": WORKERS, "rank": context.rank}
        batches = iter(training_batches(data.split("train"), transform, world_size=RANKS, **options))
        next(batches)
        started = time.perf_counter()
        for _ in range(20):
            next(batches)
        context.all_gather(None)
        seconds = {"data": built - start, "fingerprint": hashed - built, "first batch": started - hashed}
        print(json.dumps(seconds), flush=True)
        sys.stdin.readline()
        del batches
        context.all_gather(None)


def measure(images: int, start_method: str) -> tuple[dict[str, float], float, float]:
    """Seconds of each phase, and bytes of all processes: at most, and at the end."""
    with tempfile.TemporaryDirectory() as root, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"IMAGES": str(images), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "OMP_NUM_THREADS": "1"}
        free.close()
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank", root, "--start-method", start_method],
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(RANKS)
        ]
        peak, last, output = 0.0, 0.0, ranks[0].stdout
        assert output is not None
        os.set_blocking(output.fileno(), False)
        while not (line := output.readline()):
            if any(rank.poll() is not None for rank in ranks):
                raise SystemExit("a rank ended early")
            last = sum(proportional_set_size(pid) for rank in ranks for pid in tree(rank.pid))
            peak = max(peak, last)
            time.sleep(0.2)
        last = sum(proportional_set_size(pid) for rank in ranks for pid in tree(rank.pid))
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.write("\n")
            rank.stdin.flush()
        for rank in ranks:
            rank.wait()
    return json.loads(line), max(peak, last), last


def tree(pid: int) -> list[int]:
    """The process and its descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(below for child in children for below in tree(int(child)))]


def proportional_set_size(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def walk_real_files(files: int) -> float:
    """Seconds that it takes to find empty files in 1,000 class folders, once they were listed."""
    with tempfile.TemporaryDirectory() as root:
        for i in range(CLASSES):
            (Path(root) / f"n{i:08d}").mkdir()
            for k in range(files // CLASSES):
                (Path(root) / f"n{i:08d}" / f"{k}.JPEG").touch()
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            load_source(root, val_fraction=0.0, test_fraction=0.0)
            seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000_000)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--start-method", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        run_rank(options.rank, options.start_method)
        return
    found: dict[str, dict[str, float]] = {}
    for start_method in ("fork", "spawn"):
        _, few_peak, few = measure(10_000, start_method)
        seconds, peak, last = measure(options.images, start_method)
        found[start_method] = {
            **{f"{phase}, s": round(value, 2) for phase, value in seconds.items()},
            "peak, GB": round(peak / 1e9, 3),
            "peak above that of 10,000, GB": round((peak - few_peak) / 1e9, 3),
            "while training, above that of 10,000, GB": round((last - few) / 1e9, 3),
        }
    walked = round(walk_real_files(200_000), 2)
    results = {"images": options.images, "ranks": RANKS, "workers": WORKERS, "walk of 200,000 files, s": walked}
    write_results("many_files", machine(torch.device("cpu")) | results | found)
    print(f"{options.images:,} images, {RANKS} ranks with {WORKERS} loader processes each")
    print_table(["", *found], [[key, *(str(one[key]) for one in found.values())] for key in found["fork"]])
    print(f"walk of a real tree of 200,000 files: {walked} s")


if __name__ == "__main__":
    main()
