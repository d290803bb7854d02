"""The seeded, stratified split: which images are held out for testing or validation."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np


def stratified_split(
    labels: np.ndarray, names: Sequence[str], fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits images by class; returns the indices of those kept and of those held out, both ascending.

    At least ``fraction`` of each class is held out, but never its last image. Within a class, images are ordered by
    SHA-256(seed, name), so that the split is the same on every machine, from a folder and from a zip of it.
    """
    held_out = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label).tolist()
        ranked = sorted(
            members, key=lambda i: hashlib.sha256(f"{seed}/{names[i]}".encode(errors="surrogateescape")).digest()
        )
        held_out += ranked[: min(math.ceil(fraction * len(members) - 1e-9), len(members) - 1)]
    is_held_out = np.zeros(len(labels), dtype=bool)
    is_held_out[held_out] = True
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
