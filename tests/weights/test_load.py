"""Loading the authors', timm's and lucidrains' weights: they compute the same, and every tensor is accounted for."""

import gc
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import WRAPPINGS, Array, bfloat16, current, older, random_weights, wrapped
from layouts import timm as timm_layout
from reference import numpy_forward, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import allmlp
from allmlp.errors import UserError
from allmlp.model import Mixer
from allmlp.weights.convert import save_as
from allmlp.weights.load import load

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative


def images_for(model: Mixer, dtype: torch.dtype = torch.float64, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, model.config["in_channels"], *model.image_size, dtype=dtype, generator=generator)


def relative(actual: Tensor | Array, expected: Tensor | Array) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert expected.std() > 0.05  # otherwise the comparison means nothing
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def agrees(model: Mixer, weights: dict[str, Array], gelu: str, dtype: torch.dtype) -> None:
    """Checks tokens before the last LayerNorm, features and logits against the NumPy forward pass with ``weights``."""
    assert {p.dtype for p in model.parameters()} == {dtype}
    images = images_for(model, dtype)
    expected = numpy_forward(weights, images.numpy(), model.patch_size, gelu)
    with torch.no_grad():
        found = model.tokens(images), model.features(images), model(images)
    for actual, theirs in zip(found, expected, strict=True):
        assert relative(actual, theirs) <= TOLERANCE[dtype]


def tensors(arrays: dict[str, Array]) -> dict[str, Tensor]:
    return {name: torch.tensor(array, dtype=torch.float32) for name, array in arrays.items()}


def message(path: Path, **given) -> str:
    """The message of the UserError that loading raises: one line that names the file."""
    with pytest.raises(UserError) as caught:
        load(path, **given)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


# The authors' layouts

LAYOUTS = {
    "current": current,
    "older": older,
    "older, gaps": lambda w: older(w, numbers=(3, 10)),  # "10" sorts before "3" as text
    "older, axes elsewhere": lambda w: older(w, numbers=(9, 11), axes=(2, 1)),
}


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("kind", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("wrapping", WRAPPINGS, ids=lambda w: w or "bare")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_authors_weights_match_the_reference(tmp_path: Path, layout: str, wrapping: str, kind: str, write) -> None:
    weights = random_weights(1, classes=7, grid=(3, 3), patch=(4, 2), width=10, tokens_mlp=6, channels_mlp=12)
    if kind == "float32":
        weights = {name: array.astype(np.float32) for name, array in weights.items()}
    stored = weights
    if kind == "bfloat16":
        pairs = {name: bfloat16(array) for name, array in weights.items()}
        weights = {name: values for name, (_, values) in pairs.items()}
        stored = {name: voids for name, (voids, _) in pairs.items()}
    arrays = wrapped(LAYOUTS[layout](stored), wrapping)
    write(tmp_path / "w.npz", **dict(sorted(arrays.items(), key=lambda item: item[0][::-1])))
    model = load(tmp_path / "w.npz")
    assert model.image_size == (12, 6)
    assert model.config["gelu"] == "tanh"
    agrees(model, weights, "tanh", torch.float64 if kind == "float64" else torch.float32)


def test_the_writer_of_bfloat16_rounds_as_torch_does() -> None:
    array = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    voids, values = bfloat16(array)
    assert voids.dtype == np.dtype("V2")
    assert voids.shape == array.shape
    assert torch.equal(torch.tensor(values), torch.tensor(array).bfloat16().float())


@pytest.mark.parametrize("seed", range(3))
def test_the_order_in_the_file_does_not_matter(tmp_path: Path, seed: int) -> None:
    weights = random_weights(2)
    for arrays in (current(weights), older(weights, numbers=(2, 10))):
        names = np.random.default_rng(seed).permutation(list(arrays))
        np.savez(tmp_path / "w.npz", **{name: arrays[name] for name in names})
        agrees(load(tmp_path / "w.npz"), weights, "tanh", torch.float64)


def test_more_than_ten_blocks_are_in_numerical_order(tmp_path: Path) -> None:
    weights = random_weights(3, blocks=12)
    for arrays in (current(weights), older(weights)):
        np.savez(tmp_path / "w.npz", **arrays)
        model = load(tmp_path / "w.npz")
        assert model.config["num_blocks"] == 12
        agrees(model, weights, "tanh", torch.float64)


@pytest.mark.parametrize("sizes", [{"tokens_mlp": 1}, {"grid": (1, 1)}, {"channels_mlp": 1}, {"classes": 1}], ids=str)
def test_sizes_of_one_are_not_squeezed(tmp_path: Path, sizes: dict) -> None:
    weights = random_weights(4, **sizes)
    for arrays in (current(weights), older(weights)):
        np.savez(tmp_path / "w.npz", **arrays)
        agrees(load(tmp_path / "w.npz"), weights, "tanh", torch.float64)


def test_other_arrays_of_a_checkpoint_are_ignored_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.savez(tmp_path / "w.npz", **wrapped(current(random_weights()), "opt/target/"))
    with caplog.at_level(logging.INFO, "allmlp"):
        load(tmp_path / "w.npz")
    (said,) = (record.getMessage() for record in caplog.records if "ignored" in record.getMessage())
    assert str(tmp_path / "w.npz") in said
    assert "opt/state/param_states/" in said
    assert "opt/target" not in said


def test_integers_of_the_optimizer_are_ignored(tmp_path: Path) -> None:
    """flax.optim stores its step as an int32 next to the moments."""
    weights = random_weights()
    state = {"opt/state/step": np.int32(300), "opt/state/rng": np.arange(2, dtype=np.uint32)}
    np.savez(tmp_path / "w.npz", **wrapped(current(weights), "opt/target/"), **state)
    agrees(load(tmp_path / "w.npz"), weights, "tanh", torch.float64)


def test_files_are_recognized_by_content_not_by_name(tmp_path: Path) -> None:
    weights = random_weights()
    arrays = timm_layout(weights)
    np.savez(tmp_path / "w.npz", **current(weights))
    (tmp_path / "w.npz").rename(tmp_path / "npz.bin")
    (tmp_path / "npz.pth").write_bytes((tmp_path / "npz.bin").read_bytes())
    (tmp_path / "npz.safetensors").write_bytes((tmp_path / "npz.bin").read_bytes())
    for name in ("npz.bin", "npz.pth", "npz.safetensors"):
        agrees(load(tmp_path / name), weights, "tanh", torch.float64)
    exact = {name: torch.tensor(array) for name, array in arrays.items()}
    for name in ("safetensors.npz", "safetensors.pt", "none"):
        save_file(exact, tmp_path / name)
        agrees(load(tmp_path / name), weights, "erf", torch.float64)
    for name in ("torch.npz", "torch.safetensors"):
        for zipped in (True, False):
            torch.save(exact, tmp_path / name, _use_new_zipfile_serialization=zipped)
            agrees(load(tmp_path / name), weights, "erf", torch.float64)
    model = load(tmp_path / "none")
    allmlp.save(model, tmp_path / "native.safetensors")
    (tmp_path / "native.safetensors").rename(tmp_path / "native.npz")
    agrees(load(tmp_path / "native.npz"), weights, "erf", torch.float64)


def test_an_npz_round_trip_is_exact(tmp_path: Path) -> None:
    """.npz → load → save → load → .npz, also from the older layout: arrays bit for bit, names and shapes the same."""
    for dtype in (np.float32, np.float64):
        weights = random_weights(6, dtype=dtype)
        weights["head.bias"][0] = -0.0
        expected = current(weights)
        for i, arrays in enumerate((expected, wrapped(older(weights, numbers=(3, 10)), "opt/target/params/"))):
            np.savez(tmp_path / f"{i}.npz", **arrays)
            allmlp.save(load(tmp_path / f"{i}.npz"), tmp_path / f"{i}.safetensors")
            save_as(load(tmp_path / f"{i}.safetensors"), tmp_path / f"{i}-again.npz", "npz")
            with np.load(tmp_path / f"{i}-again.npz") as again:
                assert set(again) == set(expected)
                for name, array in expected.items():
                    assert again[name].shape == array.shape
                    assert again[name].dtype == array.dtype
                    assert again[name].tobytes() == array.tobytes(), name


# timm's layout

TIMM = [
    "mixer_s32_224",
    "mixer_s16_224",
    "mixer_b32_224",
    "mixer_b16_224",
    pytest.param("mixer_l32_224", marks=pytest.mark.slow),
    pytest.param("mixer_l16_224", marks=pytest.mark.slow),
]


def random_peer(name: str, **options) -> nn.Module:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        peer = timm.create_model(name, pretrained=False, **options)
    peer = peer.to_empty(device="cpu").eval()
    randomise(peer, seed=21)
    return peer


def agrees_with(model: Mixer, peer: nn.Module, last_norm: nn.Module, batch: int = 2) -> None:
    """Checks float32 tokens before the last LayerNorm, and logits."""
    images = images_for(model, torch.float32, batch)
    seen: list[Tensor] = []
    hook = last_norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = peer.eval()(images)
        assert relative(model.tokens(images), seen[0]) <= TOLERANCE[torch.float32]
        assert relative(model(images), logits) <= TOLERANCE[torch.float32]
    hook.remove()


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)), name


@pytest.mark.parametrize("name", TIMM)
def test_timms_models_round_trip(tmp_path: Path, name: str) -> None:
    timm = pytest.importorskip("timm")
    gc.collect()
    peer = random_peer(name)
    path = tmp_path / ("w.pth" if name.endswith(("s16_224", "b32_224", "l32_224")) else "w.safetensors")
    torch.save(peer.state_dict(), path) if path.suffix == ".pth" else save_file(peer.state_dict(), path)
    model = load(path)
    assert (model.config["gelu"], model.config["norm_eps"]) == ("erf", 1e-6)
    agrees_with(model, peer, peer.norm)
    save_as(model, tmp_path / "out.safetensors", "timm")
    path.unlink()
    del model
    out = load_file(tmp_path / "out.safetensors")
    same_bits(out, peer.state_dict())
    with torch.device("meta"):
        theirs = timm.create_model(name)
    theirs.load_state_dict(out, strict=True, assign=True)


@pytest.mark.parametrize("options", [{"num_classes": 0}, {"num_classes": 5, "in_chans": 1}, {"img_size": 64}], ids=str)
def test_timms_models_of_other_sizes(tmp_path: Path, options: dict) -> None:
    peer = random_peer("mixer_s32_224", **options)
    save_file(peer.state_dict(), tmp_path / "w.safetensors")
    agrees_with(load(tmp_path / "w.safetensors"), peer, peer.norm)


@pytest.mark.parametrize(
    ("wrap", "ignored"),
    [
        (lambda state: state, ""),
        (lambda state: {"state_dict": state, "epoch": 3}, "epoch"),
        (lambda state: {"model": state, "optimizer": {"state": {}, "lr": 0.1}}, "optimizer"),
        (lambda state: {f"module.{name}": tensor for name, tensor in state.items()}, ""),
        (lambda state: {"state_dict": {f"module.{name}": t for name, t in state.items()}, "arch": "x"}, "arch"),
        (lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()}, ""),
        (lambda state: {name: nn.Parameter(tensor) for name, tensor in state.items()}, ""),
        (lambda state: {"state_dict_ema": state, "state_dict": {k: -v for k, v in state.items()}}, "state_dict"),
    ],
    ids=["bare", "state_dict", "model", "DDP", "DDP in state_dict", "compiled", "parameters", "averaged"],
)
def test_wrapped_state_dicts(tmp_path: Path, wrap, ignored: str, caplog: pytest.LogCaptureFixture) -> None:
    weights = random_weights(7, dtype=np.float32)
    state = tensors(timm_layout(weights))
    for zipped in (True, False):
        caplog.clear()
        torch.save(wrap(state), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        with caplog.at_level(logging.INFO, "allmlp"):
            model = load(tmp_path / "w.pth")
        agrees(model, weights, "erf", torch.float32)
        said = [r.getMessage() for r in caplog.records if "ignored" in r.getMessage()]
        assert len(said) == bool(ignored)
        assert all(ignored in line for line in said)


def test_native_names_in_a_state_dict(tmp_path: Path) -> None:
    weights = random_weights(8, dtype=np.float32)
    torch.save(tensors(weights), tmp_path / "w.pt")
    agrees(load(tmp_path / "w.pt"), weights, "tanh", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_weights_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in tensors(timm_layout(random_weights(9))).items()}
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        model = load(tmp_path / name)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert torch.equal(model.head.weight, state["head.weight"].float())


# lucidrains' layout


def lucidrains(**options) -> nn.Module:
    package = pytest.importorskip("mlp_mixer_pytorch")
    sizes = {"image_size": 16, "channels": 3, "patch_size": 4, "dim": 12, "depth": 2, "num_classes": 5}
    peer = package.MLPMixer(**sizes | options)
    randomise(peer, seed=31)
    return peer


@pytest.mark.parametrize("as_torch", [False, True])
@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({}, {}),
        ({"depth": 11}, {}),
        ({"channels": 1}, {"in_channels": 1}),
        ({"channels": 4}, {"in_channels": 4}),
        ({"channels": 2}, {"in_channels": 2}),
        ({"image_size": (8, 16)}, {"image_size": (8, 16)}),
        ({"image_size": (16, 8), "channels": 1}, {"image_size": (16, 8), "in_channels": 1}),
        ({"image_size": (4, 64)}, {"image_size": (4, 64)}),  # 16 patches, which could be a square
        ({"expansion_factor": 1, "expansion_factor_token": 2}, {}),  # D_S < D_C
    ],
    ids=str,
)
def test_lucidrains_models(tmp_path: Path, options: dict, given: dict, as_torch: bool) -> None:
    peer = lucidrains(**options)
    path = tmp_path / "w"
    torch.save(peer.state_dict(), path) if as_torch else save_file(peer.state_dict(), path)
    model = load(path, **given)
    assert (model.config["gelu"], model.config["norm_eps"]) == ("erf", 1e-5)
    depth = options.get("depth", 2)
    agrees_with(model, peer, peer[depth + 2])
    allmlp.save(model, tmp_path / "native.safetensors")
    agrees_with(load(tmp_path / "native.safetensors"), peer, peer[depth + 2])


def test_the_epsilon_of_lucidrains_matters(tmp_path: Path) -> None:
    """The comparison above would notice 1e-6 instead of 1e-5."""
    peer = lucidrains()
    with torch.no_grad():
        for parameter in peer[1].parameters():  # small tokens, whose variance is near ε
            parameter.mul_(0.01)
    save_file(peer.state_dict(), tmp_path / "w")
    model = load(tmp_path / "w")
    agrees_with(model, peer, peer[4])
    other = Mixer(**model.config | {"norm_eps": 1e-6})
    other.load_state_dict(model.state_dict())
    images = images_for(model, torch.float32)
    with torch.no_grad():
        assert relative(other(images), peer(images)) > TOLERANCE[torch.float32]


@pytest.mark.parametrize("channels", [1, 4])
def test_ambiguous_channels(tmp_path: Path, channels: int) -> None:
    save_file(lucidrains(channels=channels).state_dict(), tmp_path / "w")
    said = message(tmp_path / "w")
    assert f"patches of {16 * channels} numbers" in said
    assert "1, 4 channels would fit" in said
    assert "give in_channels=" in said
    assert "in_channels=5" in message(tmp_path / "w", in_channels=5)


@pytest.mark.parametrize("given", [-3, -1, 5])
def test_impossible_channels(tmp_path: Path, given: int) -> None:
    save_file(lucidrains().state_dict(), tmp_path / "w")
    assert f"in_channels={given}" in message(tmp_path / "w", in_channels=given)


def test_swapped_widths_give_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file(lucidrains().state_dict(), tmp_path / "w")
    load(tmp_path / "w")
    assert any("D_S = 48" in r.getMessage() and "D_C = 6" in r.getMessage() for r in caplog.records)


# Sizes


@pytest.mark.parametrize("patch", [(2, 3), (4, 4), (5, 1)])
@pytest.mark.parametrize("classes", [0, 4])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_sizes_come_from_the_shapes(tmp_path: Path, patch: tuple[int, int], classes: int, channels: int) -> None:
    sizes = {"blocks": 3, "width": 7, "tokens_mlp": 11, "channels_mlp": 13}
    weights = random_weights(10, patch=patch, classes=classes, channels=channels, grid=(2, 2), **sizes)
    np.savez(tmp_path / "w.npz", **current(weights))
    model = load(tmp_path / "w.npz")
    assert {key: model.config[key] for key in ("patch_size", "num_classes", "in_channels", "num_blocks")} == {
        "patch_size": patch,
        "num_classes": classes,
        "in_channels": channels,
        "num_blocks": 3,
    }
    assert (model.config["hidden_dim"], model.config["tokens_mlp_dim"], model.config["channels_mlp_dim"]) == (7, 11, 13)
    assert model.image_size == (2 * patch[0], 2 * patch[1])
    agrees(model, weights, "tanh", torch.float64)


def test_a_rectangular_grid_asks_for_the_image_size(tmp_path: Path) -> None:
    weights = random_weights(11, grid=(2, 3), patch=(4, 2))
    np.savez(tmp_path / "w.npz", **current(weights))
    said = message(tmp_path / "w.npz")
    assert "6 patches of 4×2 px do not form a square" in said
    assert "give image_size=(height, width)" in said
    agrees(load(tmp_path / "w.npz", image_size=(8, 6)), weights, "tanh", torch.float64)
    wide = load(tmp_path / "w.npz", image_size=(12, 4))  # 3×2 fits as well
    assert wide.grid == (3, 2)


@pytest.mark.parametrize("size", [16, (12, 16), (10, 12), (0, 0), (-12, -12), 13])
def test_an_image_size_that_does_not_fit_the_file(tmp_path: Path, size: int | tuple[int, int]) -> None:
    np.savez(tmp_path / "w.npz", **current(random_weights(12)))  # 3×3 patches of 4
    with pytest.raises(UserError) as caught:
        load(tmp_path / "w.npz", image_size=size)
    said = str(caught.value)
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) > 0:
        assert str(tmp_path / "w.npz") in said
        assert "9 patches of 4×4 px" in said
        assert f"{height}×{width} px are not" in said
        assert "trained at 12×12 px; load it without image_size, then resize it" in said
    load(tmp_path / "w.npz", image_size=12, in_channels=3)


def test_arguments_must_agree_with_a_native_file_too(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", **current(random_weights(12)))
    allmlp.save(load(tmp_path / "w.npz"), tmp_path / "native.safetensors")
    for name in ("w.npz", "native.safetensors"):
        said = message(tmp_path / name, in_channels=1)
        assert "in_channels=1, but its stem takes 3: leave it out" in said
    said = message(tmp_path / "native.safetensors", image_size=24)
    assert "trained at 12×12 px" in said
    assert "mixer resize" in said
    assert load(tmp_path / "native.safetensors", image_size=(12, 12), in_channels=3).image_size == (12, 12)


# Every tensor is accounted for


def refuses(path: Path, arrays: dict[str, Array]) -> str:
    np.savez(path, **arrays)
    return message(path)


def test_missing_unexpected_and_wrong_tensors_are_all_listed(tmp_path: Path) -> None:
    arrays = current(random_weights(13))
    gone = ("MixerBlock_1/LayerNorm_1/bias", "MixerBlock_0/token_mixing/Dense_1/bias")
    for name in gone:
        del arrays[name]
    more = ("pos_embedding", "MixerBlock_0/SomeDense/kernel")
    arrays |= {name: np.ones((2, 2)) for name in more}
    arrays["MixerBlock_1/channel_mixing/Dense_1/kernel"] = np.ones((6, 9))
    arrays["pre_head_layer_norm/scale"] = np.ones(9)
    said = refuses(tmp_path / "w.npz", arrays)
    missing, unexpected, wrong = (part for part in said.split("; ") if re.search(r"\d (missing|unexp|wrong)", part))
    assert "2 missing" in missing
    assert all(name in missing for name in gone)
    assert "2 unexpected" in unexpected
    assert all(name in unexpected for name in more)
    assert "2 wrong shape" in wrong
    assert re.search(r"pre_head_layer_norm/scale \(9,\) instead of \(8,\)", wrong)
    assert re.search(r"channel_mixing/Dense_1/kernel \(\d+, \d+\) instead of \(\d+, \d+\)", wrong)


def test_flax_shapes_are_shown_as_they_are_in_the_file(tmp_path: Path) -> None:
    arrays = current(random_weights(13))
    arrays["MixerBlock_1/channel_mixing/Dense_1/kernel"] = np.ones((6, 9))
    assert "(6, 9) instead of (6, 8)" in refuses(tmp_path / "w.npz", arrays)


@pytest.mark.parametrize("name", list(current(random_weights(blocks=1))))
def test_each_missing_tensor_is_reported(tmp_path: Path, name: str) -> None:
    arrays = current(random_weights(14, blocks=1))
    del arrays[name]
    said = refuses(tmp_path / "w.npz", arrays)
    if name != "MixerBlock_0/token_mixing/Dense_0/kernel":  # which identifies the layout
        lone = "head/" in name
        ours = {"stem/kernel": "stem.weight", "MixerBlock_0/channel_mixing/Dense_0/kernel": "channel_mixing.dense_0"}
        assert name in said or ours.get(name, "?") in said or (lone and "1 unexpected: head/" in said)


@pytest.mark.parametrize("name", list(timm_layout(random_weights(blocks=1))))
@pytest.mark.parametrize("shape", ["longer", "one axis more", "flat", "scalar"])
def test_each_wrong_shape_is_reported(tmp_path: Path, name: str, shape: str) -> None:
    state = tensors(timm_layout(random_weights(15, blocks=2)))
    tensor = state[name]
    state[name] = {
        "longer": torch.zeros(len(tensor) + 1, *tensor.shape[1:]),
        "one axis more": tensor[None].contiguous(),
        "flat": tensor.flatten().contiguous() if tensor.ndim > 1 else tensor[:1].clone(),
        "scalar": torch.tensor(1.0),
    }[shape]
    save_file(state, tmp_path / "w.safetensors")
    message(tmp_path / "w.safetensors")


@pytest.mark.parametrize("shape", [(), (5,), (1, 1, 5, 9)])
def test_a_kernel_of_the_second_block_without_two_axes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    state = tensors(timm_layout(random_weights(15)))
    for mlp in ("mlp_tokens", "mlp_channels"):
        name = f"blocks.1.{mlp}.fc1.weight"
        save_file(state | {name: torch.zeros(shape)}, tmp_path / "w.safetensors")
        assert f"{name} {shape} instead of" in message(tmp_path / "w.safetensors")


def test_a_long_list_is_shortened(tmp_path: Path) -> None:
    weights = random_weights(16, blocks=4)
    arrays = {name: array for name, array in current(weights).items() if not name.startswith("MixerBlock_2")}
    said = refuses(tmp_path / "w.npz", arrays)
    assert "12 missing" in said
    assert "MixerBlock_2/" in said
    assert len(said) < 2000


def test_mixed_resolutions_are_named_as_the_cause(tmp_path: Path) -> None:
    """Only one of the blocks was resized."""
    weights, larger = random_weights(17), random_weights(17, grid=(6, 6))
    mixed = weights | {name: array for name, array in larger.items() if name.startswith("blocks.1.token_mixing")}
    said = refuses(tmp_path / "w.npz", current(mixed))
    assert "3 wrong shape" in said
    assert "36" in said
    assert "trained at another image size (36 patches): load it at that size and resize it" in said


def test_mixed_resolutions_with_equal_widths_are_not_called_swapped(tmp_path: Path) -> None:
    sizes = {"tokens_mlp": 6, "channels_mlp": 6}
    weights, larger = random_weights(17, **sizes), random_weights(17, grid=(6, 6), **sizes)
    mixed = weights | {name: array for name, array in larger.items() if name.startswith("blocks.1.token_mixing")}
    said = refuses(tmp_path / "w.npz", current(mixed))
    assert "swapped" not in said
    assert "another image size" in said


def test_swapped_widths_are_named_as_the_cause(tmp_path: Path) -> None:
    weights, swapped = random_weights(18), random_weights(18, tokens_mlp=6, channels_mlp=5)
    mixed = weights | {name: array for name, array in swapped.items() if name.startswith("blocks.1.")}
    said = refuses(tmp_path / "w.npz", current(mixed))
    assert "D_S and D_C are swapped, as in lucidrains' port" in said


def test_a_head_of_another_data_set_is_named_as_the_cause(tmp_path: Path) -> None:
    weights = random_weights(19)
    weights["head.bias"] = np.ones(10)
    said = refuses(tmp_path / "w.npz", current(weights))
    assert "head/bias (10,) instead of (3,)" in said
    assert "the head is that of another dataset" in said


# Heads of zeros


@pytest.mark.parametrize("layout", ["npz", "native", "timm"])
def test_a_head_of_zeros_gives_features_and_refuses_to_predict(
    tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    weights = random_weights(20)
    weights["head.weight"][:] = 0  # not the bias: in the authors' pre-training it starts at −10
    np.savez(tmp_path / "w.npz", **current(weights))
    path = tmp_path / "w.npz"
    if layout != "npz":
        save_as(load(path), tmp_path / "w.safetensors", layout)  # type: ignore[arg-type]
        path = tmp_path / "w.safetensors"
    caplog.clear()
    model = load(path)
    assert any(
        r.levelno == logging.WARNING and "head is all zero" in r.getMessage() and str(path) in r.getMessage()
        for r in caplog.records
    )
    images = images_for(model)
    _, expected, _ = numpy_forward(weights, images.numpy(), model.patch_size, "tanh")
    with torch.no_grad():
        assert relative(model.features(images), expected) <= TOLERANCE[torch.float64]
    with pytest.raises(UserError, match=r"all zero.*(finetune|features)"):
        allmlp.predict(model, [])


def test_a_trained_head_gives_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.savez(tmp_path / "w.npz", **current(random_weights(20)))
    load(tmp_path / "w.npz")
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_training_does_not_change_the_file(tmp_path: Path) -> None:
    state = tensors(timm_layout(random_weights(21)))
    torch.save(state, tmp_path / "w.pth")
    save_file(state, tmp_path / "w.safetensors")
    np.savez(tmp_path / "w.npz", **current(random_weights(21)))
    for name in ("w.pth", "w.safetensors", "w.npz"):
        before = (tmp_path / name).read_bytes()
        model = load(tmp_path / name)
        assert not model.training
        assert all(p.requires_grad and p.is_leaf and p.is_contiguous() for p in model.parameters())
        model(images_for(model, model.head.weight.dtype)).sum().backward()
        torch.optim.SGD(model.parameters(), lr=1).step()
        assert (tmp_path / name).read_bytes() == before
