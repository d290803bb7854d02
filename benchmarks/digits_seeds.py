"""The digits recipe with five seeds: test top-1 and training time, as in `mixer train`.

python benchmarks/digits_seeds.py                     # about two minutes on two cores
"""

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path

import torch
from common import NoProgress, machine, print_table, write_results

from allmlp.evaluation.classification import SplitEvaluator
from allmlp.recipes import get_recipe
from allmlp.training.run import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    recipe = get_recipe("digits")
    runs = []
    for seed in options.seeds:
        seeded = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, seed=seed))
        with tempfile.TemporaryDirectory() as folder:
            runs.append(train(seeded, Path(folder) / "run", SplitEvaluator, NoProgress()).summary)
    scores = [run["test_top1"] for run in runs]
    results = {
        "machine": machine(torch.device("cpu")),
        "median_test_top1": statistics.median(scores),
        "runs": [
            {key: run[key] for key in ("seed", "test_top1", "val_top1", "train_seconds", "steps")} for run in runs
        ],
    }
    write_results("digits_seeds", results)
    rows = [
        [str(r["seed"]), f"{r['test_top1']:.4f}", f"{r['val_top1']:.4f}", f"{r['train_seconds']:.1f}"] for r in runs
    ]
    print_table(["seed", "test top-1", "validation top-1", "training, s"], rows)
    seconds = statistics.median(run["train_seconds"] for run in runs)
    print(
        f"test top-1 on {runs[0]['images']['test']} held-out images: median {statistics.median(scores):.4f}, "
        f"from {min(scores):.4f} to {max(scores):.4f}; training {seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
