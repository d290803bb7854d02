"""Loading the authors', timm's and lucidrains' weights: they compute the same, and every tensor is accounted for."""

import logging
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import WRAPPINGS, Array, bfloat16, current, older, random_weights, wrapped
from layouts import timm as timm_layout
from random_models import cases, refused, timm_state, warnings_of
from reference import numpy_forward, randomise
from safetensors.torch import save_file
from torch import Tensor, nn

import allmlp
from allmlp.errors import UserError
from allmlp.model import Mixer
from allmlp.weights.convert import save_as
from allmlp.weights.load import load


def images_for(model: Mixer, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, model.config["in_channels"], *model.image_size, dtype=dtype, generator=generator)


def relative(actual: Tensor | Array, expected: Tensor | Array) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert expected.std() > 1e-3  # otherwise the comparison means nothing
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def agrees(model: Mixer, weights: dict[str, Array], gelu: str, dtype: torch.dtype = torch.float64) -> None:
    """Checks tokens before the last LayerNorm, features and logits against the NumPy forward pass with ``weights``."""
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.config["gelu"] == gelu
    images = images_for(model, dtype)
    expected = numpy_forward(weights, images.numpy(), model.patch_size, gelu)
    with torch.no_grad():
        found = model.tokens(images), model.features(images), model(images)
    for actual, theirs in zip(found, expected, strict=True):
        assert relative(actual, theirs) <= (1e-10 if dtype == torch.float64 else 1e-4)


# The authors' layouts

AUTHORS: list[Callable[[dict[str, Array]], dict[str, Array]]] = [
    current,
    older,
    lambda w: older(w, numbers=(3, 10)),  # "10" sorts before "3" as text
    lambda w: older(w, numbers=(9, 11), axes=(2, 1)),
]


ONE_OR_MORE = st.sampled_from([1, 2, 5])
SIZES = st.fixed_dictionaries({
    "classes": st.sampled_from([0, 1, 4]), "blocks": st.sampled_from([1, 2, 12]), "channels": st.integers(1, 3),
    "patch": st.sampled_from([(4, 4), (2, 3)]), "grid": st.sampled_from([(1, 1), (2, 2), (5, 5)]),
    "tokens_mlp": ONE_OR_MORE, "channels_mlp": ONE_OR_MORE,
})  # fmt: skip


@cases(60)
@given(
    st.sampled_from(AUTHORS),
    st.sampled_from(WRAPPINGS),
    st.sampled_from(["f8", "f4", "bf16"]),
    SIZES,
    st.integers(0, 9),
)
def test_the_authors_weights_match_the_reference(
    layout: Any, wrapping: str, kind: str, sizes: dict, order: int
) -> None:
    """Sizes come from the shapes, whatever the order in the file; sizes of one are not squeezed."""
    if layout is AUTHORS[3]:  # where they would be ambiguous
        sizes |= {"grid": (2, 2), "tokens_mlp": 5, "channels_mlp": 6}
    weights = {k: array.astype(kind.replace("bf16", "f4")) for k, array in random_weights(1, width=7, **sizes).items()}
    stored = weights
    if kind == "bf16":
        pairs = {name: bfloat16(array) for name, array in weights.items()}
        stored, weights = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
    arrays = wrapped(layout(stored), wrapping)
    if wrapping.startswith("opt/"):  # flax.optim stores its step next to the moments
        arrays |= {"opt/state/step": np.asarray(300, np.int32)}
    with tempfile.TemporaryDirectory() as folder:
        names = np.random.default_rng(order).permutation(list(arrays))
        np.savez(Path(folder) / "w.npz", **{name: arrays[name] for name in names})
        model = load(Path(folder) / "w.npz")
    config, (height, width) = model.config, sizes["patch"]
    assert model.image_size == (sizes["grid"][0] * height, sizes["grid"][1] * width)
    found = (config["num_classes"], config["num_blocks"], config["tokens_mlp_dim"], config["in_channels"])
    assert found == (sizes["classes"], sizes["blocks"], sizes["tokens_mlp"], sizes["channels"])
    if sizes["classes"]:
        agrees(model, weights, "tanh", torch.float64 if kind == "f8" else torch.float32)


def test_what_is_ignored_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.savez(tmp_path / "w.npz", **wrapped(current(random_weights()), "opt/target/"))
    with caplog.at_level(logging.INFO, "allmlp"):
        load(tmp_path / "w.npz")
    (said,) = (record.getMessage() for record in caplog.records if "ignored" in record.getMessage())
    assert str(tmp_path / "w.npz") in said
    assert "opt/state/param_states/" in said
    assert "opt/target" not in said


def test_files_are_recognized_by_content_not_by_name(tmp_path: Path) -> None:
    weights, exact = random_weights(), {k: torch.tensor(v) for k, v in timm_layout(random_weights()).items()}
    for name in ("w.npz", "w.pth", "w.safetensors", "w"):
        path = tmp_path / name
        with path.open("wb") as file:
            np.savez(file, **current(weights))
        agrees(load(path), weights, "tanh")
        save_file(exact, path)
        agrees(load(path), weights, "erf")
        for zipped in (True, False):
            torch.save(exact, path, _use_new_zipfile_serialization=zipped)
            agrees(load(path), weights, "erf")
        allmlp.save(load(path), tmp_path / "native.safetensors")
        (tmp_path / "native.safetensors").rename(path)
        agrees(load(path), weights, "erf")
    native = {name: torch.tensor(array) for name, array in weights.items()}
    torch.save(native, path)
    agrees(load(path), weights, "tanh")
    torch.save(native | {"head.bias": native["head.bias"].float()}, path)
    assert {parameter.dtype for parameter in load(path).parameters()} == {torch.float64}  # the widest type in the file


# timm's layout (which test_convert.py compares with timm itself)

WRAPPERS: list[tuple[Callable[[dict[str, Tensor]], Any], str]] = [  # and what is ignored
    (lambda state: {"state_dict": state, "epoch": 3}, "epoch"),
    (lambda state: {"model": state, "optimizer": {"state": {}, "lr": 0.1}}, "optimizer"),
    (lambda state: {f"module.{name}": tensor for name, tensor in state.items()}, ""),
    (lambda state: {"state_dict": {f"module.{name}": t for name, t in state.items()}, "arch": "x"}, "arch"),
    (lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()}, ""),
    (lambda state: {name: nn.Parameter(tensor) for name, tensor in state.items()}, ""),
    (lambda state: {"state_dict_ema": state, "state_dict": {k: -v for k, v in state.items()}}, "state_dict"),
]


@pytest.mark.parametrize(("wrap", "ignored"), WRAPPERS)
def test_wrapped_state_dicts(tmp_path: Path, wrap: Any, ignored: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(wrap(timm_state(7)), tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, "allmlp"):
        model = load(tmp_path / "w.pth")
    agrees(model, {k: v.astype(np.float32) for k, v in random_weights(7).items()}, "erf", torch.float32)
    said = [r.getMessage() for r in caplog.records if "ignored" in r.getMessage()]
    assert len(said) == bool(ignored)
    assert all(ignored in line for line in said)


# lucidrains' layout


def agrees_with(model: Mixer, peer: nn.Module, last_norm: nn.Module) -> None:
    """Checks float32 tokens before the last LayerNorm, and logits."""
    images, seen = images_for(model, torch.float32), []
    hook = last_norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = peer.eval()(images)
        assert relative(model.tokens(images), seen[0]) <= 1e-5
        assert relative(model(images), logits) <= 1e-5
    hook.remove()


def lucidrains(**options: Any) -> nn.Module:
    package = pytest.importorskip("mlp_mixer_pytorch")
    sizes = {"image_size": 16, "channels": 3, "patch_size": 4, "dim": 12, "depth": 2, "num_classes": 5}
    peer = package.MLPMixer(**sizes | options)
    randomise(peer, seed=31)
    with torch.no_grad():
        for parameter in peer[1].parameters():  # small tokens, whose variance is near ε
            parameter.mul_(0.01)
    return peer


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"depth": 11}, {}),
        ({"channels": 2}, {"in_channels": 2}),
        ({"image_size": (16, 8), "channels": 4}, {"image_size": (16, 8), "in_channels": 4}),
        ({"image_size": (4, 64)}, {"image_size": (4, 64)}),  # 16 patches, which could be a square
        ({"expansion_factor": 1, "expansion_factor_token": 2}, {}),  # D_S < D_C
    ],
    ids=str,
)
def test_lucidrains_models(tmp_path: Path, options: dict, given: dict, caplog: pytest.LogCaptureFixture) -> None:
    peer = lucidrains(**options)
    last = peer[options.get("depth", 2) + 2]
    save_file(peer.state_dict(), tmp_path / "w")
    model = load(tmp_path / "w", **given)
    assert (model.config["gelu"], model.config["norm_eps"]) == ("erf", 1e-5)
    agrees_with(model, peer, last)
    allmlp.save(model, tmp_path / "native.safetensors")
    agrees_with(load(tmp_path / "native.safetensors"), peer, last)
    wide = model.config["tokens_mlp_dim"] > model.config["channels_mlp_dim"]
    assert any("D_S = 48" in said and "D_C = 6" in said for said in warnings_of(caplog)) == wide


def test_channels_that_the_file_does_not_tell(tmp_path: Path) -> None:
    for channels in (1, 4):
        save_file(lucidrains(channels=channels).state_dict(), tmp_path / "w")
        refused(tmp_path / "w", f"{16 * channels} numbers", "1, 4 channels", "in_channels=")
        for wrong in (-3, 5):
            refused(tmp_path / "w", f"in_channels={wrong}", in_channels=wrong)


# Sizes


def test_sizes_that_the_shapes_do_not_tell(tmp_path: Path) -> None:
    path = tmp_path / "w.npz"
    weights = random_weights(11, grid=(2, 3), patch=(4, 2))
    np.savez(path, **current(weights))
    refused(path, "6 patches of 4×2 px", "image_size=(height, width)")
    agrees(load(path, image_size=(8, 6)), weights, "tanh")
    assert load(path, image_size=(12, 4)).grid == (3, 2)
    np.savez(path, **current(random_weights(12)))  # 3×3 patches of 4
    for size in (16, (12, 16), (10, 12), 13):
        height, width = (size, size) if isinstance(size, int) else size
        refused(path, "9 patches of 4×4 px", f"{height}×{width} px", "12×12 px", "resize", image_size=size)
    for size in ((0, 0), (-12, -12)):
        with pytest.raises(UserError, match=f"{size[0]}"):
            load(path, image_size=size)
    allmlp.save(load(path, image_size=12, in_channels=3), tmp_path / "native.safetensors")
    for file in (path, tmp_path / "native.safetensors"):
        refused(file, "in_channels=1", "takes 3", in_channels=1)
    refused(tmp_path / "native.safetensors", "12×12 px", "mixer resize", image_size=24)
    assert load(tmp_path / "native.safetensors", image_size=(12, 12), in_channels=3).image_size == (12, 12)


# Every tensor is accounted for


def refuses(path: Path, arrays: dict[str, Array], *words: str) -> str:
    np.savez(path, **arrays)
    return refused(path, *words)


def test_missing_unexpected_and_wrong_tensors_are_all_listed(tmp_path: Path) -> None:
    arrays = current(random_weights(13, blocks=4))
    gone, more = (
        [name for name in arrays if name.startswith("MixerBlock_2")],
        ["pos_embedding", "MixerBlock_0/X/kernel"],
    )
    arrays = {name: array for name, array in arrays.items() if name not in gone} | {
        name: np.ones((2, 2)) for name in more
    }
    arrays |= {"MixerBlock_1/channel_mixing/Dense_1/kernel": np.ones((6, 9)), "pre_head_layer_norm/scale": np.ones(9)}
    parts = refuses(tmp_path / "w.npz", arrays).split("; ")
    missing, unexpected, wrong = (part for part in parts if re.search(r"\d+ (missing|unexp|wrong)", part))
    assert "12 missing" in missing
    assert "MixerBlock_2/" in missing
    assert "4 more" in missing  # a long list is shortened
    assert all(word in unexpected for word in ("2 unexpected", *more))
    for word in (
        "2 wrong shape",
        "pre_head_layer_norm/scale (9,) instead of (8,)",
        "Dense_1/kernel (6, 9) instead of (6, 8)",
    ):
        assert word in wrong


def test_each_missing_tensor_and_wrong_shape_is_refused(tmp_path: Path) -> None:
    arrays, path = current(random_weights(14, blocks=1)), tmp_path / "w"
    named = {"stem/kernel": "stem.weight", "MixerBlock_0/channel_mixing/Dense_0/kernel": "channel_mixing.dense_0"}
    for name in arrays:
        with path.open("wb") as file:
            np.savez(file, **{other: array for other, array in arrays.items() if other != name})
        identifies = name == "MixerBlock_0/token_mixing/Dense_0/kernel"  # the layout
        refused(path, "first names" if identifies else "head/" if "head/" in name else named.get(name, name))
    state = timm_state(15)
    for name, tensor in state.items():
        flat = tensor.flatten() if tensor.ndim > 1 else tensor[:1].clone()
        longer = torch.zeros(len(tensor) + 1, *tensor.shape[1:])
        for other in (longer, tensor[None].contiguous(), flat.contiguous(), torch.tensor(1.0)):
            save_file(state | {name: other}, path)
            refused(path)
    for name in ("blocks.1.mlp_tokens.fc1.weight", "blocks.1.mlp_channels.fc1.weight"):
        save_file(state | {name: torch.zeros(1, 1, 5, 9)}, path)
        refused(path, f"{name} (1, 1, 5, 9) instead of")


@pytest.mark.parametrize(
    ("sizes", "others", "words"),
    [
        ({}, {"grid": (6, 6)}, ["3 wrong shape", "another image size (36 patches)"]),  # only one block was resized
        ({"tokens_mlp": 6}, {"tokens_mlp": 6, "grid": (6, 6)}, ["another image size"]),  # though D_S = D_C
        ({}, {"tokens_mlp": 6, "channels_mlp": 5}, ["D_S and D_C are swapped"]),
        ({"tokens_mlp": 6}, {"tokens_mlp": 6, "width": 9}, ["two models were mixed"]),
    ],
    ids=str,
)
def test_the_likely_cause_is_named(tmp_path: Path, sizes: dict, others: dict, words: list[str]) -> None:
    mixed = random_weights(17, **sizes)
    mixed |= {name: array for name, array in random_weights(17, **others).items() if name.startswith("blocks.1.")}
    said = refuses(tmp_path / "w.npz", current(mixed), *words)
    assert ("swapped" in said) == ("swapped" in words[0])


def test_a_head_of_another_dataset_is_named_as_the_cause(tmp_path: Path) -> None:
    arrays = current(random_weights(19)) | {"head/bias": np.ones(10)}
    refuses(tmp_path / "w.npz", arrays, "head/bias (10,) instead of (3,)", "head is that of another dataset")


@pytest.mark.parametrize("to", ["npz", "native", "timm"])
def test_a_head_of_zeros_gives_features_and_refuses_to_predict(
    tmp_path: Path, to: Any, caplog: pytest.LogCaptureFixture
) -> None:
    weights, path = random_weights(20), tmp_path / ("w.npz" if to == "npz" else "w.safetensors")
    np.savez(tmp_path / "w.npz", **current(weights))
    assert load(tmp_path / "w.npz").num_classes
    assert not warnings_of(caplog)
    weights["head.weight"][:] = 0  # not the bias: in the authors' pre-training it starts at −10
    np.savez(tmp_path / "w.npz", **current(weights))
    save_as(load(tmp_path / "w.npz"), path, to)
    caplog.clear()
    model = load(path)
    assert any("head is all zero" in said and str(path) in said for said in warnings_of(caplog))
    images = images_for(model, torch.float64)
    with torch.no_grad():
        expected = numpy_forward(weights, images.numpy(), model.patch_size, model.config["gelu"])[1]
        assert relative(model.features(images), expected) <= 1e-10
    with pytest.raises(UserError, match=r"all zero.*(finetune|features)"):
        allmlp.predict(model, [])
