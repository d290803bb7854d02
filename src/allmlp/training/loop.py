"""The one training loop, of one process or of many."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from allmlp.data.loader import Batch
from allmlp.data.mixup import Mixing
from allmlp.data.transforms import normalise
from allmlp.device import autocast
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.distributed.parallelize import grad_sync
from allmlp.metadata import Preprocessing
from allmlp.model import Mixer
from allmlp.rng import sample_keys, splitmix64
from allmlp.training.optimizer_step import OptimizerStep

T = TypeVar("T")


class Step(NamedTuple):
    step: int  # how many are done, from 1
    learning_rate: float
    loss: Tensor  # () on the device: reading it waits for the step to end
    gradient_norm: Tensor  # () on the device, before clipping
    update_norm: Tensor  # () on the device; NaN where it was not measured
    problems: list[tuple[int, str]]  # (index, what is wrong) of images that could not be read
    consumed: int  # a digest of which images made the step, in which order, of all processes
    asked: list[int]  # what was asked for, summed over all processes


def train_steps(
    model: Mixer,
    forward: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[Batch],
    update: OptimizerStep,
    learning_rate: Callable[[int], float],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    *,
    device: torch.device,
    precision: torch.dtype,
    preprocessing: Preprocessing,
    seed: int,
    mixing: Mixing | None = None,
    accumulate: int = 1,
    first_step: int = 0,
    measure: Callable[[int], bool] = lambda step: False,
    context: DistributedContext = SINGLE_PROCESS,
    requests: Callable[[], Sequence[int]] = tuple,
) -> Iterator[Step]:
    """Trains the model, step by step.

    Args:
        model: what the update changes.
        forward: images and their keys to logits: the model itself, compiled, or spread over the world.
        batches: ``accumulate`` of them, of one size, make this process's share of a step; how many they are changes
            nothing but the memory.
        update: the optimiser, and what guards it.
        learning_rate: of step 0, 1, ….
        loss_of: logits and labels to one loss an image.
        preprocessing: what makes the model's input of uint8.
        seed: of dropout, stochastic depth and mixing.
        first_step: how many steps are done already; the batches are those that follow.
        measure: whether step 1, 2, … is to have the norm of its update.
        world: the processes whose micro-batches, the first of each rank, then the second, make a step.
        requests: this process's, which every step carries to all.
    """
    for step, micro_batches in enumerate(in_groups(batches, accumulate), start=first_step + 1):
        model.train()
        rate = learning_rate(step - 1)
        for group in update.optimizer.param_groups:
            group["lr"] = rate
        draw = mixing.draw(seed, step - 1, *model.image_size) if mixing else None
        total, read, size, consumed, problems = torch.zeros((), device=device), 0, 0, 0, []
        for part, batch in enumerate(micro_batches, start=1):
            images = normalise(batch.images.to(device, non_blocking=True), preprocessing)
            labels, valid = (t.to(device, non_blocking=True) for t in (batch.labels, batch.valid))
            place = (
                (step - 1) * accumulate + part - 1
            ) * context.world_size + context.rank  # in the row of all micro-batches
            samples = torch.arange(place * len(labels), (place + 1) * len(labels))  # their numbers in the run
            keys = sample_keys(seed, samples).to(device, non_blocking=True)
            mix = mixing.mix(images, valid, draw) if mixing and draw else None
            with grad_sync(forward, last=part == accumulate):
                with autocast(device, precision):
                    logits = forward(mix.images if mix else images, keys)
                logits = logits.float() if logits.dtype.itemsize < 4 else logits
                losses = loss_of(logits, labels)
                if mix:
                    losses = mix.shares * losses + (1 - mix.shares) * loss_of(logits, labels[mix.partners])
                loss = (losses * valid).sum() / (len(labels) * accumulate)  # an unreadable image counts for nothing
                update.backward(loss)
            total = total + loss.detach()
            read, size = read + int(batch.valid.sum()), size + len(labels)
            consumed += digest(samples, batch.indices)
            problems += batch.problems
        size, read, consumed, *asked = context.sum([size, read, consumed, *requests()])
        if read < size:
            problems = [problem for told in context.all_gather(problems) for problem in told]
        factor = size / max(read, 1)  # the mean is over the images that could be read
        total = context.mean(total)
        norm, change = update(step, total, factor, measure(step))
        yield Step(step, rate, total * factor, norm, change, problems, consumed % 2**64, asked)


def digest(samples: Tensor, indices: Tensor) -> int:
    """Of which image was which sample; that of several batches is the sum of theirs, modulo 2⁶⁴, in any order."""
    return int(splitmix64(splitmix64(samples) + indices).sum())


def in_groups(items: Iterable[T], size: int) -> Iterator[Iterator[T]]:
    """The items, so many at a time, each fetched only when it is asked for."""
    stream = iter(items)
    for first in stream:
        yield itertools.chain([first], itertools.islice(stream, size - 1))
