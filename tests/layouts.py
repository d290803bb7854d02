"""Random weights in the layouts of others, written out independently of src.

Arguments use native names, as ``reference.numpy_forward`` does, and are float64 by default.
"""

from collections.abc import Mapping

import numpy as np

Array = np.ndarray
WRAPPINGS = ("", "params/", "opt/target/", "opt/target/params/")


def random_weights(
    seed: int = 0,
    *,
    classes: int = 3,
    grid: tuple[int, int] = (3, 3),
    patch: tuple[int, int] = (4, 4),
    channels: int = 3,
    blocks: int = 2,
    width: int = 8,
    tokens_mlp: int = 5,
    channels_mlp: int = 6,
    dtype: type = np.float64,
) -> dict[str, Array]:
    """Every array of a Mixer, random, with activations near 1; ``classes=0`` omits the head."""
    rng = np.random.default_rng(seed)
    weights: dict[str, Array] = {}

    def dense(name: str, *shape: int) -> None:
        fan_in = int(np.prod(shape[1:]))
        weights[f"{name}.weight"] = rng.normal(0, fan_in**-0.5, shape).astype(dtype)
        weights[f"{name}.bias"] = rng.normal(0, 0.3, shape[0]).astype(dtype)

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = rng.normal(1, 0.3, width).astype(dtype)
        weights[f"{name}.bias"] = rng.normal(0, 0.3, width).astype(dtype)

    tokens = grid[0] * grid[1]
    dense("stem", width, channels, *patch)
    for i in range(blocks):
        norm(f"blocks.{i}.norm1")
        dense(f"blocks.{i}.token_mixing.dense_0", tokens_mlp, tokens)
        dense(f"blocks.{i}.token_mixing.dense_1", tokens, tokens_mlp)
        norm(f"blocks.{i}.norm2")
        dense(f"blocks.{i}.channel_mixing.dense_0", channels_mlp, width)
        dense(f"blocks.{i}.channel_mixing.dense_1", width, channels_mlp)
    norm("pre_head_layer_norm")
    if classes:
        dense("head", classes, width)
    return weights


def blocks_of(weights: Mapping[str, Array]) -> range:
    return range(1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")))


def current(weights: Mapping[str, Array]) -> dict[str, Array]:
    """The authors' current layout (flax linen): google-research/vision_transformer, models_mixer.py."""
    w = weights
    found = {"stem/kernel": w["stem.weight"].transpose(2, 3, 1, 0), "stem/bias": w["stem.bias"]}
    for i in blocks_of(w):
        for k, norm in enumerate(("norm1", "norm2")):
            found[f"MixerBlock_{i}/LayerNorm_{k}/scale"] = w[f"blocks.{i}.{norm}.weight"]
            found[f"MixerBlock_{i}/LayerNorm_{k}/bias"] = w[f"blocks.{i}.{norm}.bias"]
        for mixing in ("token_mixing", "channel_mixing"):
            for k in (0, 1):
                found[f"MixerBlock_{i}/{mixing}/Dense_{k}/kernel"] = w[f"blocks.{i}.{mixing}.dense_{k}.weight"].T
                found[f"MixerBlock_{i}/{mixing}/Dense_{k}/bias"] = w[f"blocks.{i}.{mixing}.dense_{k}.bias"]
    found["pre_head_layer_norm/scale"] = w["pre_head_layer_norm.weight"]
    found["pre_head_layer_norm/bias"] = w["pre_head_layer_norm.bias"]
    if "head.weight" in w:
        found |= {"head/kernel": w["head.weight"].T, "head/bias": w["head.bias"]}
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def older(
    weights: Mapping[str, Array], numbers: tuple[int, int] = (0, 1), axes: tuple[int, int] = (0, 0)
) -> dict[str, Array]:
    """The authors' older layout.

    ``numbers`` are those of the two LayerNorms; ``axes`` the positions of an axis of length one in the kernels of token
    and channel mixing: (1, S, D_S) for 0.
    """
    w = weights
    found = {"embedding/kernel": w["stem.weight"].transpose(2, 3, 1, 0), "embedding/bias": w["stem.bias"]}
    for i in blocks_of(w):
        block = f"Mixer/encoderblock_{i}"
        for number, norm in zip(numbers, ("norm1", "norm2"), strict=True):
            found[f"{block}/LayerNorm_{number}/scale"] = w[f"blocks.{i}.{norm}.weight"]
            found[f"{block}/LayerNorm_{number}/bias"] = w[f"blocks.{i}.{norm}.bias"]
        for mixing, axis in zip(("token_mixing", "channel_mixing"), axes, strict=True):
            for k in (0, 1):
                kernel, bias = (w[f"blocks.{i}.{mixing}.dense_{k}.{kind}"] for kind in ("weight", "bias"))
                found[f"{block}/{mixing}_phase_0/kernel{k + 1}"] = np.expand_dims(kernel.T, axis)
                found[f"{block}/{mixing}_phase_0/bias{k + 1}"] = bias[None]
    found["Mixer/encoder_norm/scale"] = w["pre_head_layer_norm.weight"]
    found["Mixer/encoder_norm/bias"] = w["pre_head_layer_norm.bias"]
    if "head.weight" in w:
        found |= {"head/kernel": w["head.weight"].T, "head/bias": w["head.bias"]}
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def wrapped(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    """Names with ``prefix``; a training checkpoint ("opt/") also has the optimizer's moments."""
    found = {prefix + name: array for name, array in arrays.items()}
    if prefix.startswith("opt/"):
        for moment in ("grad_ema", "grad_sq_ema"):
            found |= {f"opt/state/param_states/{name}/{moment}": np.ones_like(array) for name, array in arrays.items()}
    return found


def bfloat16(array: Array) -> tuple[Array, Array]:
    """(two-byte voids, as NumPy stores JAX's bfloat16 arrays; their values in float32)."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
    kept = rounded.astype(np.uint16)
    return kept.view("V2"), (kept.astype(np.uint32) << 16).view(np.float32)


def timm(weights: Mapping[str, Array]) -> dict[str, Array]:
    """timm's names (timm/models/mlp_mixer.py); the arrays are unchanged."""
    found = {"stem.proj.weight": weights["stem.weight"], "stem.proj.bias": weights["stem.bias"]}
    for i in blocks_of(weights):
        for kind in ("weight", "bias"):
            for norm in ("norm1", "norm2"):
                found[f"blocks.{i}.{norm}.{kind}"] = weights[f"blocks.{i}.{norm}.{kind}"]
            for ours, theirs in (("token_mixing", "mlp_tokens"), ("channel_mixing", "mlp_channels")):
                for k in (0, 1):
                    found[f"blocks.{i}.{theirs}.fc{k + 1}.{kind}"] = weights[f"blocks.{i}.{ours}.dense_{k}.{kind}"]
    for kind in ("weight", "bias"):
        found[f"norm.{kind}"] = weights[f"pre_head_layer_norm.{kind}"]
        if "head.weight" in weights:
            found[f"head.{kind}"] = weights[f"head.{kind}"]
    return found
