"""What pre-training is worth: five classes of CIFAR-10, then the other five with 50 images a class, or from scratch.

    python benchmarks/transfer_cifar10.py --data cifar10/      # CIFAR-10 as image files in train/ and test/; 15 minutes

For each seed: a small Mixer is pre-trained on all training images of airplane to deer; then it is fine-tuned as `mixer
finetune` does (zeroed head, SGD, the rate chosen on held-out training images) on 50 images each of dog to truck, other
ones for each seed; and a new one is trained on the same images from scratch with the same steps, batches and crops, by
AdamW, its rate chosen in the same way among as many. Top-1 is of all 5,000 test images of the five classes.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import machine, print_table, write_results

from allmlp.config.recipe import DataRecipe, ModelRecipe, OptimizationRecipe, Recipe, RunRecipe, Transfer
from allmlp.evaluation.classification import classify
from allmlp.evaluation.run_report import write_run_report
from allmlp.recipes import get_transfer
from allmlp.training.run import train
from allmlp.training.sweep import transfer

FIRST = ("airplane", "automobile", "bird", "cat", "deer")
OTHER = ("dog", "frog", "horse", "ship", "truck")
SIZES = {"image_size": 32, "patch_size": 8, "num_blocks": 3, "hidden_dim": 96, "tokens_mlp_dim": 48}
SIZES |= {"channels_mlp_dim": 384}
EPOCHS, STEPS, BATCH, IMAGES = 8, 200, 50, 50
SCRATCH_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
VIEW = {"crop_ratio": 1.0, "train_crop": "pad", "val_fraction": 0.0}


class Silent:
    def update(self, done: int, total: int, text: str) -> None:
        pass


def run_one(recipe: Recipe, folder: Path) -> dict:
    done = train(recipe, folder, classify, Silent())
    write_run_report(done)
    return done.summary


def link(source: Path, target: Path, classes: tuple[str, ...], images: int | None, seed: int) -> None:
    """A folder of one folder a class, all of its images or so many drawn by the seed."""
    for name in classes:
        files = sorted((source / name).iterdir())
        chosen = np.random.default_rng([seed, *name.encode()]).permutation(len(files))[:images]
        (target / name).mkdir(parents=True)
        for i in chosen:
            (target / name / files[i].name).symlink_to(files[i].resolve())


def pretrain(data: Path, out: Path, seed: int) -> dict:
    recipe = Recipe(
        name="pretrain",
        model=ModelRecipe(**SIZES),
        data=DataRecipe(data=str(data), **VIEW),
        optimization=OptimizationRecipe(
            epochs=EPOCHS, global_batch_size=128, learning_rate=2e-3, warmup_steps=200, decay="cosine"
        ),
        run=RunRecipe(seed=seed, evaluate_every_epochs=EPOCHS, log_every_steps=100),
    )
    return run_one(recipe, out)


def plan(data: Path, weights: Path | None, seed: int) -> Transfer:
    """Fine-tuning of the weights, or training from scratch, with one budget."""
    tuning = get_transfer("photos")
    recipe, search = tuning.recipe, replace(tuning.search, search_fraction=0.2)
    budget = {"steps": STEPS, "global_batch_size": BATCH, "warmup_steps": STEPS // 10}
    if weights is None:
        model, search = ModelRecipe(**SIZES), replace(search, learning_rates=SCRATCH_RATES)
        optimization = OptimizationRecipe(decay="cosine", weight_decay=0.1, **budget)
    else:
        model = ModelRecipe(weights=str(weights), image_size=None)
        optimization = replace(recipe.optimization, **budget)
    recipe = replace(
        recipe,
        model=model,
        data=DataRecipe(data=str(data), **VIEW),
        optimization=optimization,
        run=RunRecipe(seed=seed, evaluate_every_epochs=STEPS, log_every_steps=100),
    )
    return Transfer(recipe=recipe, search=search)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="CIFAR-10 as a folder with train/ and test/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        link(options.data / "train", folder / "first" / "train", FIRST, None, 0)
        link(options.data / "test", folder / "first" / "test", FIRST, None, 0)
        for seed in options.seeds:
            begin = time.perf_counter()
            data = folder / f"other-{seed}"
            link(options.data / "train", data / "train", OTHER, IMAGES, seed)
            link(options.data / "test", data / "test", OTHER, None, 0)
            source = pretrain(folder / "first", folder / f"pretrained-{seed}", seed)
            weights = folder / f"pretrained-{seed}" / "model.safetensors"
            tuned = transfer(plan(data, weights, seed), folder / f"tuned-{seed}", run_one)
            scratch = transfer(plan(data, None, seed), folder / f"scratch-{seed}", run_one)
            runs.append(
                {
                    "seed": seed,
                    "pretrained_top1": source["test_top1"],
                    "tuned_top1": tuned["test_top1"],
                    "tuned_rate": tuned["learning_rate"],
                    "scratch_top1": scratch["test_top1"],
                    "scratch_rate": scratch["learning_rate"],
                    "seconds": round(time.perf_counter() - begin),
                }
            )
            print(" ".join(f"{key} {value}" for key, value in runs[-1].items()), flush=True)
    write_results("transfer_cifar10", {"machine": machine(torch.device("cpu")), "sizes": SIZES, "runs": runs})
    rows = []
    for run in runs:
        rates = f"{run['tuned_rate']:g}, {run['scratch_rate']:g}"
        gain = run["tuned_top1"] - run["scratch_top1"]
        rows.append([str(run["seed"]), f"{run['tuned_top1']:.4f}", f"{run['scratch_top1']:.4f}", f"{gain:+.4f}", rates])
    means = [statistics.mean(run[key] for run in runs) for key in ("tuned_top1", "scratch_top1")]
    rows.append(["mean", *(f"{mean:.4f}" for mean in means), f"{means[0] - means[1]:+.4f}", ""])
    print_table(["seed", "fine-tuned", "from scratch", "difference", "rates chosen"], rows)


if __name__ == "__main__":
    main()
