"""A model that is measured: loaded, run on random images, trained on them, and unloaded."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from allmlp.device import autocast, is_out_of_memory
from allmlp.factory import Model
from allmlp.throughput.memory import available_memory, peak_growth

MakeTrainingStep = Callable[
    [Model, torch.device, torch.dtype], Callable[[int], None]
]  # → a step on a batch of this size
SAFE_SHARE = 0.85  # of the memory that is left, which a larger batch may take


class OutOfMemory(Exception):
    """A batch does not fit into memory."""


class Subject(Protocol):
    """What the rounds of a benchmark require of a model."""

    name: str

    def forward(self, batch_size: int) -> None:
        """Computes the logits of a batch, and waits for them; raises OutOfMemory if it does not fit."""
        ...

    def train(self, batch_size: int) -> None:
        """Takes one optimizer step, and waits for it; raises OutOfMemory if it does not fit."""
        ...


class ModelSubject:
    """A model on a device, with random images.

    Args:
        name: how it is reported.
        make: creates or loads the model, on the CPU.
        device, precision: those of the computation.
        make_training_step: prepares training; None: the model is not trained.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Model],
        device: torch.device,
        precision: torch.dtype,
        make_training_step: MakeTrainingStep | None = None,
    ) -> None:
        self.name, self.make, self.device, self.precision = name, make, device, precision
        self.make_training_step = make_training_step
        self.model: Model | None = None
        self.step: Callable[[int], None] | None = None
        self.images: Tensor | None = None  # the largest batch so far
        self.sizes_run: set[int] = set()
        self.sizes_trained: set[int] = set()
        self.bytes_per_image = 0.0  # of a forward pass beyond the weights: the most so far
        self.training_bytes_per_image = 0.0  # of a training step, likewise; unknown before the second
        self.trained = False

    def load(self) -> None:
        if self.model is None:
            with raising_out_of_memory():
                self.model = self.make().to(self.device).eval()

    def end_training(self) -> None:
        """Frees the optimizer and the gradients."""
        self.step = None
        if self.model is not None:
            self.model.zero_grad(set_to_none=True)
        gc.collect()

    def unload(self) -> None:
        self.model, self.step, self.images = None, None, None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def forward(self, batch_size: int) -> None:
        self.require_room(self.bytes_per_image * batch_size)
        images = self.batch(batch_size)
        with raising_out_of_memory(), torch.inference_mode(), autocast(self.device, self.precision):
            self.loaded.eval()(images)
            self.wait()
        self.sizes_run.add(batch_size)

    def train(self, batch_size: int) -> None:
        assert self.make_training_step is not None
        self.require_room(self.training_bytes_per_image * batch_size)
        with raising_out_of_memory():
            if self.step is None:
                self.step = self.make_training_step(self.loaded, self.device, self.precision)
                self.trained = False
            if not self.trained:  # allocates gradients and moments, whatever the batch
                self.take_step(batch_size)
                self.trained = True
            elif batch_size in self.sizes_trained:
                self.take_step(batch_size)
            else:
                growth = peak_growth(lambda: self.take_step(batch_size), self.device)
                self.training_bytes_per_image = max(self.training_bytes_per_image, (growth or 0) / batch_size)
                self.sizes_trained.add(batch_size)

    def take_step(self, batch_size: int) -> None:
        assert self.step is not None
        self.step(batch_size)
        self.wait()

    def peak_memory(self, batch_size: int) -> int | None:
        """Bytes of the weights and of a forward pass at its peak; None where that is not known."""
        growth = peak_growth(lambda: self.forward(batch_size), self.device)
        if growth is None:
            return None
        self.bytes_per_image = max(self.bytes_per_image, growth / batch_size)
        return growth + sum(tensor.nbytes for tensor in self.loaded.state_dict().values())

    def require_room(self, needed: float) -> None:
        """Raises OutOfMemory for more bytes than there are, where the system would end the process."""
        room = available_memory(self.device) if self.device.type == "cpu" else None
        if room is not None and needed > SAFE_SHARE * room:
            raise OutOfMemory

    def batch(self, batch_size: int) -> Tensor:
        """Random images, the first of the largest batch so far."""
        if self.images is None or len(self.images) < batch_size:
            shape = (batch_size, self.loaded.in_channels, *self.loaded.image_size)
            with raising_out_of_memory():
                self.images = torch.rand(shape, device=self.device) * 2 - 1
        return self.images[:batch_size]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    @property
    def loaded(self) -> Model:
        assert self.model is not None, "load() comes first"
        return self.model


@contextlib.contextmanager
def raising_out_of_memory() -> Iterator[None]:
    """Within the block, running out of memory is an OutOfMemory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        gc.collect()
        raise OutOfMemory from None


def fill_with_noise(model: nn.Module) -> None:
    """Gives a model that has memory, but no weights yet, small random ones: fast, where only the speed matters."""
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.uniform_(-1, 1).mul_(tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.1)
        for name, buffer in model.named_buffers():
            buffer.fill_(1.0 if name.endswith("running_var") else 0.0)
