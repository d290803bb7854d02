"""The one training loop."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from mlp_mixer.card import Preprocessing
from mlp_mixer.data.loading import Batch
from mlp_mixer.data.mixing import Mixing
from mlp_mixer.data.transforms import normalise
from mlp_mixer.device import autocast
from mlp_mixer.masks import sample_keys
from mlp_mixer.model import Mixer
from mlp_mixer.training.update import Update

T = TypeVar("T")


class Step(NamedTuple):
    step: int  # how many are done, from 1
    learning_rate: float
    loss: Tensor  # () on the device: reading it waits for the step to end
    gradient_norm: Tensor  # () on the device, before clipping
    update_norm: Tensor  # () on the device; NaN where it was not measured
    problems: list[tuple[int, str]]  # (index, what is wrong) of images that could not be read


def train_steps(
    model: Mixer,
    forward: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[Batch],
    update: Update,
    learning_rate: Callable[[int], float],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    *,
    device: torch.device,
    precision: torch.dtype,
    preprocessing: Preprocessing,
    seed: int,
    mixing: Mixing | None = None,
    accumulate: int = 1,
    measure: Callable[[int], bool] = lambda step: False,
) -> Iterator[Step]:
    """Trains the model, step by step.

    Args:
        model: what the update changes.
        forward: images and their keys to logits: the model itself or its compiled form.
        batches: ``accumulate`` of them, of one size, make a step; how many they are changes nothing but the memory.
        update: the optimiser, and what guards it.
        learning_rate: of step 0, 1, ….
        loss_of: logits and labels to one loss an image.
        preprocessing: what makes the model's input of uint8.
        seed: of dropout, stochastic depth and mixing.
        measure: whether step 1, 2, … is to have the norm of its update.
    """
    samples = 0
    for step, micro_batches in enumerate(in_groups(batches, accumulate), start=1):
        model.train()
        rate = learning_rate(step - 1)
        for group in update.optimizer.param_groups:
            group["lr"] = rate
        draw = mixing.draw(seed, step - 1, *model.image_size) if mixing else None
        total, read, size, problems = torch.zeros((), device=device), 0, 0, []
        for batch in micro_batches:
            images = normalise(batch.images.to(device, non_blocking=True), preprocessing)
            labels, valid = (t.to(device, non_blocking=True) for t in (batch.labels, batch.valid))
            keys = sample_keys(seed, torch.arange(samples, samples + len(labels))).to(device, non_blocking=True)
            mixed = mixing.mix(images, valid, draw) if mixing and draw else None
            with autocast(device, precision):
                logits = forward(mixed.images if mixed else images, keys)
            logits = logits.float() if logits.dtype.itemsize < 4 else logits
            losses = loss_of(logits, labels)
            if mixed:
                losses = mixed.shares * losses + (1 - mixed.shares) * loss_of(logits, labels[mixed.partners])
            loss = (losses * valid).sum() / (len(labels) * accumulate)  # an unreadable image counts for nothing
            update.backward(loss)
            total = total + loss.detach()
            read, size, samples = read + int(batch.valid.sum()), size + len(labels), samples + len(labels)
            problems += batch.problems
        factor = size / max(read, 1)  # the mean is over the images that could be read
        norm, change = update(step, total, factor, measure(step))
        yield Step(step, rate, total * factor, norm, change, problems)


def in_groups(items: Iterable[T], size: int) -> Iterator[Iterator[T]]:
    """The items, so many at a time, each fetched only when it is asked for."""
    stream = iter(items)
    for first in stream:
        yield itertools.chain([first], itertools.islice(stream, size - 1))
