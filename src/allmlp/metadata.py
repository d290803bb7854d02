"""The metadata of weights: what prediction needs besides the tensors, and where the weights come from."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from allmlp.errors import UserError

Interpolation = Literal["nearest", "bilinear", "bicubic"]
Crop = Literal["resmall", "resize"]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an upright RGB image becomes the model's input: evaluation, prediction, and training without augmentation.

    ``crop="resmall"`` resizes the shorter side to ``image size / crop_ratio`` and cuts out the center (the paper's
    Table 3, 256 → 224); ``"resize"`` resizes both sides, which changes the aspect ratio (Table 2).
    """

    crop: Crop = "resmall"
    crop_ratio: float = 224 / 256
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of pixel values in [0, 1]; with std 0.5 the input lies in [−1, 1]
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        """Raises a UserError that names the field, since metadata may come from any file."""
        for name, kind in (("crop", Crop), ("interpolation", Interpolation)):
            if getattr(self, name) not in get_args(kind):
                raise UserError(f"{name} = {getattr(self, name)!r}: must be one of {', '.join(get_args(kind))}")
        ratio = self.crop_ratio
        if not (isinstance(ratio, int | float) and 0 < ratio <= 1):
            raise UserError(f"crop_ratio = {ratio!r}: must be a number above 0 and at most 1")
        for name in ("mean", "std"):
            values = getattr(self, name)
            numbers = isinstance(values, tuple) and all(isinstance(v, int | float) and math.isfinite(v) for v in values)
            if not (numbers and values):
                raise UserError(f"{name} = {values!r}: must be a tuple of numbers, one for each channel")
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise UserError(f"std = {self.std!r}: must be as many positive numbers as the mean, {self.mean!r}")


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Class names in the order of the logits (None: unknown), preprocessing, and where the weights come from."""

    classes: tuple[str, ...] | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    provenance: dict[str, Any] = field(default_factory=dict)
