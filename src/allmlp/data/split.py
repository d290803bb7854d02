"""The seeded, stratified split: which images are kept for validation and for test where a source does not say."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np


def stratified(labels: np.ndarray, names: Sequence[str], fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a part off: (indices kept, indices cut off), each ascending.

    From each class at least ``fraction`` of its images is cut off, but never its last one. The order is that of
    SHA-256(seed, name), so the same images are chosen on every machine, from a folder and from a zip of it.
    """
    cut = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label).tolist()
        ranked = sorted(
            members, key=lambda i: hashlib.sha256(f"{seed}/{names[i]}".encode(errors="surrogateescape")).digest()
        )
        cut += ranked[: min(math.ceil(fraction * len(members) - 1e-9), len(members) - 1)]
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[cut] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
