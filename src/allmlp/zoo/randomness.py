"""Dropout and stochastic depth in timm's modules, with masks by sample (see ``allmlp.dropout``)."""

from torch import Tensor, nn

from allmlp.dropout import Dropout, DropPath


class SampleKeys:
    """The keys of the batch that a model is computing; its dropout layers read them here.

    They stay until the next batch, since recomputed activations need them in the backward pass.
    """

    value: Tensor | None = None


class KeyedDropout(Dropout):
    """``Dropout`` that finds the samples' keys by itself."""

    def __init__(self, rate: float, stream: int, keys: SampleKeys) -> None:
        super().__init__(rate, stream)
        self.keys = keys

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x, self.keys.value)


class KeyedDropPath(DropPath):
    """``DropPath`` that finds the samples' keys by itself."""

    def __init__(self, rate: float, stream: int, rescale: bool, keys: SampleKeys) -> None:
        super().__init__(rate, stream, rescale)
        self.keys = keys

    def forward(self, branch: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(branch, self.keys.value)


def install_keyed_dropout(backbone: nn.Module, keys: SampleKeys, rescale: bool, head_rate: float) -> nn.Module:
    """Replaces timm's dropout and stochastic depth, in place; returns the dropout before the head."""
    from timm.layers.drop import DropPath as TimmDropPath

    streams = 0
    for name, module in list(backbone.named_modules()):
        replacement: nn.Module | None = None
        if isinstance(module, nn.Dropout) and module.p > 0:
            replacement = KeyedDropout(module.p, streams, keys)
        elif isinstance(module, TimmDropPath) and module.drop_prob:
            replacement = KeyedDropPath(module.drop_prob, streams, rescale, keys)
        if replacement is not None:
            backbone.set_submodule(name, replacement)
            streams += 1
    return KeyedDropout(head_rate, streams, keys)
