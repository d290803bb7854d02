"""The cost of checkpoints: the time that saving in the background adds, and how soon a resumed run makes a step.

    python benchmarks/checkpoint_cost.py --cifar10 cifar10/ --photos photos/     # about 15 minutes on two cores

Saving: training steps as in ``mixer train`` (compiled, bfloat16 where the hardware supports it), one recipe after the
other in one process. Stretches of several steps that start with a save alternate with stretches without one. A stretch
takes longer than writing a checkpoint, so that each save ends within its stretch. The figure is the median of the
ratios of neighboring stretches. Saves are more frequent than usual, every 20 steps of cifar10 and every 5 of B/16, so
that their cost exceeds the noise.

Resuming: seconds from the start of the process to the first new line of consumed.jsonl, of a new run and of one that
resumes from a checkpoint, alternating; medians, and the median of the ratios.
"""

import argparse
import dataclasses
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import machine, print_table, train_steps, write_results

from allmlp.checkpointing.manager import CheckpointManager
from allmlp.config.recipe import Recipe
from allmlp.data.dataset import DatasetSplits, ImageDataset
from allmlp.data.stores import ArrayStore
from allmlp.device import select_precision
from allmlp.distributed.context import SINGLE_PROCESS
from allmlp.recipes import get_recipe
from allmlp.training.build import build_batches, build_initializer, build_mixing, build_optimizer, load_data
from allmlp.training.compilation import compile_model
from allmlp.training.losses import LOSSES
from allmlp.training.memory import keep_freed_memory
from allmlp.training.optimizer_step import OptimizerStep
from allmlp.training.schedules import learning_rate
from allmlp.training.state import TrainingState
from allmlp.training.step import InputPreparation, TrainingStep

CPU = torch.device("cpu")


def cifar10(data: Path) -> tuple[Recipe, DatasetSplits]:
    recipe = get_recipe("cifar10")
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, data=str(data), workers=1))
    return recipe, load_data(recipe)


def b16() -> tuple[Recipe, DatasetSplits]:
    """The imagenet-b16 recipe with batches of 32, on random images of 256 × 256 pixels in memory."""
    recipe = get_recipe("imagenet-b16")
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, workers=1),
        optimization=dataclasses.replace(recipe.optimization, global_batch_size=32, micro_batch_size=None),
    )
    pixels = np.random.default_rng(0).integers(0, 256, (64, 256, 256, 3)).astype(np.uint8)
    names = tuple(f"{i:03d}" for i in range(len(pixels)))
    classes = tuple(f"{i:03d}" for i in range(1000))
    dataset = ImageDataset(store=ArrayStore(pixels, names), names=names, labels=np.arange(len(pixels)), classes=classes)
    return recipe, DatasetSplits(splits={"train": dataset}, classes=classes, description="noise")


def measure_saving(recipe: Recipe, data: DatasetSplits, stretch: int, pairs: int) -> dict[str, object]:
    """Seconds of each stretch of steps, without and with a save at its start."""
    settings, precision = recipe.optimization, select_precision("auto", CPU)
    saves = [False, *itertools.islice(itertools.cycle([False, True, True, False]), 2 * pairs)]  # the first warms up
    steps, seconds = stretch * len(saves), []
    model = build_initializer(recipe)(data.classes)
    sizes = {"batch_size": settings.global_batch_size, "training_flop": 1.0}
    forward, _ = compile_model(model, "on", device=CPU, precision=precision, **sizes)
    optimizer_step = OptimizerStep(build_optimizer(settings, model), settings.clip_norm)
    state = TrainingState(model, optimizer_step, None)
    step = TrainingStep(
        forward,
        InputPreparation(CPU, model.metadata.preprocessing, 0, build_mixing(recipe.data)),
        partial(LOSSES[settings.loss], smoothing=settings.label_smoothing),
        optimizer_step,
        partial(learning_rate, peak=1e-4, warmup_steps=1, steps=steps, decay="linear"),
        precision,
    )
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = CheckpointManager(Path(folder), SINGLE_PROCESS, recipe.run.keep_checkpoints, background=True)
        start = time.perf_counter()
        for result in train_steps(model, step, build_batches(recipe, data, model, steps)):
            if result.step % stretch == 0:
                seconds.append(time.perf_counter() - start)
                print(
                    f"{recipe.name}: {result.step} of {steps} steps, {seconds[-1]:.1f} s", file=sys.stderr, flush=True
                )
                start = time.perf_counter()
                if len(seconds) < len(saves) and saves[len(seconds)]:
                    checkpoints.save(result.step, state.tensors(), {"step": result.step})
        checkpoints.wait()
    neighbors = [sorted(pair) for pair in zip(*[iter(zip(saves[1:], seconds[1:], strict=True))] * 2, strict=True)]
    without, with_save = ([pair[saved][1] for pair in neighbors] for saved in (0, 1))
    ratios = [b / a for a, b in zip(without, with_save, strict=True)]
    median = statistics.median(ratios)
    return {"steps": stretch, "without": without, "with": with_save, "ratios": ratios, "ratio": median}


def measure_resuming(words: list[str], pairs: int) -> dict[str, object]:
    """Seconds to the first step of a new run, and of one that is resumed."""
    new, resumed = [], []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        first_step([*words, "--out", str(base), "--save-every-steps", "1"], base, more_steps=2)
        for number in range(pairs):
            fresh, copy = Path(folder) / "new", Path(folder) / "copy"
            shutil.copytree(base, copy)
            (copy / "consumed.jsonl").unlink()  # its first line is then the first new step
            for seconds in (new, resumed) if number % 2 == 0 else (resumed, new):
                run = fresh if seconds is new else copy
                seconds.append(first_step([*words, "--out", str(run), "--resume", "auto"], run))
            shutil.rmtree(fresh)
            shutil.rmtree(copy)
    ratios = [b / a for a, b in zip(new, resumed, strict=True)]
    return {"new": new, "resumed": resumed, "ratios": ratios, "ratio": statistics.median(ratios)}


def first_step(words: list[str], run: Path, more_steps: int = 0) -> float:
    """Seconds from the start of the command to its first step; it is killed after so many more steps."""
    log, errors = run / "consumed.jsonl", run.parent / "errors"
    newest = (run / "checkpoints").glob("step-*")
    before = max((int(path.name.removeprefix("step-")) for path in newest), default=0)
    start, seconds, command = time.perf_counter(), None, [sys.executable, "-m", "allmlp.cli", *words]
    with errors.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        while True:
            done = log.read_text().splitlines() if log.exists() else []
            last = json.loads(done[-1])["step"] if done and done[-1].endswith("}") else 0
            if seconds is None and last == before + 1:
                seconds = time.perf_counter() - start
            if seconds is not None and last > before + more_steps:
                process.kill()
                return seconds
            if process.poll() is not None:
                raise SystemExit(errors.read_text())
            time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, required=True, help="CIFAR-10 as a folder or .zip of image files")
    parser.add_argument("--photos", type=Path, required=True, help="photographs, one folder a class")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument(
        "--only", choices=("resuming", "saving"), help="measure only this, and keep the stored results of the other"
    )
    options = parser.parse_args()
    keep_freed_memory()
    stored = Path(__file__).parent / "results" / "checkpoint_cost.json"
    results = json.loads(stored.read_text()) if options.only and stored.exists() else {}
    big = ["imagenet-b16", "--global-batch-size", "32", "--micro-batch-size", "None", "--data", str(options.photos)]
    for name, words in (("cifar10", ["cifar10", "--data", str(options.cifar10)]), ("B/16, batch 32", big)):
        if options.only != "saving":
            found = measure_resuming(["train", *words], options.pairs)
            results[f"first step of a resumed run, {name}"] = found | {"machine": machine(CPU)}
    for name, make, stretch, pairs in (
        ("cifar10", lambda: cifar10(options.cifar10), 20, 8 * options.pairs),
        ("B/16, batch 32", b16, 5, 2 * options.pairs),
    ):
        if options.only != "resuming":
            found = measure_saving(*make(), stretch, pairs)
            results[f"a save every {stretch} steps, {name}"] = found | {"machine": machine(CPU)}
    write_results("checkpoint_cost", results)
    print_table(
        ["what", "cost"], [[what, f"{found['ratio']:.4f} × the time without"] for what, found in results.items()]
    )


if __name__ == "__main__":
    main()
