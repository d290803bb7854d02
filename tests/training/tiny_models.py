"""Models of a few hundred weights and the paper's optimizers for them, shared by the tests of this folder."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from allmlp.data.loader import Batch
from allmlp.model import Mixer
from allmlp.training.optimizer import adamw, sgd
from allmlp.training.step import Forward

MAKE_OPTIMIZER: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": partial(adamw, weight_decay=0.1, beta1=0.9, beta2=0.999),
    "sgd": partial(sgd, momentum=0.9),
    "plain": partial(sgd, momentum=0.0),
}
NOISY = {"dropout": 0.3, "stochastic_depth": 0.6}


def tiny(**options) -> Mixer:
    """A Mixer for 4 × 4 px with a random head: a fresh head is zero, and the rest would get no gradient."""
    sizes = {"num_classes": 3, "image_size": 4, "patch_size": 2, "num_blocks": 2, "hidden_dim": 8}
    model = Mixer(**sizes | {"tokens_mlp_dim": 6, "channels_mlp_dim": 16, "seed": 0} | options)
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(5))
    return model


def tiny_images(seed: int = 1) -> Tensor:
    return torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def batch_of(n: int, seed: int = 0, invalid: tuple[int, ...] = ()) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 4, 4), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (n,), generator=generator)
    valid = torch.tensor([i not in invalid for i in range(n)])
    return Batch(images, labels, valid, torch.arange(n), [(i, "broken") for i in invalid])


def recorded(model: Mixer, seen: list[Tensor]) -> Forward:
    """The model's forward pass, which keeps images, keys and logits in ``seen``."""

    def forward(images: Tensor, keys: Tensor) -> Tensor:
        logits = model(images, keys)
        seen.extend((images, keys, logits.detach().clone()))
        return logits

    return forward
