"""Training throughput of a Mixer, compared with timm's MlpMixer of the same sizes; rounds alternate in the same run.

    python benchmarks/train_step.py                       # both models; about seven minutes on two cores
    python benchmarks/train_step.py --models cifar10

Each contestant runs in a separate process, as it would for its user, and the rounds alternate between them. All use
the tanh GELU, the same fused AdamW (weight decay on kernels only), gradients clipped at norm 1, the same precision and
uint8 batches of random pixels; no data is loaded. Ours is the step of `mixer train`, with the compiled model and the
allocator settings that it uses; timm's is a plain loop, eager and with torch.compile; "timm compiled, tuned" has our
allocator settings too. Figures are medians; ratios are medians of the ratios within a round.
"""

import argparse
import functools
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import torch
import torch.nn.functional as F
from common import machine, print_table, train_steps, write_results
from timm.models.mlp_mixer import MlpMixer
from torch import nn

import allmlp
from allmlp.data.loader import Batch
from allmlp.data.transforms import normalize
from allmlp.device import autocast, select_device, select_precision
from allmlp.metadata import Preprocessing
from allmlp.recipes import get_recipe
from allmlp.training.compilation import compile_model
from allmlp.training.losses import softmax
from allmlp.training.memory import keep_freed_memory
from allmlp.training.optimizer import adamw
from allmlp.training.optimizer_step import OptimizerStep
from allmlp.training.step import InputPreparation, TrainingStep
from allmlp.variants import VARIANTS

BATCHES = {
    "cifar10": (10, 128, 4),
    "B/16": (1000, 32, 1),
}  # classes, batch, steps per round (GPU: 25 times as many)
PREPROCESSING = Preprocessing()
Step = Callable[[], object]


def sizes_of(name: str) -> dict[str, int]:
    """The sizes of a variant of Table 1, or of a recipe's model."""
    if name in VARIANTS:
        return {"image_size": 224} | VARIANTS[name]
    model = get_recipe(name).model
    return {key: getattr(model, key) for key in ("image_size", *VARIANTS["B/16"])}


def random_batches(batch_size: int, image_size: int, classes: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch_size, 3, image_size, image_size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(classes, (batch_size,), generator=generator)
    valid = torch.ones(batch_size, dtype=torch.bool)
    return itertools.repeat(Batch(images, labels, valid, torch.arange(batch_size), []))


def ours(sizes: dict[str, int], classes: int, batch: int, device: torch.device, precision: torch.dtype) -> Step:
    model = allmlp.create(num_classes=classes, seed=0, **sizes).to(device)
    forward, _ = compile_model(model, "on", batch_size=batch, training_flop=1.0, device=device, precision=precision)
    optimizer_step = OptimizerStep(adamw(model, weight_decay=0.1, beta1=0.9, beta2=0.999), clip_norm=1.0)
    inputs = InputPreparation(device, PREPROCESSING, seed=0)
    step = TrainingStep(forward, inputs, softmax, optimizer_step, lambda step: 1e-3, precision)
    batches = random_batches(batch, sizes["image_size"], classes)
    return functools.partial(next, train_steps(model, step, batches))


def timms(
    sizes: dict[str, int], classes: int, batch: int, device: torch.device, precision: torch.dtype, compile_it: bool
) -> Step:
    model = MlpMixer(
        num_classes=classes,
        img_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        num_blocks=sizes["num_blocks"],
        embed_dim=sizes["hidden_dim"],
        mlp_ratio=(sizes["tokens_mlp_dim"] / sizes["hidden_dim"], sizes["channels_mlp_dim"] / sizes["hidden_dim"]),
        act_layer=functools.partial(nn.GELU, approximate="tanh"),
    ).to(device)
    forward = torch.compile(model) if compile_it else model
    optimizer = adamw(model, weight_decay=0.1, beta1=0.9, beta2=0.999)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    batches = random_batches(batch, sizes["image_size"], classes)

    def step() -> None:
        images, labels, *_ = next(batches)
        pixels = normalize(images.to(device, non_blocking=True), PREPROCESSING)
        with autocast(device, precision):
            logits = forward(pixels)
        F.cross_entropy(logits.float(), labels.to(device, non_blocking=True)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


CONTESTANTS: dict[str, tuple[Callable[..., Step], bool]] = {  # (makes its step, whether freed memory is kept)
    "ours": (ours, True),
    "timm eager": (functools.partial(timms, compile_it=False), False),
    "timm compiled": (functools.partial(timms, compile_it=True), False),
    "timm compiled, tuned": (functools.partial(timms, compile_it=True), True),
}


def run_contestant(pipe: Connection, name: str, contestant: str, device: torch.device, precision: torch.dtype) -> None:
    """A contestant's process: for each number of steps received, makes them and sends the seconds; 0 ends it."""
    make_step, keeps_memory = CONTESTANTS[contestant]
    if keeps_memory and device.type == "cpu":
        keep_freed_memory()
    classes, batch, _ = BATCHES[name]
    step = make_step(sizes_of(name), classes, batch, device, precision)
    while steps := pipe.recv():
        start = time.perf_counter()
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        pipe.send(time.perf_counter() - start)


def measure(name: str, rounds: int, device: torch.device, precision: torch.dtype) -> dict:
    _, batch, steps = BATCHES[name]
    steps *= 25 if device.type == "cuda" else 1
    context, pipes = multiprocessing.get_context("spawn"), {}
    for contestant in CONTESTANTS:
        pipes[contestant], other_end = context.Pipe()
        arguments = (other_end, name, contestant, device, precision)
        context.Process(target=run_contestant, args=arguments, daemon=True).start()
        time_steps(pipes[contestant], 3)  # they start, compile and warm up one after the other
    times: dict[str, list[float]] = {contestant: [] for contestant in pipes}
    for _ in range(rounds):
        for contestant, pipe in pipes.items():
            times[contestant].append(time_steps(pipe, steps))
    for pipe in pipes.values():
        pipe.send(0)
    rates = {contestant: batch * steps / statistics.median(seconds) for contestant, seconds in times.items()}
    ratios = {
        contestant: statistics.median(a / b for a, b in zip(times[contestant], times["ours"], strict=True))
        for contestant in times
    }
    return {"batch": batch, "images_per_second": rates, "ours_over": ratios, "seconds": times}


def time_steps(pipe: Connection, steps: int) -> float:
    pipe.send(steps)
    seconds = pipe.recv()
    time.sleep(0.3)  # until the process's threads have stopped spinning
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    options = parser.parse_args()
    device = select_device(options.device)
    precision = select_precision(options.precision, device)
    results = {name: measure(name, options.rounds, device, precision) for name in options.models}
    kind = device.type
    write_results(f"train_step_{kind}", {"machine": machine(device), "precision": str(precision), "models": results})
    print(f"{machine(device)}, {precision}, {options.rounds} rounds")
    rows = [
        [name, str(found["batch"]), contestant, f"{rate:,.1f}", f"{found['ours_over'][contestant]:.3f}"]
        for name, found in results.items()
        for contestant, rate in found["images_per_second"].items()
    ]
    print_table(["model", "batch", "contestant", "images/s", "speed of ours relative to it"], rows)


if __name__ == "__main__":
    main()
