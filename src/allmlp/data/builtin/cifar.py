"""CIFAR-10 and CIFAR-100, held in memory."""

from pathlib import Path

import numpy as np

from allmlp.data.builtin.copies import fetch
from allmlp.data.dataset import ImageDataset
from allmlp.data.stores import ArrayStore


def cifar10(root: Path | None = None) -> dict[str, ImageDataset]:
    """CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 images of 32×32 pixels. For ``root``, see ``fetch``."""
    return load_cifar("cifar10", "CIFAR10", root)


def cifar100(root: Path | None = None) -> dict[str, ImageDataset]:
    """CIFAR-100 (Krizhevsky 2009), with its 100 fine classes; otherwise as CIFAR-10."""
    return load_cifar("cifar100", "CIFAR100", root)


def load_cifar(name: str, class_name: str, root: Path | None) -> dict[str, ImageDataset]:
    train, test = fetch(name, class_name, root, {"train": True}, {"train": False})
    data, classes = {"train": train, "test": test}, tuple(train.classes)
    names = {
        split: tuple(f"{split}/{classes[label]}/{i:05d}.png" for i, label in enumerate(images.targets))
        for split, images in data.items()
    }
    pixels = np.concatenate([images.data for images in data.values()])
    store = ArrayStore(pixels, names["train"] + names["test"])
    return {
        split: ImageDataset(
            store=store, names=names[split], labels=np.array(images.targets, dtype=np.int64), classes=classes
        )
        for split, images in data.items()
    }
