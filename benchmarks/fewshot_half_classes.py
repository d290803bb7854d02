"""Few-shot accuracy of features that were pre-trained on other classes, of random features, and of raw pixels.

    python benchmarks/fewshot_half_classes.py --cifar10 cifar10.zip --fashion-mnist      # 15 minutes on two cores

For each training seed, a small Mixer is pre-trained on the first five classes of a data set. On the images of the
other five, which it has never seen, linear probes (Section 3 of the paper: ridge regression in closed form) are fitted
to five training images of each class, for three seeds of the choice, and tested on all test images of these classes.
They see the features of the pre-trained Mixer, those of the same Mixer with its initial weights, or the pixels.
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

from allmlp.config.recipe import DataRecipe, ModelRecipe, OptimizationRecipe, Recipe, RunRecipe
from allmlp.data.dataset import ImageDataset
from allmlp.data.sources import load_source
from allmlp.evaluation.classification import SplitEvaluator
from allmlp.evaluation.features import extract_features
from allmlp.evaluation.fewshot import probe
from allmlp.metadata import Preprocessing
from allmlp.model import Mixer
from allmlp.training.build import build_initializer
from allmlp.training.run import train

SHOT = 5
SMALL = {"num_blocks": 3, "hidden_dim": 96, "tokens_mlp_dim": 48, "channels_mlp_dim": 384}
SETTINGS = {  # name → model, epochs, batch size, learning rate, augmentation
    "digits": ({"image_size": 8, "patch_size": 2, **SMALL}, 40, 64, 3e-3, {"crop_padding": 1, "flip": False}),
    "fashion-mnist": ({"image_size": 28, "patch_size": 7, **SMALL}, 2, 128, 2e-3, {"crop_padding": 2, "flip": True}),
    "cifar10": ({"image_size": 32, "patch_size": 8, **SMALL}, 4, 128, 2e-3, {"crop_padding": 4, "flip": True}),
}


def recipe(name: str, source: str, seed: int, exclude: Path) -> Recipe:
    sizes, epochs, batch, rate, augmentation = SETTINGS[name]
    return Recipe(
        name="half",
        model=ModelRecipe(**sizes),
        data=DataRecipe(data=source, exclude=str(exclude), crop_ratio=1.0, train_crop="pad", **augmentation),
        optimization=OptimizationRecipe(
            epochs=epochs, global_batch_size=batch, learning_rate=rate, warmup_steps=200, decay="cosine"
        ),
        run=RunRecipe(seed=seed, evaluate_every_epochs=epochs, log_every_steps=100),
    )


def of_classes(dataset: ImageDataset, classes: range) -> ImageDataset:
    """The images of these classes, which are labeled from 0."""
    kept = dataset.subset(np.flatnonzero(np.isin(dataset.labels, classes)))
    return replace(kept, labels=kept.labels - classes.start, classes=kept.classes[classes.start : classes.stop])


def features(model: Mixer, dataset: ImageDataset) -> np.ndarray:
    where = {"device": torch.device("cpu"), "precision": torch.float32}
    return extract_features(
        model, dataset, preprocessing=Preprocessing(crop="resize", crop_ratio=1.0), **where
    ).features


def pixels(dataset: ImageDataset) -> np.ndarray:
    return np.stack([np.asarray(dataset.read(i), dtype=np.float32).ravel() for i in range(len(dataset))])


def accuracies(x: np.ndarray, test_x: np.ndarray, train_set: ImageDataset, test_set: ImageDataset) -> list[float]:
    """Of the three seeds of the choice."""
    found = probe(x, train_set.labels, test_x, test_set.labels, len(train_set.classes), shots=[SHOT])
    return list(found.values())


def run_one(name: str, source: str, seed: int, folder: Path) -> dict:
    """One training seed on one data set."""
    start = time.perf_counter()
    data = load_source(source, val_fraction=0.0)
    half = len(data.classes) // 2
    unseen = folder / "unseen.txt"
    everything = data.split("all")
    unseen.write_text("\n".join(everything.names[i] for i in np.flatnonzero(everything.labels >= half)))
    settings = recipe(name, source, seed, unseen)
    trained = train(settings, folder / "run", SplitEvaluator, NoProgress())
    seconds = time.perf_counter() - start
    initial = build_initializer(settings)(data.classes)
    others = range(half, len(data.classes))
    parts = [of_classes(data.split(part), others) for part in ("train", "test")]
    kinds = {
        "pretrained": [features(trained.model, part) for part in parts],
        "random": [features(initial, part) for part in parts],
        "pixels": [pixels(part) for part in parts],
    }
    return {
        "data": name,
        "seed": seed,
        "pretraining_test_top1": trained.summary["test_top1"],
        "pretraining_seconds": round(seconds),
        "test_images": len(parts[1]),
        **{kind: accuracies(*values, *parts) for kind, values in kinds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", help="a SOURCE of CIFAR-10: the name cifar10, or a copy as image files")
    parser.add_argument("--fashion-mnist", action="store_true", help="downloaded, or Debian's package if it is there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    sources = {"digits": "digits"}
    sources |= {"fashion-mnist": "fashion-mnist"} if options.fashion_mnist else {}
    sources |= {"cifar10": options.cifar10} if options.cifar10 else {}
    runs = []
    for name, source in sources.items():
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                runs.append(run_one(name, source, seed, Path(folder)))
            print(" ".join(f"{key} {value}" for key, value in runs[-1].items()), flush=True)
    write_results("fewshot_half_classes", {"machine": machine(torch.device("cpu")), "shot": SHOT, "runs": runs})
    rows = []
    for name in sources:
        own = [run for run in runs if run["data"] == name]
        row = [name]
        for kind in ("pretrained", "random", "pixels"):
            values = [value for run in own for value in run[kind]]
            row.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
        rows.append([*row, f"{statistics.mean(run['pretraining_seconds'] for run in own):.0f} s"])
    print_table(["5-shot top-1 on five unseen classes", "pre-trained", "random", "pixels", "pre-training"], rows)


if __name__ == "__main__":
    main()
