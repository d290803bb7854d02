"""The paper's losses, one number an image; a batch's loss is their mean over the images.

Both are linear in the target, so an image mixed from two has the two labels' losses in the same shares.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Loss = Literal["softmax", "sigmoid"]


def softmax(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy over exclusive classes: (B, K) logits, (B,) labels → (B,).

    ``smoothing`` is the share of the target that is spread over all classes (Szegedy et al. 2016).
    """
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)


def sigmoid(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Binary cross-entropy of each class by itself, summed over the classes: (B, K) logits, (B,) labels → (B,).

    The authors pre-train with it, from a head bias of −6.9 (ImageNet) or −10 (ImageNet-21k), at which each class is as
    improbable at the start as it is rare.
    """
    target = (1 - smoothing) * logits.gather(1, labels[:, None])[:, 0] + smoothing * logits.mean(1)
    return F.softplus(logits).sum(1) - target


LOSSES = {"softmax": softmax, "sigmoid": sigmoid}
