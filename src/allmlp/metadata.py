"""What travels with weights, beside the tensors: everything that is needed to predict with them."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from allmlp.errors import UserError

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

    def __post_init__(self) -> None:
        """Raises a UserError that names the field, for a card may come from any file."""
        for name, kind in (("crop", Crop), ("interpolation", Interpolation)):
            if getattr(self, name) not in get_args(kind):
                raise UserError(f"{name} = {getattr(self, name)!r}: use one of {', '.join(get_args(kind))}")
        ratio = self.crop_ratio
        if not (isinstance(ratio, int | float) and 0 < ratio <= 1):
            raise UserError(f"crop_ratio = {ratio!r}: a number above 0 and at most 1")
        for name in ("mean", "std"):
            values = getattr(self, name)
            numbers = isinstance(values, tuple) and all(isinstance(v, int | float) and math.isfinite(v) for v in values)
            if not (numbers and values):
                raise UserError(f"{name} = {values!r}: a number for each channel")
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise UserError(f"std = {self.std!r}: as many positive numbers as the mean, {self.mean!r}, has")


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Class names in the order of the logits (None: not known), preprocessing, and where the weights come from."""

    classes: tuple[str, ...] | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    provenance: dict[str, Any] = field(default_factory=dict)
