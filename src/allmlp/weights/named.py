"""Published weights by short names: what they are, where they are on the Hugging Face hub, and how large.

``load("mixer-b16-in21k")`` and every command that takes WEIGHTS resolve these names. A file or folder of the same name
comes first.
"""

import difflib
import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from allmlp.errors import UserError, printable
from allmlp.factory import resolve_name
from allmlp.weights.hub import HUB_PREFIX
from allmlp.weights.published import CHECKPOINTS

FEW_IMAGES = 5_000  # below which the paper's transfer results (1,000 to 8,000 images) are out of reach from scratch
LEAST_SIZE = 64  # in pixels

log = logging.getLogger(__name__)

IN21K_CLASSES = 21843
AUGREG = "Steiner et al. 2021 (AugReg), arXiv:2106.10270"
VIT, BIT = "Dosovitskiy et al. 2021, arXiv:2010.11929", "Kolesnikov et al. 2020 (BiT-M), arXiv:1912.11370"


@dataclass(frozen=True, kw_only=True)
class NamedWeights:
    """Published weights that a name stands for."""

    name: str
    hub: str  # OWNER/NAME of the repository
    model: str  # a variant of Table 1 or a comparison system
    data: str  # what they were trained on
    classes: int
    image_size: int
    parameters: int  # as stored, with the head
    source: str
    license: str = "apache-2.0"
    top1: float | None = None  # on ImageNet's validation set, according to the source; None: not published
    note: str = ""

    @property
    def megabytes(self) -> int:
        """Size of the download, about: four bytes for each parameter."""
        return round(4 * self.parameters / 1e6)


def of_mixer(name: str, repository: str, parameters: int, note: str = "") -> NamedWeights:
    """One of timm's copies of Mixer weights, as ``published.CHECKPOINTS`` describes it."""
    known = next(checkpoint for checkpoint in CHECKPOINTS if checkpoint.file == f"timm/{repository}")
    return NamedWeights(
        name=name,
        hub=known.file,
        model=known.variant,
        data=known.data,
        classes=known.classes,
        image_size=known.image_size,
        parameters=parameters,
        source=known.source,
        top1=known.top1,
        note=note or known.note,
    )


def of_system(
    name: str, repository: str, model: str, parameters: int, source: str, *, classes: int, data: str,
    image_size: int = 224, note: str = "",
) -> NamedWeights:  # fmt: skip
    return NamedWeights(
        name=name,
        hub=f"timm/{repository}",
        model=model,
        data=data,
        classes=classes,
        image_size=image_size,
        parameters=parameters,
        source=source,
        note=note,
    )


IN21K, TUNED = "ImageNet-21k", "ImageNet-21k, then ImageNet"
NO_HEAD = "no head: features only, until it is fine-tuned"

NAMED: Mapping[str, NamedWeights] = MappingProxyType(
    {
        weights.name: weights
        for weights in (
            of_mixer("mixer-b16-in21k", "mixer_b16_224.goog_in21k", 75_908_739),
            of_mixer("mixer-l16-in21k", "mixer_l16_224.goog_in21k", 229_560_243),
            of_mixer("mixer-b16-in1k", "mixer_b16_224.goog_in21k_ft_in1k", 59_880_472),
            of_mixer("mixer-l16-in1k", "mixer_l16_224.goog_in21k_ft_in1k", 208_196_168),
            of_mixer("mixer-b16-miil-in21k", "mixer_b16_224.miil_in21k", 67_740_421),
            of_mixer("mixer-b16-miil-in1k", "mixer_b16_224.miil_in21k_ft_in1k", 59_880_472),
            *(
                of_system(
                    f"vit-{short}-augreg-{suffix}", f"vit_{size}_patch{patch}_224.augreg_{tag}",
                    f"ViT-{short[0].upper()}/{patch}", parameters, AUGREG, classes=classes, data=data,
                )
                for short, size, patch, body, width in (
                    ("b32", "base", 32, 87_455_232, 768), ("b16", "base", 16, 85_798_656, 768),
                    ("l16", "large", 16, 303_301_632, 1024),
                )
                for suffix, tag, classes, data in (
                    ("in21k", "in21k", IN21K_CLASSES, IN21K), ("in1k", "in21k_ft_in1k", 1000, TUNED)
                )
                for parameters in (body + (width + 1) * classes,)
            ),
            of_system("vit-l32-in21k", "vit_large_patch32_224.orig_in21k", "ViT-L/32", 305_510_400, VIT, classes=0,
                      data=IN21K, note=NO_HEAD),
            of_system("vit-h14-in21k", "vit_huge_patch14_224.orig_in21k", "ViT-H/14", 630_764_800, VIT, classes=0,
                      data=IN21K, note=NO_HEAD),
            *(
                of_system(
                    f"bit-{short}-{suffix}", f"resnetv2_{short[1:]}_bit.goog_{tag}", f"BiT-R{short[1:]}", parameters,
                    BIT, classes=classes, data=data, image_size=224 if classes == IN21K_CLASSES else size,
                )
                for short, body, width, size in (
                    ("r50x1", 23_500_352, 2048, 448), ("r152x2", 232_238_208, 4096, 448),
                    ("r152x4", 928_340_224, 8192, 480),
                )
                for suffix, tag, classes, data in (
                    ("in21k", "in21k", IN21K_CLASSES, IN21K), ("in1k", "in21k_ft_in1k", 1000, TUNED)
                )
                for parameters in (body + (width + 1) * classes,)
            ),
            of_system("efficientnet-l2-ns-in1k", "tf_efficientnet_l2.ns_jft_in1k", "EfficientNet-L2", 480_309_308,
                      "Xie et al. 2020 (Noisy Student), arXiv:1911.04252", classes=1000, image_size=800,
                      data="ImageNet, and JFT without labels",
                      note="not ALIGN's weights, which are not published: L2 with its last 1 × 1 convolution"),
        )
    }
)  # fmt: skip


def advise_to_finetune(images: int, data: str, image_size: int) -> str:
    """What to say to those who train from scratch on few images; "" where published weights would be of little help.

    Args:
        images: for training.
        data: SOURCE, for the command to type.
        image_size: the longer side, in pixels; the weights were trained on images of 224.
    """
    if images >= FEW_IMAGES or image_size < LEAST_SIZE:
        return ""
    weights = NAMED["mixer-b16-in21k"]
    return (
        f"{images:,} training images are few to start from nothing; starting from published weights is far better: "
        f"mixer finetune {weights.name} --data {shlex.quote(data)} (downloads {weights.megabytes} MB)"
    )


def like_published(name: str) -> list[str]:
    """The published names that are most like this one, at most three."""
    return difflib.get_close_matches(name.lower(), NAMED, 3, cutoff=0.6)


def resolve_weights(path: str) -> str:
    """The address on the hub of published weights by name; anything else as it is.

    Raises:
        UserError: there is no file of this name, and it is no published name but like one, or the name of a model
            without weights.
    """
    if path.startswith(HUB_PREFIX) or Path(path).exists():
        return path
    if (found := NAMED.get(path.lower())) is not None:
        log.info("%s: %s%s, about %d MB", found.name, HUB_PREFIX, found.hub, found.megabytes)
        return HUB_PREFIX + found.hub
    if Path(path).suffix or Path(path).is_absolute() or "\\" in path:
        return path
    near = like_published(path)
    try:
        model = resolve_name(path)
    except UserError:
        model = None
    if model is not None:
        trained = [weights.name for weights in NAMED.values() if weights.model == model]
        hint = f", such as {' or '.join(trained)}" if trained else ", a file"
        raise UserError(f"{printable(path)} names a model without weights: give trained weights{hint}")
    if near and "/" not in path:
        raise UserError(
            f"there is no file {printable(path)}, and no published weights of this name: the nearest are "
            f"{', '.join(near)} (`mixer models` lists all)"
        )
    return path
