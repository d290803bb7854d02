"""The seeded, stratified split: which images are held out for testing or validation."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from allmlp.data.names import pack


def stratified_split(
    labels: np.ndarray, names: Sequence[str], fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits images by class; returns the indices of those kept and of those held out, both ascending.

    At least ``fraction`` of each class is held out, but never its last image. Within a class, images are ordered by
    SHA-256(seed, name), so that the split is the same on every machine, from a folder and from a zip of it.
    """
    is_held_out = np.zeros(len(labels), dtype=bool)
    packed, by_class = pack(names), np.argsort(labels, kind="stable")
    for members in np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1):
        count = min(math.ceil(fraction * len(members) - 1e-9), len(members) - 1)
        if count > 0:
            digests = bytearray()
            for name in packed.subset(members):
                digests += hashlib.sha256(f"{seed}/{name}".encode(errors="surrogateescape")).digest()
            ranked = np.argsort(np.frombuffer(digests, dtype="S32"), kind="stable")
            is_held_out[members[ranked[:count]]] = True
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
