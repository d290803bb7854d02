"""The ``Classifier`` protocol: all that evaluation and prediction need from a model.

A Mixer satisfies it, and so can an optimized engine or an ONNX session.
"""

import contextlib
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from allmlp.errors import UserError, brief
from allmlp.metadata import Metadata


@runtime_checkable
class Classifier(Protocol):
    """Images to logits. Inputs are float32, normalized as ``metadata.preprocessing`` says."""

    @property
    def metadata(self) -> Metadata:
        """Class names in the order of the logits, preprocessing, provenance."""
        ...

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        ...

    @property
    def num_classes(self) -> int:
        """0 for a model without a head, which has features but no logits."""
        ...

    @property
    def in_channels(self) -> int: ...

    def __call__(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) → (B, num_classes)."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) → (B, C): the pre-logits."""
        ...


def require_classifier(model: object) -> None:
    """Raises a UserError for what is no model, or a model without memory."""
    if not isinstance(model, Classifier):
        raise UserError(f"model {brief(model)}: give a Mixer, such as allmlp.load('model.safetensors')")
    if isinstance(model, nn.Module) and any(parameter.is_meta for parameter in model.parameters()):
        raise UserError("the model is on the meta device, which holds no weights: load or create it on another device")


@contextlib.contextmanager
def evaluation_mode(model: Classifier, device: torch.device) -> Iterator[None]:
    """Moves an ``nn.Module`` to the device and keeps it in evaluation mode within the block, then restores its mode.

    Any other classifier is left as it is.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    training = model.training
    model.to(device).eval()
    try:
        yield
    finally:
        model.train(training)
