"""A comparison system as a classifier, with the attributes and methods that a ``Mixer`` has."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from allmlp.errors import UserError
from allmlp.initial_weights import copy_into
from allmlp.metadata import Metadata
from allmlp.sizes import Size, check_images, whole_number
from allmlp.timm_methods import SCORES, after_resize
from allmlp.zoo.configuration import complete
from allmlp.zoo.families import FAMILIES
from allmlp.zoo.randomness import SampleKeys, install_keyed_dropout
from allmlp.zoo.resolution import resized_backbone


class ZooModel(nn.Module):
    """(B, in_channels, H, W) → (B, num_classes); with ``num_classes=0``, the pre-logits features (B, C).

    ``backbone`` is timm's model without its head, and ``head`` a linear layer that starts at zero.

    Args:
        system: the family, a key of ``FAMILIES``.
        num_classes: size of the head; 0 leaves it out.
        image_size: height and width in pixels, or one number for both.
        in_channels: number of channels of the images.
        dropout: where the authors of the family have it: in ViT after dense layers, else before the head.
        stochastic_depth: probability to drop a block's branch in training; rises linearly from 0 to this.
        rescale: divide the branches that are kept by 1 − p.
        seed: seed of the initial weights, which are those of timm for the family; None draws one.
        sizes: those of the family, see ``FAMILIES``.

    Raises:
        UserError: an unknown, missing or invalid size (with what is valid), or timm is not installed.

    The attribute ``metadata`` holds class names and preprocessing, ``config`` these arguments (without the seed).
    """

    def __init__(
        self,
        *,
        system: str,
        num_classes: int,
        image_size: Size,
        in_channels: int = 3,
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        rescale: bool = False,
        seed: int | None = None,
        **sizes: Any,
    ) -> None:
        super().__init__()
        common = {"num_classes": num_classes, "image_size": image_size, "in_channels": in_channels}
        rates = {"dropout": dropout, "stochastic_depth": stochastic_depth, "rescale": rescale}
        self.config: dict[str, Any] = complete(system, {**common, **rates, **sizes})
        self.num_classes, self.in_channels = self.config["num_classes"], self.config["in_channels"]
        self.image_size: tuple[int, int] = self.config["image_size"]
        self.metadata = Metadata()
        self.sample_keys = SampleKeys()

        device = torch.get_default_device()
        if device.type == "meta":
            self.backbone = self.build_backbone()
        else:
            number = int(torch.randint(2**62, (), device="cpu")) if seed is None else whole_number("seed", seed, 0)
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.manual_seed(number)
                self.backbone = self.build_backbone()
            self.backbone.to(device)
        rate = dropout if FAMILIES[system].head_dropout else 0.0
        self.head_dropout = install_keyed_dropout(self.backbone, self.sample_keys, rescale, rate)
        self.head = zero_head(self.num_features, self.num_classes, device=device)

    def build_backbone(self) -> nn.Module:
        """timm's model for this configuration, with timm's initial weights from torch's generator."""
        backbone = FAMILIES[self.config["system"]].build(self.config)
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):  # the counter is an integer that only a momentum of None would use
                module.num_batches_tracked = None
                module.register_load_state_dict_pre_hook(without_counter)
        return backbone

    @property
    def blocks(self) -> list[nn.Module]:
        """The residual blocks, in the order of computation."""
        return FAMILIES[self.config["system"]].blocks(self.backbone)

    @property
    def num_features(self) -> int:
        """C, the size of the features."""
        return self.backbone.num_features  # pyright: ignore[reportReturnType]

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) → timm's output before pooling: (B, 1 + S, C) of ViT, (B, C, rows, columns) else."""
        weight = next(self.backbone.parameters())
        check_images(images, self.in_channels, self.image_size, weight.device)
        return self.backbone.forward_features(images.to(weight.dtype))  # pyright: ignore[reportCallIssue]

    def forward_head(self, output: Tensor, pre_logits: bool = False) -> Tensor:
        """The output of ``forward_features`` → (B, num_classes), or (B, C) with ``pre_logits``."""
        features = self.backbone.forward_head(output, pre_logits=True)  # pyright: ignore[reportCallIssue]
        return features if pre_logits else self.head(self.head_dropout(features))

    def forward_intermediates(self, images: Tensor, *arguments: Any, **options: Any) -> Any:
        """timm's: the output before pooling, and the outputs of chosen blocks or stages."""
        return self.backbone.forward_intermediates(images, *arguments, **options)  # pyright: ignore[reportCallIssue]

    def features(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """(B, in_channels, H, W) → (B, C): the pre-logits. ``keys``: see ``Mixer.tokens``."""
        self.sample_keys.value = keys
        return self.forward_head(self.forward_features(images), pre_logits=True)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        return self.head(self.head_dropout(self.features(images, keys)))

    def train(self, mode: bool = True) -> "ZooModel":
        """A frozen backbone stays in evaluation mode: BatchNorm would update its statistics otherwise."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.backbone.parameters()):
            self.backbone.eval()
        return self

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the head, in place, by a zero one; 0 leaves it out. See ``Mixer.reset_classifier``.

        Raises:
            UserError: a negative number of classes.
        """
        self.num_classes = whole_number("num_classes", num_classes, 0)
        self.config = self.config | {"num_classes": self.num_classes}
        like = next(self.backbone.parameters())
        self.head = zero_head(self.num_features, self.num_classes, device=like.device, dtype=like.dtype)
        self.head.train(self.training)
        provenance = {key: value for key, value in self.metadata.provenance.items() if key not in SCORES}
        self.metadata = replace(self.metadata, classes=None, provenance=provenance)

    def set_input_size(self, img_size: Size) -> None:
        """Prepares the model, in place, for images of another size; position embeddings are interpolated.

        Raises:
            UserError: a size that the system cannot take.
        """
        config, old_size = complete(self.config["system"], self.config | {"image_size": img_size}), self.image_size
        if config["image_size"] == old_size:
            return
        resized_backbone(self.backbone, self.config, config)
        self.config, self.image_size = config, config["image_size"]
        self.metadata = replace(self.metadata, provenance=after_resize(self.metadata.provenance, old_size))


def zero_head(features: int, classes: int, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """A dense layer of zeros, which draws no random numbers; without classes, the identity."""
    if not classes:
        return nn.Identity()
    head = nn.Linear(features, classes, device="meta", dtype=dtype)
    if device.type != "meta":
        head.to_empty(device=device)
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
    return head


def without_counter(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Removes the counter that PyTorch adds to a state dict without one when it loads batch normalization."""
    state.pop(f"{prefix}num_batches_tracked", None)


def init_zoo_weights(model: ZooModel, seed: int, copy_: Callable[[Tensor, Tensor], None] = copy_into) -> None:
    """Draws the initial weights of a model that was built on the meta device: those that its constructor draws.

    Args:
        model: with memory on any device.
        seed: seed of the weights.
        copy_: writes a full value into a parameter, which may hold only a shard of it.
    """
    with torch.device("cpu"):
        drawn = ZooModel(**model.config, seed=seed)
    values = dict(drawn.named_parameters()) | dict(drawn.named_buffers())
    for name, target in [*model.named_parameters(), *model.named_buffers()]:
        copy_(target, values[name].detach().to(target.dtype))


def require_batches(model: nn.Module, batch_size: int) -> None:
    """Raises a UserError for a batch of one image where the model has BatchNorm, which needs several."""
    if batch_size == 1 and any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        raise UserError(
            "a batch of 1 image, and this model has batch normalization: use batches, and micro-batches, of at least 2"
        )
