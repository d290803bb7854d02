"""What pre-training takes, as the paper counts it (Tables 2 and 3): a device's days for all the images that are seen.

The paper gives core-days of TPU-v3; here the training throughput that was measured on another device takes its place.
"""

from dataclasses import dataclass

DAY = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """A data set, and how often its images are seen."""

    data: str
    images: int
    epochs: int

    @property
    def name(self) -> str:
        return f"{self.data}, {self.epochs} epochs"


# 14.2 million: as the paper gives ImageNet-21k
IMAGENET = Pretraining(data="ImageNet", images=1_281_167, epochs=300)
IMAGENET21K = Pretraining(data="ImageNet-21k", images=14_200_000, epochs=300)
JFT_SHORT = Pretraining(data="JFT-300M", images=300_000_000, epochs=7)
JFT = Pretraining(data="JFT-300M", images=300_000_000, epochs=14)
PRETRAININGS = (IMAGENET, IMAGENET21K, JFT_SHORT, JFT)


def device_days(pretraining: Pretraining, train_images_per_second: float) -> float:
    return pretraining.images * pretraining.epochs / train_images_per_second / DAY
