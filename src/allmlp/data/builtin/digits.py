"""The embedded handwritten digits."""

import numpy as np

from allmlp.data.dataset import ImageDataset
from allmlp.data.stores import ArrayStore


def digits() -> dict[str, ImageDataset]:
    """The 1,797 handwritten digits of 8×8 pixels in scikit-learn (Alpaydin & Kaynak 1998). No download."""
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)  # (1797, 64) from 0 to 16
    gray = np.rint(values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    names = tuple(f"{label}/{i:04d}.png" for i, label in enumerate(labels))
    store = ArrayStore(np.repeat(gray[..., None], 3, axis=-1), names)
    classes = tuple(str(i) for i in range(10))
    return {"all": ImageDataset(store=store, names=names, labels=labels.astype(np.int64), classes=classes)}
