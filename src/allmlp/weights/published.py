"""The checkpoints that the authors and others published: their sizes, training data, accuracy and classes."""

import importlib.metadata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from allmlp.metadata import Preprocessing
from allmlp.variants import variant_of


@dataclass(frozen=True, kw_only=True)
class PublishedCheckpoint:
    """A published file. ``top1`` is on ImageNet's validation set, according to ``source``; None: not published."""

    file: str  # path below gs://mixer_models/, or "timm/" and timm's name
    variant: str
    data: str
    classes: int
    top1: float | None = None
    source: str
    note: str = ""
    image_size: int = 224
    sha256: str = ""  # first digits, of timm's .pth file

    @property
    def authors(self) -> bool:
        return self.file.endswith(".npz")


SCRATCH, IN21K = "ImageNet, from scratch, 300 epochs", "ImageNet-21k, 300 epochs"
IN21K_P = "ImageNet-21K-P (11,221 classes), Ridnik et al. 2021"
PAPER, TIMM_TABLE = "Tolstikhin et al. 2021, Table 3", "timm's results table"
SAM = "When Vision Transformers Outperform ResNets (arXiv:2106.01548)"
GSAM = "Surrogate Gap Minimization (arXiv:2203.08065)"
NOT_TUNED = "the paper's 80.64 % (B/16) and 82.89 % (L/16) are after fine-tuning on ImageNet, not published as weights"
MISNAMED = "despite its name not fine-tuned from ImageNet-21k: it contains the authors' from-scratch ImageNet weights"
UNVERIFIED = "the file name is from third-party scripts; an ImageNet head is assumed"
NO_TOP1 = f"no published top-1 was found; {UNVERIFIED}"


def row(file: str, variant: str, data: str, classes: int, source: str, **more: Any) -> PublishedCheckpoint:
    return PublishedCheckpoint(file=file, variant=variant, data=data, classes=classes, source=source, **more)


CHECKPOINTS = (
    row("imagenet1k/Mixer-B_16.npz", "B/16", SCRATCH, 1000, PAPER, top1=0.7644),
    row("imagenet1k/Mixer-L_16.npz", "L/16", SCRATCH, 1000, PAPER, top1=0.7176),
    row("imagenet21k/Mixer-B_16.npz", "B/16", IN21K, 21843, PAPER, note=NOT_TUNED),
    row("imagenet21k/Mixer-L_16.npz", "L/16", IN21K, 21843, PAPER, note=NOT_TUNED),
    row("sam/Mixer-B_16.npz", "B/16", "ImageNet, from scratch, SAM", 1000, SAM, top1=0.774),
    row("sam/Mixer-B_32.npz", "B/32", "ImageNet, from scratch, SAM", 1000, SAM, note=NO_TOP1),
    *(
        row(f"gsam/Mixer-{name.replace('/', '_')}.npz", name, "ImageNet, from scratch, GSAM", 1000, GSAM,
            note=NO_TOP1)
        for name in ("S/32", "S/16", "S/8", "B/32", "B/16")
    ),
    row("timm/mixer_b16_224.goog_in21k_ft_in1k", "B/16", SCRATCH, 1000, TIMM_TABLE, top1=0.76602, note=MISNAMED,
        sha256="76587d61"),
    row("timm/mixer_l16_224.goog_in21k_ft_in1k", "L/16", SCRATCH, 1000, TIMM_TABLE, top1=0.72054, note=MISNAMED,
        sha256="92f9adc4"),
    row("timm/mixer_b16_224.goog_in21k", "B/16", IN21K, 21843, TIMM_TABLE, sha256="617b3de2"),
    row("timm/mixer_l16_224.goog_in21k", "L/16", IN21K, 21843, TIMM_TABLE, sha256="846aa33c"),
    row("timm/mixer_b16_224.miil_in21k", "B/16", IN21K_P, 11221, TIMM_TABLE, sha256="2a558a71"),
    row("timm/mixer_b16_224.miil_in21k_ft_in1k", "B/16", f"{IN21K_P}, then ImageNet", 1000, TIMM_TABLE,
        top1=0.82306, sha256="9229a591"),
)  # fmt: skip

MIIL_CLASSES = 11221
MIIL = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # as MIIL trained: pixels in [0, 1]
SYNSETS = {
    1000: "imagenet_synsets.txt",
    21843: "imagenet21k_goog_synsets.txt",
    MIIL_CLASSES: "imagenet21k_miil_synsets.txt",
}


def candidates(config: Mapping[str, Any], authors: bool) -> list[PublishedCheckpoint]:
    """The published checkpoints of these sizes and number of classes, by the authors or in timm."""
    if config["image_size"] != (224, 224):
        return []
    wanted = (variant_of(config), config["num_classes"], authors)
    return [c for c in CHECKPOINTS if (c.variant, c.classes, c.authors) == wanted]


@cache
def class_names(classes: int) -> tuple[str, ...] | None:
    """Names of ImageNet's 1,000, ImageNet-21k's 21,843 or MIIL's 11,221 classes in the order of the published heads.

    They are read from timm's data files, without importing timm; None if timm is not installed, or for other numbers.
    """
    synsets = synset_names(classes)
    return tuple(synsets.values()) if synsets else None


@cache
def synset_names(classes: int) -> dict[str, str]:
    """WordNet synset ("n01440764") → class name, in the order of the published heads; empty if unknown."""
    if classes not in SYNSETS:
        return {}
    try:
        timm = importlib.metadata.distribution("timm")
        folder = Path(str(timm.locate_file("timm/data/_info")))
        synsets = (folder / SYNSETS[classes]).read_text(encoding="utf-8").split()
        lines = (folder / "imagenet_synset_to_lemma.txt").read_text(encoding="utf-8").splitlines()
    except (importlib.metadata.PackageNotFoundError, OSError):
        return {}
    words = dict(line.split("\t", 1) for line in lines if "\t" in line)
    names = [words.get(synset, synset) for synset in synsets]
    counts = Counter(names)  # two of ImageNet's classes are called "crane"
    unique = (f"{name} ({synset})" if counts[name] > 1 else name for synset, name in zip(synsets, names, strict=True))
    return dict(zip(synsets, unique, strict=True)) if len(set(synsets)) == classes else {}
