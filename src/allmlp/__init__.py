"""MLP-Mixer (arXiv:2105.01601): create, train, load, save, predict.

Names are resolved when they are used (PEP 562): importing the package imports no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from allmlp.inference.predict import predict
    from allmlp.model import Mixer
    from allmlp.variants import create
    from allmlp.weights.load import load
    from allmlp.weights.native import save
    from allmlp.weights.push_to_hub import push_to_hub
    from allmlp.weights.resize import resize

__all__ = ["Mixer", "create", "load", "predict", "push_to_hub", "resize", "save"]

HOMES = {
    "Mixer": "allmlp.model",
    "create": "allmlp.variants",
    "load": "allmlp.weights.load",
    "predict": "allmlp.inference.predict",
    "push_to_hub": "allmlp.weights.push_to_hub",
    "resize": "allmlp.weights.resize",
    "save": "allmlp.weights.native",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'allmlp' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
