"""The sources by name."""

from collections.abc import Callable
from pathlib import Path

from allmlp.data.builtin.arrays import cifar10, cifar100, fashion_mnist, mnist, stl10, svhn
from allmlp.data.builtin.digits import digits
from allmlp.data.builtin.imagenet import imagenet
from allmlp.data.builtin.photographs import caltech101, dtd, eurosat, flowers102, food101, gtsrb, pets, sun397
from allmlp.data.dataset import ImageDataset

Read = Callable[[Path | None], dict[str, ImageDataset]]  # from a folder that holds a copy; None: the data folder

DOWNLOADED: dict[str, Read] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "pets": pets,
    "flowers102": flowers102,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "svhn": svhn,
    "stl10": stl10,
    "food101": food101,
    "dtd": dtd,
    "eurosat": eurosat,
    "caltech101": caltech101,
    "sun397": sun397,
    "gtsrb": gtsrb,
}
BUILT_IN: dict[str, Read] = {"digits": lambda root: digits(), **DOWNLOADED, "imagenet": imagenet}
NOTES = {  # what the user should know of a source
    "svhn": "of SVHN, the 531,131 images of its part extra are not used",
    "stl10": "of STL-10, the 100,000 images without labels are not used",
    "caltech101": "of Caltech-101, the folder BACKGROUND_Google, which is no class, is left out",
    "gtsrb": "GTSRB's classes are called by their numbers",
}
