"""MLP-Mixer (arXiv:2105.01601): create, train, load, save, predict.

Names are resolved on first use (PEP 562): importing the package does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from allmlp.api.evaluate import evaluate
    from allmlp.api.finetune import finetune
    from allmlp.api.train import train
    from allmlp.factory import create
    from allmlp.inference.features import features, transform
    from allmlp.inference.predict import predict
    from allmlp.model import Mixer, MixerBlock
    from allmlp.weights.load import load
    from allmlp.weights.native import save
    from allmlp.weights.push_to_hub import push_to_hub
    from allmlp.weights.resize import resize

__all__ = [
    "Mixer",
    "MixerBlock",
    "create",
    "evaluate",
    "features",
    "finetune",
    "load",
    "predict",
    "push_to_hub",
    "resize",
    "save",
    "train",
    "transform",
]

MODULES = {
    "Mixer": "allmlp.model",
    "MixerBlock": "allmlp.model",
    "create": "allmlp.factory",
    "evaluate": "allmlp.api.evaluate",
    "features": "allmlp.inference.features",
    "finetune": "allmlp.api.finetune",
    "load": "allmlp.weights.load",
    "predict": "allmlp.inference.predict",
    "push_to_hub": "allmlp.weights.push_to_hub",
    "resize": "allmlp.weights.resize",
    "save": "allmlp.weights.native",
    "train": "allmlp.api.train",
    "transform": "allmlp.inference.features",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version()
    if name not in MODULES:
        raise AttributeError(f"module 'allmlp' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(MODULES[name]), name)


def version() -> str:
    """That of the installed package; "from source" if it is imported from a checkout without being installed."""
    from importlib import metadata

    try:
        return metadata.version(__name__)
    except metadata.PackageNotFoundError:
        return "from source"


def __dir__() -> list[str]:
    return __all__
