"""One optimizer step, from micro-batches of uint8 pixels to new weights, in one process or in many."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from allmlp.data.loader import Batch
from allmlp.data.mixup import Mixing
from allmlp.data.transforms import normalize
from allmlp.device import autocast, exact_float32
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.distributed.parallelize import grad_sync
from allmlp.metadata import Preprocessing
from allmlp.rng import sample_keys, splitmix64
from allmlp.training.compilation import Forward
from allmlp.training.optimizer_step import OptimizerStep

LossFunction = Callable[[Tensor, Tensor], Tensor]  # (B, K) logits and (B,) labels → (B,)


class StepResult(NamedTuple):
    step: int  # steps done so far, from 1
    learning_rate: float
    loss: Tensor  # () on the device: reading it waits for the step to finish
    gradient_norm: Tensor  # () on the device, before clipping
    update_norm: Tensor  # () on the device; NaN where it was not measured
    problems: list[tuple[int, str]]  # (index, reason) of images that could not be read, on all ranks
    samples_digest: int  # of the images that made the step and their order, on all ranks
    requests: list[int]  # of all ranks, summed


class Inputs(NamedTuple):
    """A micro-batch on the device."""

    images: Tensor  # (B, C, H, W) float, normalized and mixed
    labels: Tensor  # (B,)
    valid: Tensor  # (B,) bool
    keys: Tensor  # (B,) int64, for the random masks of dropout and stochastic depth
    partner_labels: Tensor | None  # (B,) of the images mixed in
    lam: Tensor | None  # (B,) weight of ``labels``; ``partner_labels`` have 1 − lam


class InputPreparation:
    """Moves batches to the device, normalizes and mixes them.

    Args:
        device: where the model is trained.
        preprocessing: gives the input range.
        seed: seed of mixing and of the sample keys.
        mixing: mixup and CutMix, if used.
    """

    def __init__(
        self, device: torch.device, preprocessing: Preprocessing, seed: int, mixing: Mixing | None = None
    ) -> None:
        self.device, self.preprocessing, self.seed, self.mixing = device, preprocessing, seed, mixing

    def __call__(self, batch: Batch, step: int, samples: Tensor) -> Inputs:
        """``step`` counts from 1; ``samples`` (B,) are the numbers of the batch's samples within the run."""
        images = normalize(batch.images.to(self.device, non_blocking=True), self.preprocessing)
        labels, valid = (t.to(self.device, non_blocking=True) for t in (batch.labels, batch.valid))
        keys = sample_keys(self.seed, samples).to(self.device, non_blocking=True)
        if self.mixing is None:
            return Inputs(images, labels, valid, keys, None, None)
        # the same for all micro-batches of the step
        parameters = self.mixing.draw(self.seed, step - 1, *images.shape[2:])
        mix = self.mixing.mix(images, valid, parameters)
        return Inputs(mix.images, labels, valid, keys, labels[mix.partners], mix.lam)


class TrainingStep:
    """Computes gradients over the micro-batches of a step, and updates the weights.

    Args:
        forward: the model itself, compiled, or spread over processes.
        inputs: prepares batches on the device.
        loss: computes the loss of each image.
        optimizer_step: applies the gradients.
        schedule: gives the learning rate of step 0, 1, …
        precision: precision of matrix products in the forward pass.
        accumulate: number of micro-batches, all of one size, that make this process's share of a step. It changes
            memory use, not the result.
        context: a step consists of the first micro-batch of every rank, then the second of every rank, and so on.
    """

    def __init__(
        self,
        forward: Forward,
        inputs: InputPreparation,
        loss: LossFunction,
        optimizer_step: OptimizerStep,
        schedule: Callable[[int], float],
        precision: torch.dtype = torch.float32,
        accumulate: int = 1,
        context: DistributedContext = SINGLE_PROCESS,
    ) -> None:
        self.forward, self.inputs, self.loss, self.optimizer_step = forward, inputs, loss, optimizer_step
        self.schedule, self.precision, self.accumulate, self.context = schedule, precision, accumulate, context

    def __call__(
        self,
        step: int,
        micro_batches: Iterable[Batch],
        requests: Callable[[], Sequence[int]] = tuple,
        measure: bool = False,
    ) -> StepResult:
        """Makes step number ``step``, from 1.

        Args:
            step: its number.
            micro_batches: ``accumulate`` of them.
            requests: of this process, summed over all ranks together with the step's counts. Called after the backward
                passes, so that a signal during the step is noticed at its end.
            measure: compute the norm of the update.
        """
        context, rate = self.context, self.schedule(step - 1)
        self.optimizer_step.set_learning_rate(rate)
        total, readable, size, digest, problems = torch.zeros((), device=self.inputs.device), 0, 0, 0, []
        for i, batch in enumerate(micro_batches):
            position = ((step - 1) * self.accumulate + i) * context.world_size + context.rank  # among all micro-batches
            samples = torch.arange(position * len(batch.labels), (position + 1) * len(batch.labels))
            loss = self.forward_backward(self.inputs(batch, step, samples), last=i + 1 == self.accumulate)
            total = total + loss.detach()
            readable, size = readable + int(batch.valid.sum()), size + len(batch.labels)
            digest += samples_digest(samples, batch.indices)
            problems += batch.problems
        size, readable, digest, *summed_requests = context.sum([size, readable, digest, *requests()])
        if readable < size:
            problems = [problem for of_rank in context.all_gather(problems) for problem in of_rank]
        factor = size / max(readable, 1)  # the loss is the mean over the images that could be read
        total = context.mean(total)
        norm, update_norm = self.optimizer_step(step, total, factor, measure)
        return StepResult(step, rate, total * factor, norm, update_norm, problems, digest % 2**64, summed_requests)

    def forward_backward(self, inputs: Inputs, last: bool) -> Tensor:
        """The micro-batch's part of the step's loss, after its backward pass."""
        with grad_sync(self.forward, last), exact_float32():  # of the backward pass too
            with autocast(self.inputs.device, self.precision):
                logits = self.forward(inputs.images, inputs.keys)
            logits = logits.float() if logits.dtype.itemsize < 4 else logits
            losses = self.loss(logits, inputs.labels)
            if inputs.partner_labels is not None and inputs.lam is not None:
                losses = inputs.lam * losses + (1 - inputs.lam) * self.loss(logits, inputs.partner_labels)
            loss = (losses * inputs.valid).sum() / (len(inputs.labels) * self.accumulate)  # unreadable images count 0
            self.optimizer_step.backward(loss)
        return loss


def samples_digest(samples: Tensor, indices: Tensor) -> int:
    """A digest of which image was used as which sample. Digests of batches add up, modulo 2⁶⁴, in any order."""
    return int(splitmix64(splitmix64(samples) + indices).sum())
