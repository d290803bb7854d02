"""What travels with weights, beside the tensors: everything that is needed to predict with them."""

from dataclasses import dataclass, field
from typing import Any, Literal

Interpolation = Literal["nearest", "bilinear", "bicubic"]
Crop = Literal["resmall", "resize"]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From an upright RGB image to the model's input: evaluation, prediction, and training without augmentation.

    With ``crop="resmall"`` the shorter side is resized to ``image size / crop_ratio`` and the centre is cut out (the
    paper's Table 3, 256 → 224); with ``"resize"`` both sides are, so the aspect changes (Table 2).
    """

    crop: Crop = "resmall"
    crop_ratio: float = 224 / 256
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of pixel values in [0, 1]; with std 0.5 the input lies in [−1, 1]
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class Card:
    """Class names in the order of the logits (None: not known), preprocessing, and where the weights come from."""

    classes: tuple[str, ...] | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    provenance: dict[str, Any] = field(default_factory=dict)
