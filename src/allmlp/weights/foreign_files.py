"""Files that are no Mixer's weights, by their first bytes; and the objects that training checkpoints may hold besides.

The objects are listed one by one. None of them runs code when it is built: they hold values.
"""

import argparse
import collections
import pathlib
import re
from typing import Any

import numpy as np

FIRST_BYTES = 512
TORCHSCRIPT = "constants.pkl"  # a member that TorchScript archives have
OTHER_KINDS = (
    (rb"version https://git-lfs", "a pointer of Git LFS, not the weights: run git lfs pull in its repository"),
    (rb"\s*<(?i:!doct|html|head|body)", "a web page, not weights: a login or an error page; download the file itself"),
    (rb"\s*<\?xml", "an XML document, perhaps a server's error, not weights: download the file itself"),
    (rb'\s*[{\[]\s*(["}\]]|$)', "JSON, not weights: a server's error, or a settings file; give the weights beside it"),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes it: save the weights as .npz or safetensors"),
    (rb"GGUF", "a GGUF file, of language models: give a Mixer's .npz, safetensors or .pth"),
    (
        rb"\x08[\x01-\x0f]\x12.{1,40}(pytorch|tf2onnx|onnx)",
        "an ONNX graph, which is run, not trained: give its weights",
    ),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "compressed: unpack it first (gunzip, bunzip2, unxz, unzstd)"),
    (rb"7z\xbc\xaf\x27\x1c|Rar!|.{257}ustar", "an archive: unpack it, and give the weights file in it"),
)


def other_kind(start: bytes) -> str:
    """What a file is that begins with these bytes, and what to do; empty if nothing is known of it."""
    return next((what for pattern, what in OTHER_KINDS if re.match(pattern, start, re.DOTALL)), "")


class Settings(dict):
    """Stands for Lightning's dictionary of hyperparameters."""


def numpy_types() -> list[Any]:
    multiarray: Any = np._core.multiarray  # pyright: ignore[reportAttributeAccessIssue]
    scalar, reconstruct = multiarray.scalar, multiarray._reconstruct
    old = [(scalar, "numpy.core.multiarray.scalar"), (reconstruct, "numpy.core.multiarray._reconstruct")]
    dtypes = {type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdSU"}
    return [scalar, reconstruct, *old, np.dtype, np.ndarray, *dtypes]


HARMLESS: list[Any] = [
    argparse.Namespace,
    collections.deque,
    *numpy_types(),
    *((getattr(pathlib, f"Pure{kind}"), f"{module}.{kind}")
      for module in ("pathlib", "pathlib._local") for kind in ("PosixPath", "WindowsPath")),
    *((getattr(pathlib, kind), f"{module}.{kind}")
      for module in ("pathlib", "pathlib._local") for kind in ("PurePosixPath", "PureWindowsPath")),
    *((Settings, f"{module}.AttributeDict") for module in (
        "pytorch_lightning.utilities.parsing", "lightning.pytorch.utilities.parsing",
        "lightning_fabric.utilities.data", "lightning.fabric.utilities.data")),
]  # fmt: skip
