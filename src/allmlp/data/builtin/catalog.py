"""The built-in sources by name."""

from collections.abc import Callable

from allmlp.data.builtin.cifar import cifar10, cifar100
from allmlp.data.builtin.digits import digits
from allmlp.data.builtin.photographs import flowers102, pets
from allmlp.data.dataset import ImageDataset

DOWNLOADED = {"cifar10": cifar10, "cifar100": cifar100, "pets": pets, "flowers102": flowers102}
BUILT_IN: dict[str, Callable[[], dict[str, ImageDataset]]] = {"digits": digits, **DOWNLOADED}
