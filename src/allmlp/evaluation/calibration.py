"""Whether probabilities are what they say: of the images predicted with 80 %, 80 % should be correct."""

from dataclasses import dataclass

import numpy as np

BINS = 15


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A reliability diagram: B bins of equal width, by the probability of the predicted class.

    Bin b holds probabilities from b / B up to, and without, (b + 1) / B; the last holds 1 too.
    """

    images: np.ndarray  # (B,) int64
    confidence: np.ndarray  # (B,) float64, mean probability of the predicted class; NaN in an empty bin
    accuracy: np.ndarray  # (B,) float64, fraction of correct predictions; NaN in an empty bin

    @property
    def ece(self) -> float:
        """The expected calibration error: |accuracy − confidence|, averaged over images.

        Source: Guo et al. 2017, "On calibration of modern neural networks", Eq. 3.
        """
        gaps = np.abs(self.accuracy - self.confidence)
        return float(np.nansum(gaps * self.images) / self.images.sum())

    def rows(self) -> list[dict[str, float | int]]:
        """The bins that hold images, as JSON values."""
        size = len(self.images)
        return [
            {
                "from": b / size,
                "to": (b + 1) / size,
                "images": int(self.images[b]),
                "confidence": float(self.confidence[b]),
                "accuracy": float(self.accuracy[b]),
            }
            for b in np.flatnonzero(self.images)
        ]


def calibrate(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Calibration:
    """The reliability diagram of N predictions, from (N,) probabilities of the predicted class and (N,) bool."""
    confidence = np.asarray(confidence, dtype=np.float64)
    bin_of = np.clip((confidence * bins).astype(np.int64), 0, bins - 1)
    images = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):
        return Calibration(
            images=images,
            confidence=np.bincount(bin_of, confidence, bins) / images,
            accuracy=np.bincount(bin_of, correct, bins) / images,
        )
