"""The model that a run starts from: new, or pretrained weights with a new head and perhaps another image size."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from allmlp.distributed.parallelize import copy_to_shard
from allmlp.factory import Model, build_meta, create, init_weights
from allmlp.metadata import Metadata, Preprocessing


@dataclass(frozen=True)
class ModelInitializer:
    """Makes a model in two steps, so that it can be sharded in between; calling it does both, on the CPU."""

    build_meta: Callable[[tuple[str, ...]], Model]  # class names → the model without memory, on the meta device
    init_weights: Callable[[Model], None]  # fills its memory

    def __call__(self, classes: tuple[str, ...]) -> Model:
        model = self.build_meta(classes).to_empty(device="cpu")
        self.init_weights(model)
        return model


def from_scratch(
    sizes: dict[str, Any], preprocessing: Preprocessing, seed: int, head_bias: float, provenance: dict[str, Any]
) -> ModelInitializer:
    """A new model with its authors' initial weights.

    Args:
        sizes: arguments of ``create``, without the number of classes.
        preprocessing, provenance: become the model's metadata.
        seed: seed of the weights.
        head_bias: initial bias of every class.

    Raises:
        UserError: sizes that do not fit together.
    """

    def build(classes: tuple[str, ...]) -> Model:
        with torch.device("meta"):
            model = create(num_classes=len(classes), **sizes)
        model.metadata = Metadata(classes=classes, preprocessing=preprocessing, provenance=provenance)
        return model

    def init(model: Model) -> None:
        init_weights(model, seed, copy_to_shard)
        torch.nn.init.constant_(model.get_parameter("head.bias"), head_bias)

    build(("a", "b"))  # so that wrong sizes are reported before any data is read
    return ModelInitializer(build, init)


def from_weights(
    pretrained: Model,
    regularization: dict[str, Any],
    preprocessing: Preprocessing,
    frozen: bool,
    head_bias: float,
    provenance: dict[str, Any],
) -> ModelInitializer:
    """Pretrained weights with a new head for other classes, as the authors fine-tune (Section 3).

    Args:
        pretrained: the pretrained model, at the image size of the run.
        regularization: dropout, stochastic_depth and rescale, arguments of the model.
        preprocessing, provenance: become the model's metadata; where the weights come from is added.
        frozen: train the head alone.
        head_bias: initial bias of every class; the head's weights start at zero.
    """

    def build(classes: tuple[str, ...]) -> Model:
        model = with_new_head(pretrained, len(classes), **regularization)
        if frozen:
            model.requires_grad_(False)
            model.head.requires_grad_(True)
        model.metadata = Metadata(classes=classes, preprocessing=preprocessing, provenance=copy.deepcopy(provenance))
        return model

    return ModelInitializer(build, lambda model: load_weights(model, pretrained, head_bias))


def with_new_head(pretrained: Model, num_classes: int, **changes: Any) -> Model:
    """A model of the same sizes with a head for other classes, on the meta device.

    ``changes`` are other arguments of the model. Weights of 16 bits become float32, exactly: they would lose the small
    updates of training.
    """
    model = build_meta({**pretrained.config, "num_classes": num_classes, **changes})
    return model.to(torch.promote_types(next(pretrained.parameters()).dtype, torch.float32))


def load_weights(model: Model, pretrained: Model, head_bias: float = 0.0) -> None:
    """Copies the pretrained weights bit for bit, except the head, which becomes zero with the given bias."""
    state = pretrained.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("head."):
                parameter.zero_()
            else:
                copy_to_shard(parameter, state[name])
        for name, buffer in model.named_buffers():
            buffer.copy_(state[name])
    torch.nn.init.constant_(model.get_parameter("head.bias"), head_bias)
