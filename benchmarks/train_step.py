"""Training throughput as shipped, against timm's MlpMixer of the same sizes, in one run, alternating.

    python benchmarks/train_step.py                       # both models; about seven minutes on two cores
    python benchmarks/train_step.py --models cifar10

Each contestant has a process of its own, as its user would, and the rounds alternate between them. All sides: the tanh
GELU, the same AdamW (kernels decay, fused), gradients clipped at norm 1, the same precision and uint8 batches of random
pixels, no data loading. Ours is the loop that `mixer train` runs, with the model compiled and the allocator set as
there; timm's is a plain loop, eager and with torch.compile; "timm compiled, tuned" has our allocator setting too. A
contestant's figure is its median, a ratio the median of the ratios within a round.
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
from common import machine, print_table, write_results
from timm.models.mlp_mixer import MlpMixer
from torch import nn

import allmlp
from allmlp.data.loader import Batch
from allmlp.data.transforms import normalise
from allmlp.device import autocast, select_device, select_precision
from allmlp.metadata import Preprocessing
from allmlp.recipes import get_recipe
from allmlp.training.compilation import compile_model
from allmlp.training.loop import train_steps
from allmlp.training.losses import softmax
from allmlp.training.memory import keep_freed_memory
from allmlp.training.optimizer import adamw
from allmlp.training.optimizer_step import OptimizerStep
from allmlp.variants import VARIANTS

BATCHES = {"cifar10": (10, 128, 4), "B/16": (1000, 32, 1)}  # classes, batch, steps a round (GPU: 25 times as many)
VIEW = Preprocessing()
Step = Callable[[], object]


def sizes_of(name: str) -> dict[str, int]:
    """Of a variant of Table 1, or of a recipe's model."""
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
    steps = train_steps(
        model,
        forward,
        random_batches(batch, sizes["image_size"], classes),
        OptimizerStep(adamw(model, weight_decay=0.1, beta1=0.9, beta2=0.999), clip_norm=1.0),
        lambda step: 1e-3,
        softmax,
        device=device,
        precision=precision,
        preprocessing=VIEW,
        seed=0,
    )
    return functools.partial(next, steps)


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
        pixels = normalise(images.to(device, non_blocking=True), VIEW)
        with autocast(device, precision):
            logits = forward(pixels)
        F.cross_entropy(logits.float(), labels.to(device, non_blocking=True)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


CONTESTANTS: dict[str, tuple[Callable[..., Step], bool]] = {  # how to make its step, whether freed memory is kept
    "ours": (ours, True),
    "timm eager": (functools.partial(timms, compile_it=False), False),
    "timm compiled": (functools.partial(timms, compile_it=True), False),
    "timm compiled, tuned": (functools.partial(timms, compile_it=True), True),
}


def work(pipe: Connection, name: str, who: str, device: torch.device, precision: torch.dtype) -> None:
    """A contestant's process: for each number of steps that it is sent, answers with the seconds they took."""
    make, keeps = CONTESTANTS[who]
    if keeps and device.type == "cpu":
        keep_freed_memory()
    classes, batch, _ = BATCHES[name]
    step = make(sizes_of(name), classes, batch, device, precision)
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
    for who in CONTESTANTS:
        pipes[who], theirs = context.Pipe()
        context.Process(target=work, args=(theirs, name, who, device, precision), daemon=True).start()
        seconds(pipes[who], 3)  # starts, compiles and warms up, one after the other
    times: dict[str, list[float]] = {who: [] for who in pipes}
    for _ in range(rounds):
        for who, pipe in pipes.items():
            times[who].append(seconds(pipe, steps))
    for pipe in pipes.values():
        pipe.send(0)
    rates = {who: batch * steps / statistics.median(taken) for who, taken in times.items()}
    ratios = {
        who: statistics.median(theirs / mine for theirs, mine in zip(times[who], times["ours"], strict=True))
        for who in times
    }
    return {"batch": batch, "images_per_second": rates, "ours_over": ratios, "seconds": times}


def seconds(pipe: Connection, steps: int) -> float:
    pipe.send(steps)
    taken = pipe.recv()
    time.sleep(0.3)  # until its threads have stopped spinning
    return taken


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
        [name, str(found["batch"]), who, f"{rate:,.1f}", f"{found['ours_over'][who]:.3f}"]
        for name, found in results.items()
        for who, rate in found["images_per_second"].items()
    ]
    print_table(["model", "batch", "who", "images/s", "ours is faster by"], rows)


if __name__ == "__main__":
    main()
