"""The numbers of the paper's Tables 1 to 4: the files in ``published/``, with their source in ``SOURCES.md`` there."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from allmlp.throughput import device_days

IMAGENET, IMAGENET21K, JFT, WEB = "ImageNet", "ImageNet-21k", "JFT-300M", "web or pseudo-labels"
IMAGES: Mapping[str, int] = MappingProxyType(
    {IMAGENET: device_days.IMAGENET.images, IMAGENET21K: device_days.IMAGENET21K.images, JFT: device_days.JFT.images}
)
"""Training images: of ILSVRC2012; of ImageNet-21k and JFT-300M as the paper rounds them (Section 3)."""
PRETRAINING_SIZE = 224  # pixels, Section 3: "We pre-train all models at resolution 224"

# Rows of Table 2: our name, and the pixels that its ImageNet accuracy is for. Table 2 says only that Mixer's are 448,
# and footnote 2 that all are 448 and above. Table 3 has the sizes of ViT and BiT; the others are from their own papers.
TABLE_2: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "HaloNet": ("HaloNet-H4", 512),
        "Mixer-L/16": ("Mixer-L/16", 448),
        "Mixer-H/14": ("Mixer-H/14", 448),
        "ViT-L/16": ("ViT-L/16", 512),
        "ViT-H/14": ("ViT-H/14", 518),
        "BiT-R152x4": ("BiT-R152x4", 480),
        "NFNet-F4+": ("NFNet-F4+", 512),
        "MPL": ("EfficientNet-B6-Wide", 512),
        "ALIGN": ("EfficientNet-L2", 600),
    }
)


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A row of Table 2 or 3. None: the table has no number there. Accuracies are in percent."""

    model: str  # as the table calls it
    system: str  # as ``allmlp.create`` calls it
    image_size: int  # of fine-tuning and of the throughput, in pixels
    data: str  # of pre-training: IMAGENET, IMAGENET21K, JFT or WEB
    epochs: int | None  # of pre-training
    top1: float | None
    real_top1: float | None
    average_of_five: float | None
    vtab: float | None
    images_per_second: float | None  # on one core of a TPU-v3
    core_days: float | None  # of pre-training, on TPU-v3
    preprint_only: bool = False
    note: str = ""

    @property
    def key(self) -> str:
        """The architecture at its image size; rows with the same key have the same speed."""
        return system_key(self.system, self.image_size)

    @property
    def pretraining_key(self) -> str | None:
        """What was pre-trained; None where the table does not tell for how many images."""
        known = self.epochs is not None and self.data in IMAGES
        return system_key(self.system, PRETRAINING_SIZE) if known else None

    @property
    def images_seen(self) -> int | None:
        """In pre-training."""
        return self.epochs * IMAGES[self.data] if self.epochs is not None and self.data in IMAGES else None


def system_key(system: str, image_size: int) -> str:
    return f"{system} at {image_size}"


@cache
def read_table(number: int) -> tuple[Mapping[str, str], ...]:
    """The rows of a table, with the text of each cell by the header of its column."""
    file = Path(__file__).with_name("published") / f"table{number}.csv"
    with file.open(encoding="utf-8", newline="") as stream:
        return tuple(MappingProxyType(row) for row in csv.DictReader(stream))


def number_in(text: str) -> float | None:
    """The number of a cell; None for an empty one."""
    return float(text) if text else None


@cache
def table_2() -> tuple[PublishedRow, ...]:
    """Table 2. The epochs of the rows that Table 3 has too are from there: Table 2 prints none."""
    rows = []
    for row in read_table(2):
        system, size = TABLE_2[row["model"]]
        data = data_of(row["pretrain_data"])
        epochs = {
            other.epochs for other in table_3() if (other.system, other.image_size, other.data) == (system, size, data)
        }
        rows.append(
            PublishedRow(
                model=row["model"],
                system=system,
                image_size=size,
                data=data,
                epochs=epochs.pop() if len(epochs) == 1 else None,
                vtab=number_in(row["vtab1k_19tasks_pct"]),
                **shared_columns(row),
            )
        )
    return tuple(rows)


@cache
def table_3() -> tuple[PublishedRow, ...]:
    """Table 3, with the three rows that only the preprint has."""
    return tuple(
        PublishedRow(
            model=row["model"],
            system=row["model"],
            image_size=int(row["finetune_image_size_px"]),
            data=data_of(row["pretrain_data"]),
            epochs=int(row["pretrain_epochs"]),
            vtab=None,
            preprint_only=row["row_in_v2"] == "no",
            **shared_columns(row),
        )
        for row in read_table(3)
    )


def shared_columns(row: Mapping[str, str]) -> dict[str, Any]:
    return {
        "top1": number_in(row["imagenet_top1_pct"]),
        "real_top1": number_in(row["imagenet_real_top1_pct"]),
        "average_of_five": number_in(row["avg5_top1_pct"]),
        "images_per_second": number_in(row["throughput_img_per_sec_per_tpuv3_core"]),
        "core_days": number_in(row["pretrain_tpuv3_core_days"]),
        "note": row["notes"],
    }


def data_of(text: str) -> str:
    """The name of the data in a table's heading, such as "ImageNet-21k (with extra regularization)"."""
    name = text.partition(" (")[0]
    return name if name in IMAGES else WEB
