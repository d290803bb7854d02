"""Copies of data sets in torchvision's format: found, or downloaded by its classes.

They are in the folder ALLMLP_DATA, by default ``~/.cache/allmlp``.
"""

import os
from pathlib import Path
from typing import Any

from allmlp.errors import RunError, UserError

PLACES = {  # where torchvision keeps each data set: a folder or file below the folder that holds the copy
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "pets": "oxford-iiit-pet",
    "flowers102": "flowers-102",
    "mnist": "MNIST/raw",
    "fashion-mnist": "FashionMNIST/raw",
    "svhn": "train_32x32.mat",
    "stl10": "stl10_binary",
    "food101": "food-101",
    "dtd": "dtd/dtd",
    "eurosat": "eurosat/2750",
    "caltech101": "caltech101/101_ObjectCategories",
    "sun397": "SUN397",
    "gtsrb": "gtsrb/GTSRB",
}


def copies_in(folder: Path) -> list[str]:
    """The data sets of which a folder holds a copy."""
    return [name for name, place in PLACES.items() if (folder / place).exists()]


def fetch(
    name: str, class_name: str, root: Path | None, *splits: dict[str, Any], folder: str | None = None
) -> list[Any]:
    """Makes one torchvision dataset for each of the splits.

    Args:
        name: name of the source.
        class_name: name of the dataset's class in ``torchvision.datasets``.
        root: a folder that holds a copy, which is not downloaded; None: the data folder, downloaded if missing.
        splits: arguments of the class that select a split.
        folder: the subfolder of a copy, for messages; None: that of the source ``name``.

    Raises:
        UserError: torchvision is not installed.
        RunError: the download failed, or the copy is damaged.
    """
    datasets = import_torchvision(name)
    parent = root or data_folder()
    location = parent / (folder or PLACES[name])
    try:
        return [getattr(datasets, class_name)(parent, download=root is None, **split) for split in splits]
    except Exception as error:  # its readers raise almost any type of exception on damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0].partition(" You can use download")[0]
        remedy = f"copy all of {location} again"
        if root is None:
            remedy = (
                f"check the network, or copy the dataset to {location} (ALLMLP_DATA sets another folder); "
                "remove damaged files there first"
            )
        raise RunError(f"{name} could not be downloaded or read ({reason}): {remedy}") from None


def import_torchvision(name: str) -> Any:
    """The module ``torchvision.datasets``; raises a UserError if it is not installed."""
    try:
        import torchvision.datasets as datasets
    except ImportError:
        raise UserError(f"the source {name} needs torchvision: pip install 'allmlp[datasets]'") from None
    return datasets


def data_folder() -> Path:
    """Where datasets are downloaded to."""
    try:
        return Path(os.environ.get("ALLMLP_DATA") or "~/.cache/allmlp").expanduser()
    except RuntimeError:  # the user has none, as in many containers
        raise UserError("no home folder to download to (HOME is not set): set ALLMLP_DATA to a folder") from None
