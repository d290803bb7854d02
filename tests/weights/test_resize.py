"""Resizing: Supplement C is exact, resampling is as close as documented, and the original model is not modified."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_models import cases, make
from reference import numpy_forward, randomise
from torch import Tensor

import allmlp
from allmlp.errors import UserError
from allmlp.factory import build_meta
from allmlp.flops import cost
from allmlp.metadata import Metadata, Preprocessing
from allmlp.model import Mixer
from allmlp.weights.resize import resize, resized_config

Pair = tuple[int, int]
SIDES = st.integers(1, 9)
FACTORS = st.integers(1, 3)


def mixer(grid: Pair, patch: Pair = (1, 1), **options: Any) -> Mixer:
    """A small float64 Mixer whose every parameter is random, with activations near 1."""
    model = make(image_size=(grid[0] * patch[0], grid[1] * patch[1]), patch_size=patch, **options).double()
    randomise(model, 0)
    return model


def to_grid(model: Mixer, grid: Pair) -> Mixer:
    return resize(model, (grid[0] * model.patch_size[0], grid[1] * model.patch_size[1]))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def parts(maps: Tensor, by: Pair) -> list[Tensor]:
    """(B, channels, H, W) cut into by[0] × by[1] spatial parts, row by row."""
    return [part for row in maps.chunk(by[0], 2) for part in row.chunk(by[1], 3)]


def as_map(tokens: Tensor, grid: Pair) -> Tensor:
    """(B, S, C) → (B, C, rows, columns)"""
    return tokens.mT.unflatten(2, grid)


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# Supplement C


@cases(40)
@given(
    st.tuples(FACTORS, FACTORS), st.tuples(FACTORS, FACTORS), st.sampled_from([(4, 4), (4, 3)]),
    st.sampled_from(["tanh", "erf"]),
)  # fmt: skip
def test_tokens_at_an_integer_factor_are_those_of_the_spatial_parts(
    by: Pair, grid: Pair, patch: Pair, gelu: str
) -> None:
    """By this package's model and by the reference in NumPy."""
    model = mixer(grid, patch, gelu=gelu)
    resized = to_grid(model, (grid[0] * by[0], grid[1] * by[1]))
    assert resized.config["tokens_mlp_dim"] == by[0] * by[1] * 5
    pixels = normal(2, 3, *resized.image_size)
    with torch.no_grad():
        tokens = resized.tokens(pixels)
        alone = [model.tokens(part) for part in parts(pixels, by)]
        for whole, part in zip(parts(as_map(tokens, resized.grid), by), alone, strict=True):
            assert largest(whole, as_map(part, grid)) <= 1e-10
        features = torch.stack([model.features(part) for part in parts(pixels, by)]).mean(0)
        assert largest(resized.features(pixels), features) <= 1e-10
        assert largest(resized(pixels), model.head(features)) <= 1e-10
    weights = {name: tensor.numpy() for name, tensor in resized.state_dict().items()}
    assert np.abs(numpy_forward(weights, pixels.numpy(), patch, gelu)[0] - tokens.numpy()).max() <= 1e-10
    assert torch.stack(alone).std() > 0.3  # otherwise agreement means nothing


def test_steps_compose_and_the_same_size_is_a_copy() -> None:
    model = make()
    stepwise, at_once = resize(resize(model, 24), 48), resize(model, 48)
    assert stepwise.config == at_once.config
    pixels = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        assert largest(stepwise.tokens(pixels), at_once.tokens(pixels)) <= 1e-4
        model.head.bias[:2] = torch.tensor([-0.0, 1e-40])
    again = resize(model, 12)
    assert (again.config, again.metadata) == (model.config, model.metadata)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor.view(torch.int32), model.state_dict()[name].view(torch.int32)), name


@pytest.mark.parametrize("size", [12, 24, (12, 24), 16, 8])
def test_the_original_is_not_changed_and_what_it_has_is_kept(size: Any) -> None:
    """Also with another default device, and without drawing a random number."""
    model = make(gelu="erf", norm_eps=1e-5, dropout=0.1, stochastic_depth=0.25, rescale=True).train()
    model.stem.requires_grad_(False)
    view = Preprocessing(crop="resize", crop_ratio=0.7, interpolation="bicubic", mean=(0.1, 0.2, 0.3))
    model.metadata = Metadata(classes=("a", "b", "c"), preprocessing=view, provenance={"source": {"file": "a"}})
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(model.metadata), dict(model.config)
    random_state = torch.get_rng_state()
    with torch.device("meta"):
        resized = resize(model, size)
    assert torch.equal(torch.get_rng_state(), random_state)
    expected = resize(model, size).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resized.state_dict().items())
    sizes = {key: resized.config[key] for key in ("image_size", "tokens_mlp_dim")}
    assert resized.config == model.config | sizes == resized_config(model.config, size)
    assert [b.token_drop_path.rate for b in resized.blocks] == [b.token_drop_path.rate for b in model.blocks]
    assert (resized.metadata.classes, resized.metadata.preprocessing) == (("a", "b", "c"), view)
    assert all(module.training for module in resized.modules())
    assert not any(module.training for module in resize(model.eval(), size).modules())
    model.train()
    for name, parameter in resized.named_parameters():
        assert parameter.requires_grad == (not name.startswith("stem")), name
        assert parameter.is_leaf
        assert "token_mixing" in name or torch.equal(parameter, before[0][name])
    with torch.no_grad():
        for parameter in resized.parameters():
            parameter.zero_()
    resized.metadata.provenance["source"]["file"] = "b"
    resized.config["gelu"] = "tanh"
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before[0].items())
    assert (model.metadata, model.config) == before[1:]


def test_provenance_names_the_old_sizes_and_takes_no_credit_for_their_scores() -> None:
    model = make()
    model.metadata = Metadata(provenance={"test_top1": 0.625, "val_top1": None})
    once = resize(model, (24, 12))
    assert once.metadata.provenance == {
        "resized_from": [[12, 12]],
        "before_resize": {"image_size": [12, 12], "test_top1": 0.625, "val_top1": None},
    }
    assert resize(once, 16).metadata.provenance["resized_from"] == [[12, 12], [24, 12]]
    assert once.metadata.provenance["resized_from"] == [[12, 12]]
    assert resize(make(), 24).metadata.provenance == {"resized_from": [[12, 12]]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types_are_kept_and_values_rounded_once(dtype: torch.dtype) -> None:
    model = make(dtype=dtype)
    for size in (24, 16, (24, 12)):
        exact = resize(copy.deepcopy(model).double(), size).state_dict()
        for name, tensor in resize(model, size).state_dict().items():
            assert tensor.dtype == dtype
            assert tensor.is_contiguous()
            assert torch.equal(tensor, exact[name].to(dtype)), name


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    model = make().cuda()
    for size in (12, 24, 16):
        resized, expected = resize(model, size), resize(copy.deepcopy(model).cpu(), size)
        for name, tensor in resized.state_dict().items():
            assert tensor.is_cuda
            assert torch.equal(tensor.cpu(), expected.state_dict()[name]), name


def test_models_without_a_head_and_of_one_channel() -> None:
    assert not [name for name in resize(make(num_classes=0), 24).state_dict() if name.startswith("head")]
    gray = resize(make(in_channels=1), 16).train()
    gray(torch.randn(2, 1, 16, 16)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in gray.parameters())


# Beyond the paper


def triangle(before: int, after: int) -> np.ndarray:
    """(after, before): weights of the old patches for each new one, by the distance of their centers."""
    width = max(before / after, 1.0)  # of the coarser grid's patches, in patches of the old grid
    centers = (np.arange(after) + 0.5) * before / after - 0.5
    weight = np.clip(1 - np.abs(centers[:, None] - np.arange(before)) / width, 0, None)
    return weight / weight.sum(1, keepdims=True)


def axis_parts(n: int, m: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each part of an axis: the matrices from new to old values and from old to new."""
    if m % n:
        return [(triangle(m, n), triangle(n, m))]
    return [(np.eye(m)[k : k + n], np.eye(m)[:, k : k + n]) for k in range(0, m, n)]


@cases(40)
@given(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES))
def test_the_weights_are_those_of_the_formula(old: Pair, new: Pair) -> None:
    """W1' = [W1 R], b1' = [b1], W2' = [T W2], b2' = the sum of T b2; so constant maps are mixed as before."""
    model = mixer(old)
    resized = to_grid(model, new)
    axes = [axis_parts(n, m) for n, m in zip(old, new, strict=True)]
    both = [(np.kron(r[0], c[0]), np.kron(r[1], c[1])) for r in axes[0] for c in axes[1]]
    assert (resized.grid, resized.config["tokens_mlp_dim"]) == (new, 5 * len(both))
    assert cost(build_meta(resized.config)).parameters == sum(p.numel() for p in resized.parameters())
    names = [f"token_mixing.dense_{j}.{kind}" for j in (0, 1) for kind in ("weight", "bias")]
    for old_block, new_block in zip(model.blocks, resized.blocks, strict=True):
        w1, b1, w2, b2 = (old_block.get_parameter(name).detach().numpy() for name in names)
        expected = (
            np.concatenate([w1 @ to_old for to_old, _ in both]),
            np.tile(b1, len(both)),
            np.concatenate([to_new @ w2 for _, to_new in both], axis=1),
            sum(to_new @ b2 for _, to_new in both),
        )
        for name, array in zip(names, expected, strict=True):
            assert np.abs(new_block.get_parameter(name).detach().numpy() - array).max() <= 1e-12, name
        with torch.no_grad():
            hidden = old_block.token_mixing.dense_0(torch.ones(1, old[0] * old[1]).double())
            now = new_block.token_mixing.dense_0(torch.ones(1, new[0] * new[1]).double())
        assert largest(now, hidden.repeat(1, len(both))) <= 1e-10


# Errors

WRONG: list[tuple[Any, str]] = [
    (26, r"26×26.*4×4.*24×24"), ((24, 27), r"24×27.*4×4.*24×28"), (0, r"\(0, 0\).*at least 1"),
    ((24, -4), r"\(24, -4\).*at least 1"), (24.5, r"24\.5.*whole number"), ((24, 24, 24), r"\(24, 24, 24\).*whole"),
    ("24", "'24'.*whole number"), (None, "None.*whole number"),
]  # fmt: skip


def test_sizes() -> None:
    model = make()
    for size, message in WRONG:
        for call in (lambda size: resize(model, size), lambda size: resized_config(model.config, size)):
            with pytest.raises(UserError, match=message):
                call(size)
    fitting: list[Any] = [np.int64(24), [24, 24], (np.int32(24), 24)]
    for size in fitting:
        assert resize(model, size).image_size == (24, 24)
        assert all(type(side) is int for side in resize(model, size).image_size)
    assert allmlp.resize is resize
