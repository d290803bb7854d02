"""The comparison systems by name: sizes, sources, and what the literature leaves open. Importing this needs no timm."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, kw_only=True)
class System:
    """A comparison system: a family at published sizes."""

    name: str
    family: str  # a key of ``families.FAMILIES``
    image_size: int  # in pixels, for which the system is created by default
    sizes: Mapping[str, Any] = field(default_factory=dict)
    source: str
    note: str = ""  # where its sizes are not those of a published table

    @property
    def parameters(self) -> int:
        """With a head of 1000 classes."""
        return COSTS[self.name][0]

    @property
    def macs(self) -> int:
        """Multiply-accumulates per image of ``image_size``."""
        return COSTS[self.name][1]


COSTS = {  # counted without computing; a test counts them again
    "ViT-B/32": (88_224_232, 4_409_186_304),
    "ViT-B/16": (86_567_656, 17_563_828_224),
    "ViT-L/32": (306_535_400, 15_377_539_072),
    "ViT-L/16": (304_326_632, 61_554_712_576),
    "ViT-H/14": (632_045_800, 167_295_109_120),
    "BiT-R50x1": (25_549_352, 4_089_184_256),
    "BiT-R50x2": (97_988_712, 16_116_613_120),
    "BiT-R152x1": (60_185_128, 11_513_626_624),
    "BiT-R152x2": (236_335_208, 45_814_382_592),
    "BiT-R152x4": (936_533_224, 182_777_282_560),
    "BiT-R200x3": (568_633_000, 134_346_964_992),
    "ResNet50x1": (25_549_352, 4_089_184_256),
    "HaloNet-H4": (69_833_768, 42_231_793_664),
    "NFNet-F4+": (525_038_908, 336_197_304_320),
    "EfficientNet-B6-Wide": (316_649_180, 131_992_907_520),
    "EfficientNet-L2": (468_596_796, 270_353_403_664),
    "BoTNet-T7": (69_180_824, 45_794_435_072),
}
VIT_PAPER = "Dosovitskiy et al. 2021, arXiv:2010.11929"
BIT_PAPER = "Kolesnikov et al. 2020, arXiv:1912.11370"
PLAIN_HEAD = "the head is one linear layer, as in fine-tuning; pre-training has a tanh layer before it"


def vit(name: str, patch: int, blocks: int, hidden: int, heads: int) -> System:
    sizes = {
        "patch_size": patch, "num_blocks": blocks, "hidden_dim": hidden, "num_heads": heads,
        "channels_mlp_dim": 4 * hidden,
    }  # fmt: skip
    return System(name=name, family="vit", image_size=224, sizes=sizes, source=VIT_PAPER, note=PLAIN_HEAD)


def bit(name: str, depths: tuple[int, ...], width: int, note: str = "") -> System:
    sizes = {"depths": depths, "width": width}
    return System(name=name, family="bit", image_size=224, sizes=sizes, source=BIT_PAPER, note=note)


R50, R152, R200 = (3, 4, 6, 3), (3, 8, 36, 3), (3, 24, 36, 3)

SYSTEMS: Mapping[str, System] = MappingProxyType(
    {
        system.name: system
        for system in (
            vit("ViT-B/32", 32, 12, 768, 12),
            vit("ViT-B/16", 16, 12, 768, 12),
            vit("ViT-L/32", 32, 24, 1024, 16),
            vit("ViT-L/16", 16, 24, 1024, 16),
            vit("ViT-H/14", 14, 32, 1280, 16),
            bit("BiT-R50x1", R50, 1),
            bit("BiT-R50x2", R50, 2),
            bit("BiT-R152x1", R152, 1),
            bit("BiT-R152x2", R152, 2),
            bit("BiT-R152x4", R152, 4),
            bit("BiT-R200x3", R200, 3),
            bit("ResNet50x1", R50, 1, "built as BiT-R50x1: the paper does not say which version of ResNet it uses"),
            System(
                name="HaloNet-H4",
                family="halonet",
                image_size=384,
                sizes={"depths": (3, 3, 12, 3), "width": 2, "expansion": 3},
                source="Vaswani et al. 2021, arXiv:2103.12731",
                note="base 128, Conv-12; published as 87 M parameters; expansion 3 gives 69.8 M, and 4 gives 88.4 M",
            ),
            System(
                name="NFNet-F4+",
                family="nfnet",
                image_size=512,
                sizes={
                    "depths": (5, 10, 30, 15),
                    "channels": (384, 768, 2048, 2048),
                    "num_features": 4096,
                    "stem_channels": 192,
                },
                source="Brock et al. 2021, arXiv:2102.06171",
                note="published as 527 M parameters; these sizes have 525.0 M",
            ),
            System(
                name="EfficientNet-B6-Wide",
                family="efficientnet",
                image_size=512,
                sizes={"depths": (3, 6, 6, 8, 8, 11, 3), "width": 5.0},
                source="Pham et al. 2021 (MPL), arXiv:2003.10580",
                note="width 5.0 and depth 2.6, as in the authors' code; published as 390 M parameters, has 316.7 M",
            ),
            System(
                name="EfficientNet-L2",
                family="efficientnet",
                image_size=600,
                sizes={"depths": (6, 11, 11, 16, 16, 22, 6), "width": 4.3, "last_conv": False},
                source="Jia et al. 2021 (ALIGN), arXiv:2102.05918",
                note="without the last 1 × 1 convolution, as ALIGN has it; last_conv=True is Noisy Student's L2",
            ),
            System(
                name="BoTNet-T7",
                family="botnet",
                image_size=384,
                sizes={"depths": (3, 4, 23, 12)},
                source="Srinivas et al. 2021, arXiv:2101.11605",
                note="45.8 GMACs, as published, but 69.2 M parameters where 75.1 M are published; with squeeze-and-"
                "excitation on the attention blocks too, 75.5 M",
            ),
        )
    }
)
