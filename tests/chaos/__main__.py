"""make chaos: every promise of docs/runs.md broken on purpose, by a seed, and a table of what held.

The rows' numbers are those of the table; ``--rows 1 3`` runs some.
"""

import argparse
import logging
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import rows
from harness import Lab

Row = tuple[str, Callable[[Lab, random.Random, int], rows.Result], int]
ROWS: dict[int, list[Row]] = {
    1: [("SIGKILL, one process", lambda lab, rng, n: rows.killed(lab, rng, n, "1 process"), 20)],
    2: [
        ("SIGKILL of a rank, 2 DDP", lambda lab, rng, n: rows.killed(lab, rng, n, "2 DDP"), 10),
        ("SIGKILL of a rank, 2 FSDP2", lambda lab, rng, n: rows.killed(lab, rng, n, "2 FSDP2"), 10),
    ],
    3: [("SIGKILL inside a save", rows.killed_in_a_save, 99)],
    4: [("0, 2, 4 workers", rows.other_workers, 3)],
    5: [("4 ranks to 2 and 1", rows.other_ranks, 2)],
    6: [("2 ranks against 1, float64", rows.one_and_two, 1)],
    7: [("SIGTERM", rows.terminated, 99)],
    8: [("a rank stopped, stuck, raising", rows.stuck, 99)],
    9: [("disk full, read-only", rows.no_room, 4)],
    10: [("a bit flipped", rows.flipped, 5)],
    11: [("NaN on one rank", rows.no_number, 2)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS))
    parser.add_argument("--trials", type=int, help="at most so many of each")
    chosen = parser.parse_args()
    lines, failed = [], 0
    logging.getLogger("allmlp").addHandler(logging.NullHandler())  # it names what is broken on purpose
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        lab = Lab(Path(folder))
        for number in chosen.rows:
            for what, check, trials in ROWS[number]:
                begun = time.perf_counter()
                limit = min(trials, chosen.trials or trials)
                result = check(lab, random.Random(f"{chosen.seed}/{what}"), limit)
                seconds = time.perf_counter() - begun
                failed += result.of - result.passed
                remark = result.remarks[0].splitlines()[0][:120] if result.remarks else ""
                line = f"| {number} | {what} | {result.passed} of {result.of} | {seconds:.0f} s | {remark} |"
                print(line, flush=True)
                for remark in result.remarks:
                    print(f"    {remark}", flush=True)
                lines.append(line)
    print(f"\n| row | fault (seed {chosen.seed}) | passed | time | |\n| --- | --- | --- | --- | --- |")
    print("\n".join(lines))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
