"""The accuracy of weights, for the cells of Tables 2 and 3."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from allmlp.api.evaluate import Part, evaluate
from allmlp.device import Precision
from allmlp.factory import is_zoo
from allmlp.metadata import Crop
from allmlp.weights.load import load


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Of one model on the images, in percent."""

    weights: str
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    images: int
    top1: float
    real_top1: float | None  # None: the images are not ImageNet's validation images


@dataclass(frozen=True, kw_only=True)
class AccuracyOptions:
    data: str
    part: Part = "test"
    real_labels: Path | None = None
    device: str = "auto"
    precision: Precision = "auto"
    progress: bool | None = None


def measure_accuracy(weights: str, table: Literal["table2", "table3"], options: AccuracyOptions) -> Accuracy:
    """Evaluates weights as the table does, with its crop for the family (Supplement C).

    Raises:
        UserError: weights or data that cannot be read, or do not fit together.
    """
    model = load(weights)
    result = evaluate(
        model,
        options.data,
        part=options.part,
        crop=crop_of(table, model.config),
        real_labels=options.real_labels,
        device=options.device,
        precision=options.precision,
        progress=options.progress,
    )
    return Accuracy(
        weights=weights,
        config=model.config,
        provenance=model.metadata.provenance,
        images=len(result.labels),
        top1=100 * result.top1,
        real_top1=None if result.real is None else 100 * result.real.top1,
    )


def crop_of(table: str, config: Mapping[str, Any]) -> Crop | None:
    """Table 2 resizes both sides for Mixer; Table 3 the shorter side for Mixer and ViT, and both for BiT on ImageNet.

    None: the paper does not say, so as the weights do.
    """
    family = config["system"] if is_zoo(config) else "mixer"
    crops: dict[tuple[str, str], Crop] = {
        ("table2", "mixer"): "resize",
        ("table3", "mixer"): "resmall",
        ("table3", "vit"): "resmall",
        ("table3", "bit"): "resize",
    }
    return crops.get((table, family))
