"""make chaos: breaks runs in every way that docs/runs.md covers, by a seed, and prints a table of what passed.

``--rows 1 3`` checks only these rows of the table.
"""

import argparse
import logging
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import rows
from harness import Lab, Result

Row = tuple[str, Callable[[Lab, random.Random, int], Result], int]  # title, check, trials
ROWS: dict[int, list[Row]] = {
    1: [("SIGKILL, one process", lambda lab, rng, n: rows.killed(lab, rng, n, "1 process"), 20)],
    2: [
        ("SIGKILL of a rank, 2 DDP", lambda lab, rng, n: rows.killed(lab, rng, n, "2 DDP"), 10),
        ("SIGKILL of a rank, 2 FSDP2", lambda lab, rng, n: rows.killed(lab, rng, n, "2 FSDP2"), 10),
    ],
    3: [("SIGKILL during a save", rows.killed_during_save, 99)],
    4: [("0, 2, 4 workers", rows.other_workers, 3)],
    5: [("4 ranks, then 2 and 1", rows.other_ranks, 2)],
    6: [("2 ranks against 1, float64", rows.two_ranks_against_one, 1)],
    7: [("SIGTERM", rows.terminated, 99)],
    8: [("a rank stopped, hanging, failing", rows.stuck, 99)],
    9: [("disk full, read-only", rows.unwritable_disk, 4)],
    10: [("a flipped bit", rows.flipped_bit, 5)],
    11: [("NaN on one rank", rows.nan_loss, 2)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS))
    parser.add_argument("--trials", type=int, help="at most this many trials per row")
    options = parser.parse_args()
    lines, failed = [], 0
    logging.getLogger("allmlp").addHandler(logging.NullHandler())  # warnings about the damage done here
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        lab = Lab(Path(folder))
        for number in options.rows:
            for title, check, trials in ROWS[number]:
                start = time.perf_counter()
                limit = min(trials, options.trials or trials)
                result = check(lab, random.Random(f"{options.seed}/{title}"), limit)
                seconds = time.perf_counter() - start
                failed += result.trials - result.passed
                remark = result.remarks[0].splitlines()[0][:120] if result.remarks else ""
                line = f"| {number} | {title} | {result.passed} of {result.trials} | {seconds:.0f} s | {remark} |"
                print(line, flush=True)
                for remark in result.remarks:
                    print(f"    {remark}", flush=True)
                lines.append(line)
    print(f"\n| row | fault (seed {options.seed}) | passed | time | |\n| --- | --- | --- | --- | --- |")
    print("\n".join(lines))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
