"""The families of comparison systems by key."""

from allmlp.zoo.attention_resnets import BOTNET, HALONET
from allmlp.zoo.efficientnet import EFFICIENTNET
from allmlp.zoo.family import Family
from allmlp.zoo.nfnet import NFNET
from allmlp.zoo.resnet import BIT
from allmlp.zoo.vit import VIT

FAMILIES: dict[str, Family] = {family.key: family for family in (VIT, BIT, HALONET, NFNET, EFFICIENTNET, BOTNET)}
