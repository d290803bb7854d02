"""The paper's losses, one value per image; the loss of a batch is their mean.

To add one: the function here, its name in ``config.recipe.LossName``. Mixup adds the losses of an image's two labels,
weighted by their shares: the loss of the mixed label, if the loss is linear in the target, as these are.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from allmlp.config.recipe import LossName


def softmax(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy over exclusive classes: (B, K) logits, (B,) labels → (B,).

    ``smoothing`` is the share of the target that is spread over all classes (Szegedy et al. 2016).
    """
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)


def sigmoid(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Binary cross-entropy of each class, summed over the classes: (B, K) logits, (B,) labels → (B,).

    The authors pre-train with it. Their head bias of −6.9 (ImageNet) or −10 (ImageNet-21k) makes the initial
    probability of each class about its frequency.
    """
    target = (1 - smoothing) * logits.gather(1, labels[:, None])[:, 0] + smoothing * logits.mean(1)
    return F.softplus(logits).sum(1) - target


LOSSES: dict[LossName, Callable[..., Tensor]] = {"softmax": softmax, "sigmoid": sigmoid}
