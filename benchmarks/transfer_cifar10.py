"""Transfer between the classes of CIFAR-10: pre-trained on five, fine-tuned on 50 images each of the others.

    python benchmarks/transfer_cifar10.py --data cifar10/      # CIFAR-10 as image files in train/ and test/; 15 minutes

For each seed, a small Mixer is pre-trained on all training images of the classes airplane to deer. It is then
fine-tuned as in `mixer finetune` (new head of zeros, SGD, the learning rate chosen on held-out training images) on 50
images each of dog to truck, different ones for each seed. A new model is trained on the same images from scratch, with
the same steps, batches and crops, with AdamW and a learning rate chosen in the same way among equally many. Top-1 is
measured on all 5,000 test images of the five classes.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import NoProgress, machine, print_table, write_results

from allmlp.config.recipe import DataRecipe, FinetuneRecipe, ModelRecipe, OptimizationRecipe, Recipe, RunRecipe
from allmlp.evaluation.classification import SplitEvaluator
from allmlp.evaluation.pages.run_report import write_run_report
from allmlp.recipes import get_finetune_recipe
from allmlp.training.run import train
from allmlp.training.sweep import sweep

PRETRAINING = ("airplane", "automobile", "bird", "cat", "deer")
TRANSFER = ("dog", "frog", "horse", "ship", "truck")
SIZES = {"image_size": 32, "patch_size": 8, "num_blocks": 3, "hidden_dim": 96, "tokens_mlp_dim": 48}
SIZES |= {"channels_mlp_dim": 384}
EPOCHS, STEPS, BATCH, IMAGES = 8, 200, 50, 50
SCRATCH_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
DATA = {"crop_ratio": 1.0, "train_crop": "pad", "val_fraction": 0.0}


def run_one(recipe: Recipe, folder: Path) -> dict:
    result = train(recipe, folder, SplitEvaluator, NoProgress())
    write_run_report(result)
    return result.summary


def link(source: Path, target: Path, classes: tuple[str, ...], images: int | None, seed: int) -> None:
    """Links the class folders, with all of their images or with a number of them drawn by the seed."""
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
        data=DataRecipe(data=str(data), **DATA),
        optimization=OptimizationRecipe(
            epochs=EPOCHS, global_batch_size=128, learning_rate=2e-3, warmup_steps=200, decay="cosine"
        ),
        run=RunRecipe(seed=seed, evaluate_every_epochs=EPOCHS, log_every_steps=100),
    )
    return run_one(recipe, out)


def plan(data: Path, weights: Path | None, seed: int) -> FinetuneRecipe:
    """Fine-tuning of the weights, or training from scratch without weights, with the same budget."""
    tuning = get_finetune_recipe("photos")
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
        data=DataRecipe(data=str(data), **DATA),
        optimization=optimization,
        run=RunRecipe(seed=seed, evaluate_every_epochs=STEPS, log_every_steps=100),
    )
    return FinetuneRecipe(recipe=recipe, search=search)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="CIFAR-10 as a folder with train/ and test/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        link(options.data / "train", folder / "pretraining" / "train", PRETRAINING, None, 0)
        link(options.data / "test", folder / "pretraining" / "test", PRETRAINING, None, 0)
        for seed in options.seeds:
            start = time.perf_counter()
            data = folder / f"transfer-{seed}"
            link(options.data / "train", data / "train", TRANSFER, IMAGES, seed)
            link(options.data / "test", data / "test", TRANSFER, None, 0)
            source = pretrain(folder / "pretraining", folder / f"pretrained-{seed}", seed)
            weights = folder / f"pretrained-{seed}" / "model.safetensors"
            tuned = sweep(plan(data, weights, seed), folder / f"tuned-{seed}", run_one)
            scratch = sweep(plan(data, None, seed), folder / f"scratch-{seed}", run_one)
            runs.append(
                {
                    "seed": seed,
                    "pretrained_top1": source["test_top1"],
                    "tuned_top1": tuned["test_top1"],
                    "tuned_rate": tuned["learning_rate"],
                    "scratch_top1": scratch["test_top1"],
                    "scratch_rate": scratch["learning_rate"],
                    "seconds": round(time.perf_counter() - start),
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
