"""What surviving costs: the wall time that saving in the background adds, and how soon a resumed run steps again.

    python benchmarks/checkpoint_cost.py --cifar10 cifar10/ --photos photos/     # about 15 minutes on two cores

Saving: the training loop as ``mixer train`` sets it up (compiled, bfloat16 where the hardware has it), in one process a
recipe; stretches of so many steps with a save at their beginning alternate with stretches without (a stretch takes
longer than writing, so that all of a save falls into its own). The figure is the median of the ratios of neighbours.
Saves are more frequent than a user's, every 20 steps of cifar10 and every 5 of B/16, to be seen above the noise.

Resuming: seconds from the start of the process to the first new line of consumed.jsonl, of a new run and of one that
goes on from a checkpoint, alternating; the medians, and the median of the ratios.
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
from common import machine, print_table, write_results

from allmlp.config.recipe import Recipe
from allmlp.data.dataset import DatasetSplits, ImageDataset
from allmlp.data.stores import ArrayStore
from allmlp.device import select_precision
from allmlp.recipes import get_recipe
from allmlp.training.compilation import compile_model
from allmlp.training.fit import make_batches, make_mixing, make_optimizer
from allmlp.training.initialization import prepare
from allmlp.training.loop import train_steps
from allmlp.training.losses import LOSSES
from allmlp.training.memory import keep_freed_memory
from allmlp.training.optimizer_step import OptimizerStep
from allmlp.training.preemption import Control
from allmlp.training.run import find_source
from allmlp.training.schedules import learning_rate
from allmlp.training.state import TrainingState

CPU = torch.device("cpu")


def cifar10(data: Path) -> tuple[Recipe, DatasetSplits]:
    recipe = get_recipe("cifar10")
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, data=str(data), workers=1))
    return recipe, find_source(recipe)


def b16() -> tuple[Recipe, DatasetSplits]:
    """The imagenet-b16 recipe at batch 32, on noise of 256 × 256 in memory."""
    recipe = get_recipe("imagenet-b16")
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, workers=1),
        optimization=dataclasses.replace(recipe.optimization, global_batch_size=32, micro_batch_size=None),
    )
    pixels = np.random.default_rng(0).integers(0, 256, (64, 256, 256, 3)).astype(np.uint8)
    names = tuple(f"{i:03d}" for i in range(len(pixels)))
    classes = tuple(f"{i:03d}" for i in range(1000))
    part = ImageDataset(store=ArrayStore(pixels, names), names=names, labels=np.arange(len(pixels)), classes=classes)
    return recipe, DatasetSplits(splits={"train": part}, classes=classes, description="noise")


def saving(recipe: Recipe, source: DatasetSplits, stretch: int, pairs: int) -> dict[str, object]:
    """Seconds of each stretch of steps, without and with a save at its beginning."""
    settings, precision = recipe.optimization, select_precision("auto", CPU)
    kinds = [False, *itertools.islice(itertools.cycle([False, True, True, False]), 2 * pairs)]  # the first warms up
    steps, seconds = stretch * len(kinds), []
    model = prepare(recipe)(source.classes)
    ready = {"batch_size": settings.global_batch_size, "training_flop": 1.0, "device": CPU, "precision": precision}
    forward, _ = compile_model(model, "on", **ready)
    update = OptimizerStep(make_optimizer(settings, model), settings.clip_norm)
    state = TrainingState(model, update, None)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "checkpoints").mkdir()
        control, begun = Control.unattended(recipe, Path(folder)), time.perf_counter()
        for step in train_steps(
            model,
            forward,
            make_batches(recipe, source, model, steps),
            update,
            partial(learning_rate, peak=1e-4, warmup_steps=1, steps=steps, decay="linear"),
            partial(LOSSES[settings.loss], smoothing=settings.label_smoothing),
            device=CPU,
            precision=precision,
            preprocessing=model.metadata.preprocessing,
            seed=0,
            mixing=make_mixing(recipe.data),
        ):
            if step.step % stretch == 0:
                seconds.append(time.perf_counter() - begun)
                print(f"{recipe.name}: {step.step} of {steps} steps, {seconds[-1]:.1f} s", file=sys.stderr, flush=True)
                begun = time.perf_counter()
                if len(seconds) < len(kinds) and kinds[len(seconds)]:
                    control.save(step.step, state.tensors(), {"step": step.step}, None)
        control.checkpoints.wait()
    neighbours = [sorted(pair) for pair in zip(*[iter(zip(kinds[1:], seconds[1:], strict=True))] * 2, strict=True)]
    plain, saved = ([pair[kind][1] for pair in neighbours] for kind in (0, 1))
    ratios = [b / a for a, b in zip(plain, saved, strict=True)]
    return {"steps": stretch, "without": plain, "with": saved, "ratios": ratios, "ratio": statistics.median(ratios)}


def resuming(words: list[str], pairs: int) -> dict[str, object]:
    """Seconds to the first step of a new run, and of one that goes on."""
    new, resumed = [], []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        first_step([*words, "--out", str(base), "--save-every-steps", "1"], base, then=2)
        for number in range(pairs):
            fresh, copy = Path(folder) / "new", Path(folder) / "copy"
            shutil.copytree(base, copy)
            (copy / "consumed.jsonl").unlink()  # whose first line is then the first new step
            for kind in (new, resumed) if number % 2 == 0 else (resumed, new):
                run = fresh if kind is new else copy
                kind.append(first_step([*words, "--out", str(run), "--resume", "auto"], run))
            shutil.rmtree(fresh)
            shutil.rmtree(copy)
    ratios = [b / a for a, b in zip(new, resumed, strict=True)]
    return {"new": new, "resumed": resumed, "ratios": ratios, "ratio": statistics.median(ratios)}


def first_step(words: list[str], run: Path, then: int = 0) -> float:
    """Seconds from the start of the command to its first step; it is killed after that many more."""
    log, errors = run / "consumed.jsonl", run.parent / "errors"
    newest = (run / "checkpoints").glob("step-*")
    before = max((int(path.name.removeprefix("step-")) for path in newest), default=0)
    begun, seconds, command = time.perf_counter(), None, [sys.executable, "-m", "allmlp.cli", *words]
    with errors.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        while True:
            done = log.read_text().splitlines() if log.exists() else []
            last = json.loads(done[-1])["step"] if done and done[-1].endswith("}") else 0
            if seconds is None and last == before + 1:
                seconds = time.perf_counter() - begun
            if seconds is not None and last > before + then:
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
    parser.add_argument("--only", choices=("resuming", "saving"), help="and leave the other's results as they are")
    chosen = parser.parse_args()
    keep_freed_memory()
    stored = Path(__file__).parent / "results" / "checkpoint_cost.json"
    results = json.loads(stored.read_text()) if chosen.only and stored.exists() else {}
    big = ["imagenet-b16", "--global-batch-size", "32", "--micro-batch-size", "None", "--data", str(chosen.photos)]
    for name, words in (("cifar10", ["cifar10", "--data", str(chosen.cifar10)]), ("B/16, batch 32", big)):
        if chosen.only != "saving":
            told = resuming(["train", *words], chosen.pairs)
            results[f"first step of a resumed run, {name}"] = told | {"machine": machine(CPU)}
    for name, make, stretch, pairs in (
        ("cifar10", lambda: cifar10(chosen.cifar10), 20, 8 * chosen.pairs),
        ("B/16, batch 32", b16, 5, 2 * chosen.pairs),
    ):
        if chosen.only != "resuming":
            told = saving(*make(), stretch, pairs)
            results[f"a save every {stretch} steps, {name}"] = told | {"machine": machine(CPU)}
    write_results("checkpoint_cost", results)
    print_table(["what", "cost"], [[what, f"{told['ratio']:.4f} × the time without"] for what, told in results.items()])


if __name__ == "__main__":
    main()
