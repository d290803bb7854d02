"""MLP-Mixer (arXiv:2105.01601): create, train, load, save, predict.

Names are resolved when they are used (PEP 562): importing the package imports no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlp_mixer.inference.predict import predict
    from mlp_mixer.model import Mixer
    from mlp_mixer.variants import create
    from mlp_mixer.weights.load import load
    from mlp_mixer.weights.own import save
    from mlp_mixer.weights.publish import push_to_hub
    from mlp_mixer.weights.resize import resize

__all__ = ["Mixer", "create", "load", "predict", "push_to_hub", "resize", "save"]

HOMES = {
    "Mixer": "mlp_mixer.model",
    "create": "mlp_mixer.variants",
    "load": "mlp_mixer.weights.load",
    "predict": "mlp_mixer.inference.predict",
    "push_to_hub": "mlp_mixer.weights.publish",
    "resize": "mlp_mixer.weights.resize",
    "save": "mlp_mixer.weights.own",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'mlp_mixer' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
