"""CIFAR-10 in ten epochs on two cores: ours without augmentation, with mixup and RandAugment, and timm's.

    python benchmarks/augment_cifar10.py --data cifar10/   # CIFAR-10 as image files in train/ and test/; 40 minutes

All train a Mixer of the same sizes (tanh GELU) for ten epochs of all 50,000 images: AdamW with the same learning rate,
batch size and weight decay, one epoch of warm-up, then cosine decay; bfloat16 where the CPU supports it; torch.compile;
one core for the loader and one for the rest; one evaluation at the end. Ours is what `mixer train` runs. timm's is a
loop with its model, create_loader, Mixup, create_optimizer_v2 and create_scheduler_v2; --choose compares settings of
its augmentation on held-out training images. The contestants alternate, seed after seed, each in a separate process.
The seconds include compilation and data loading.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import NoProgress, machine, print_table, write_results

SIZES = {"image_size": 32, "patch_size": 8, "num_blocks": 3, "hidden_dim": 96, "tokens_mlp_dim": 48}
SIZES |= {"channels_mlp_dim": 384}
EPOCHS, BATCH, RATE, DECAY, WORKERS = 10, 128, 2e-3, 0.1, 1
OURS = {"ours, plain": {}, "ours, mixup and RandAugment": {"mixup": 0.2, "randaugment": 10.0, "randaugment_layers": 1}}
TIMM_SETTINGS = {  # least area of the crop, automatic augmentation, mixup
    "default": (0.08, "rand-m9-inc1", 0.2),
    "mild": (0.5, "rand-m9-n1-inc1", 0.2),
    "crop and flip": (0.5, None, 0.0),
}
CHOSEN_SETTING = "crop and flip"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as a folder of image files with train/ and test/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="fewer to try the script")
    parser.add_argument(
        "--choose", action="store_true", help="compare only timm's settings, on held-out training images"
    )
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, seed = options.one
        run = train_ours if name in OURS else train_timm
        print(json.dumps(run(name, int(seed), options.data, options.epochs, options.choose)))
        return
    names = [f"timm, {setting}" for setting in TIMM_SETTINGS] if options.choose else [*OURS, f"timm, {CHOSEN_SETTING}"]
    runs = []
    for seed in options.seeds:
        for name in names:
            words = ["--data", options.data, "--epochs", str(options.epochs), "--one", name, str(seed)]
            words += ["--choose"] * options.choose
            one_core = os.environ | {"OMP_NUM_THREADS": "1"}
            finished = subprocess.run(
                [sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True, env=one_core
            )
            runs.append({"name": name, "seed": seed, **json.loads(finished.stdout.splitlines()[-1])})
            print(" ".join(f"{key} {value}" for key, value in runs[-1].items()), flush=True)
    import torch

    result = {"machine": machine(torch.device("cpu")), "epochs": options.epochs, "sizes": SIZES, "runs": runs}
    write_results("augment_cifar10_choice" if options.choose else "augment_cifar10", result)
    rows = []
    for name in names:
        found = [run for run in runs if run["name"] == name]
        top1, seconds = [run["top1"] for run in found], [run["seconds"] for run in found]
        spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
        rows.append([name, f"{statistics.mean(top1):.4f} ± {spread:.4f}", f"{statistics.median(seconds):.0f} s"])
    print_table(["contestant", "top-1", "median wall time"], rows)


def train_ours(name: str, seed: int, data: str, epochs: int, choose: bool) -> dict[str, float]:
    from allmlp.config.recipe import DataRecipe, ModelRecipe, OptimizationRecipe, Recipe, RunRecipe
    from allmlp.evaluation.classification import SplitEvaluator
    from allmlp.training.run import train

    recipe = Recipe(
        name="augment",
        model=ModelRecipe(**SIZES),
        data=DataRecipe(
            data=data, val_fraction=0.0, crop_ratio=1.0, train_crop="pad", workers=WORKERS,
            holdout=0.1 if choose else 0.0, **OURS[name],
        ),
        optimization=OptimizationRecipe(
            epochs=epochs, global_batch_size=BATCH, learning_rate=RATE, weight_decay=DECAY,
            warmup_steps=50_000 // BATCH, decay="cosine",
        ),
        run=RunRecipe(seed=seed, compile="on", evaluate_every_epochs=epochs, log_every_steps=100),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        result = train(recipe, Path(folder) / "run", SplitEvaluator, NoProgress())
    summary = result.summary
    top1 = summary["val_top1" if choose else "test_top1"]
    return {"top1": top1, "seconds": summary["train_seconds"], "steps": summary["steps"]}


def train_timm(name: str, seed: int, data: str, epochs: int, choose: bool) -> dict[str, float]:
    import functools

    import torch
    from timm.data import Mixup, create_dataset, create_loader
    from timm.loss import SoftTargetCrossEntropy
    from timm.models.mlp_mixer import MlpMixer
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import random_seed
    from torch import nn

    from allmlp.data.split import stratified_split
    from allmlp.device import autocast, select_precision
    from allmlp.training.memory import keep_freed_memory

    keep_freed_memory()
    device = torch.device("cpu")
    precision = select_precision("auto", device)
    least, augment, mixup = TIMM_SETTINGS[name.removeprefix("timm, ")]
    random_seed(seed)
    dim = SIZES["hidden_dim"]
    model = MlpMixer(
        num_classes=10,
        img_size=32,
        patch_size=SIZES["patch_size"],
        num_blocks=SIZES["num_blocks"],
        embed_dim=dim,
        mlp_ratio=(SIZES["tokens_mlp_dim"] / dim, SIZES["channels_mlp_dim"] / dim),
        act_layer=functools.partial(nn.GELU, approximate="tanh"),
    )
    train_set = create_dataset("", root=str(Path(data) / "train"))
    test_set = create_dataset("", root=str(Path(data) / "test"))
    if choose:
        labels, names = zip(*((label, str(file)) for file, label in train_set.reader.samples), strict=True)
        import numpy as np

        kept, held_out = stratified_split(np.array(labels), names, 0.1, 0)
        test_set = create_dataset("", root=str(Path(data) / "train"))
        test_set.reader.samples = [test_set.reader.samples[i] for i in held_out]
        train_set.reader.samples = [train_set.reader.samples[i] for i in kept]
    common = {"input_size": (3, 32, 32), "use_prefetcher": False, "num_workers": WORKERS, "device": device}
    common |= {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
    loader = create_loader(
        train_set,
        batch_size=BATCH,
        is_training=True,
        scale=(least, 1.0),
        auto_augment=augment,
        color_jitter=0.0,
        **common,
    )
    mixer = Mixup(mixup_alpha=mixup, label_smoothing=0.0, num_classes=10) if mixup else None
    loss_of = SoftTargetCrossEntropy() if mixer else nn.CrossEntropyLoss()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=RATE, weight_decay=DECAY)
    per_epoch = len(loader)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=epochs,
        warmup_epochs=1,
        warmup_lr=1e-6,
        step_on_epochs=False,
        updates_per_epoch=per_epoch,
    )
    start, step = time.perf_counter(), 0
    forward = torch.compile(model)
    for _ in range(epochs):
        model.train()
        for images, labels in loader:
            if mixer:
                images, labels = mixer(images, labels)
            with autocast(device, precision):
                logits = forward(images)
            loss_of(logits.float(), labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            scheduler.step_update(num_updates=step)
    seconds = time.perf_counter() - start
    model.eval()
    correct = 0
    with torch.inference_mode(), autocast(device, precision):
        for images, labels in create_loader(test_set, batch_size=500, crop_pct=1.0, **common):
            correct += int((model(images).argmax(1) == labels).sum())
    return {"top1": correct / len(test_set), "seconds": seconds, "steps": step}


if __name__ == "__main__":
    main()
