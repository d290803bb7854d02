"""Resizing: Supplement C is exact, resampling is as close as documented, and the original model is not modified."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import numpy_forward, randomise
from torch import Tensor

import allmlp
from allmlp.errors import UserError
from allmlp.factory import build_meta
from allmlp.flops import cost
from allmlp.metadata import Metadata, Preprocessing
from allmlp.model import Mixer
from allmlp.variants import VARIANTS
from allmlp.weights.load import load
from allmlp.weights.native import save
from allmlp.weights.resize import axis_parts, resampling_matrix, resize, resized_config

Pair = tuple[int, int]
SQUARE, OBLONG, TALL_PATCHES = ((12, 12), (4, 4)), ((8, 12), (4, 4)), ((8, 9), (4, 3))  # image, patch
FACTORS = [(2, 2), (3, 3), (2, 1), (1, 2), (2, 3), (3, 1)]
BEYOND = [(12, 12), (10, 10), (6, 6), (4, 4), (8, 10), (10, 8), (16, 12), (12, 24), (7, 3), (1, 8), (9, 1)]  # of 8 × 8


def make(image: Pair = (12, 12), patch: Pair = (4, 4), seed: int = 0, **options) -> Mixer:
    """A small float64 Mixer whose every parameter is random."""
    sizes = {"num_classes": 3, "num_blocks": 2, "hidden_dim": 8, "tokens_mlp_dim": 5, "channels_mlp_dim": 6}
    model = Mixer(image_size=image, patch_size=patch, **sizes | options).double().eval()
    randomise(model, seed)
    return model


def on_grid(model: Mixer, grid: Pair) -> Pair:
    """The image size that has this grid of the model's patches."""
    return grid[0] * model.patch_size[0], grid[1] * model.patch_size[1]


def images(model: Mixer, seed: int = 0) -> Tensor:
    return torch.randn(2, 3, *model.image_size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def parts(maps: Tensor, by: Pair) -> list[Tensor]:
    """(B, channels, H, W) cut into by[0] × by[1] spatial parts, row by row."""
    return [part for row in maps.chunk(by[0], 2) for part in row.chunk(by[1], 3)]


def as_map(tokens: Tensor, grid: Pair) -> Tensor:
    """(B, S, C) → (B, C, rows, columns)"""
    return tokens.mT.unflatten(2, grid)


def weights_of(model: Mixer) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# Supplement C


@pytest.mark.parametrize("gelu", ["tanh", "erf"])
@pytest.mark.parametrize(("image", "patch"), [SQUARE, OBLONG, TALL_PATCHES], ids=["square", "oblong", "tall patches"])
@pytest.mark.parametrize("by", FACTORS, ids=str)
def test_tokens_at_an_integer_factor_are_those_of_the_parts(by: Pair, image: Pair, patch: Pair, gelu: str) -> None:
    model = make(image, patch, gelu=gelu)
    resized = resize(model, (image[0] * by[0], image[1] * by[1]))
    assert resized.config["tokens_mlp_dim"] == by[0] * by[1] * model.config["tokens_mlp_dim"]
    pixels = images(resized)
    with torch.no_grad():
        whole = parts(as_map(resized.tokens(pixels), resized.grid), by)
        alone = [as_map(model.tokens(part), model.grid) for part in parts(pixels, by)]
        assert max(largest(a, b) for a, b in zip(whole, alone, strict=True)) <= 1e-10
        features = torch.stack([model.features(part) for part in parts(pixels, by)]).mean(0)
        assert largest(resized.features(pixels), features) <= 1e-10
        assert largest(resized(pixels), model.head(features)) <= 1e-10
    spread = torch.stack(alone).std()
    assert spread > 0.3  # otherwise agreement means nothing


@pytest.mark.parametrize(("image", "patch"), [SQUARE, OBLONG, TALL_PATCHES], ids=["square", "oblong", "tall patches"])
@pytest.mark.parametrize("by", FACTORS, ids=str)
def test_supplement_c_in_numpy(by: Pair, image: Pair, patch: Pair) -> None:
    """By the reference forward pass: resized weights on the image, original weights on its parts."""
    model = make(image, patch)
    resized = resize(model, (image[0] * by[0], image[1] * by[1]))
    pixels = images(resized, seed=1)
    tokens, features, _ = numpy_forward(weights_of(resized), pixels.numpy(), patch, "tanh")
    of_parts = [numpy_forward(weights_of(model), part.numpy(), patch, "tanh") for part in parts(pixels, by)]
    for whole, (alone, _, _) in zip(parts(as_map(torch.from_numpy(tokens), resized.grid), by), of_parts, strict=True):
        assert largest(whole, as_map(torch.from_numpy(alone), model.grid)) <= 1e-10
    assert np.abs(features - np.mean([feature for _, feature, _ in of_parts], axis=0)).max() <= 1e-10


def block_diagonal(model: Mixer, by: Pair, order: Tensor) -> dict[str, np.ndarray]:
    """Supplement C with the new tokens of each part given by ``order``, (parts, S)."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count = by[0] * by[1]
    for i in range(model.config["num_blocks"]):
        prefix = f"blocks.{i}.token_mixing."
        places = torch.argsort(order.flatten())  # position of each new token, part by part
        state[f"{prefix}dense_0.weight"] = torch.block_diag(*[state[f"{prefix}dense_0.weight"]] * count)[:, places]
        state[f"{prefix}dense_0.bias"] = state[f"{prefix}dense_0.bias"].repeat(count)
        state[f"{prefix}dense_1.weight"] = torch.block_diag(*[state[f"{prefix}dense_1.weight"]] * count)[places]
        state[f"{prefix}dense_1.bias"] = state[f"{prefix}dense_1.bias"].repeat(count)[places]
    return {name: tensor.numpy() for name, tensor in state.items()}


@pytest.mark.parametrize(("by", "runs_are_parts"), [((2, 2), False), ((1, 2), False), ((2, 1), True)], ids=str)
def test_parts_are_quadrants_and_not_runs_of_tokens(by: Pair, runs_are_parts: bool) -> None:
    model = make()
    resized = resize(model, (12 * by[0], 12 * by[1]))
    places = torch.arange(resized.grid[0] * resized.grid[1])
    spatial = torch.stack([part.flatten() for part in parts(places.reshape(1, 1, *resized.grid), by)])
    runs = places.reshape(by[0] * by[1], -1)
    pixels = images(resized)
    with torch.no_grad():
        ours = resized.tokens(pixels).numpy()
    quadrants = numpy_forward(block_diagonal(model, by, spatial), pixels.numpy(), 4, "tanh")[0]
    in_runs = numpy_forward(block_diagonal(model, by, runs), pixels.numpy(), 4, "tanh")[0]
    assert np.abs(ours - quadrants).max() <= 1e-10
    assert (np.abs(ours - in_runs).max() <= 1e-10) == runs_are_parts
    assert runs_are_parts or np.abs(ours - in_runs).max() > 0.1


def test_twice_by_two_is_once_by_four() -> None:
    model = make((8, 8))
    stepwise, at_once = resize(resize(model, 16), 32), resize(model, 32)
    assert stepwise.config == at_once.config
    pixels = images(at_once)
    with torch.no_grad():
        assert largest(stepwise.tokens(pixels), at_once.tokens(pixels)) <= 1e-10


def test_the_same_size_is_a_copy_bit_for_bit() -> None:
    model = make()
    with torch.no_grad():
        model.head.bias[:2] = torch.tensor([-0.0, 5e-324])
    before = copy.deepcopy(model.state_dict())
    again = resize(model, 12)
    assert again.config == model.config
    assert again.state_dict().keys() == before.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor.view(torch.int64), before[name].view(torch.int64)), name
    assert again.metadata == model.metadata
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.fill_(7)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("size", [24, (12, 24), 16, 8, (24, 16)])
def test_changing_the_resized_model_does_not_change_the_original(size: int | Pair) -> None:
    model = make()
    model.metadata = Metadata(provenance={"source": {"file": "a"}})
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(model.metadata), dict(model.config)
    resized = resize(model, size)
    with torch.no_grad():
        for parameter in resized.parameters():
            parameter.zero_()
    resized.metadata.provenance["source"]["file"] = "b"
    resized.config["gelu"] = "erf"
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before[0].items())
    assert (model.metadata, model.config) == before[1:]
    assert model.image_size == (12, 12)


# Beyond the paper


@pytest.mark.parametrize("before", range(1, 9))
def test_the_matrices_of_an_axis_preserve_constants(before: int) -> None:
    """Rows of to_old, and of the sum of all to_new, sum to one."""
    for after in range(1, 25):
        axis = axis_parts(before, after)
        assert len(axis) == (after // before if after % before == 0 else 1)
        for to_old, to_new in axis:
            assert (to_old.shape, to_new.shape) == ((before, after), (after, before))
            assert to_old.min() >= 0
            assert to_new.min() >= 0
            assert largest(to_old.sum(1), torch.ones(before)) <= 1e-12
        assert largest(sum(to_new.sum(1) for _, to_new in axis), torch.ones(after)) <= 1e-12
        for to_old, to_new in axis:  # symmetric: no end of the image is preferred
            other = [(r.flip(0, 1), w.flip(0, 1)) for r, w in axis]
            assert min(largest(to_old, r) + largest(to_new, w) for r, w in other) <= 1e-12


def triangle(before: int, after: int) -> np.ndarray:
    """(after, before): weights of the old patches for each new one, by the distance of their centers."""
    width = max(before / after, 1.0)  # of the coarser grid's patches, in patches of the old grid
    centers = (np.arange(after) + 0.5) * before / after - 0.5
    weight = np.clip(1 - np.abs(centers[:, None] - np.arange(before)) / width, 0, None)
    return weight / weight.sum(1, keepdims=True)


def test_the_filter_is_a_triangle_as_wide_as_the_coarser_patches() -> None:
    for before, after in itertools.product(range(1, 15), repeat=2):
        assert np.abs(resampling_matrix(before, after).numpy() - triangle(before, after)).max() <= 1e-12, (
            before,
            after,
        )


@pytest.mark.parametrize("new", BEYOND, ids=str)
def test_tokens_constant_over_the_grid_give_the_same_answer(new: Pair) -> None:
    """For any weights, hidden units have the same values; the output is the old one, resampled."""
    model = make((8, 8), (1, 1))
    resized = resize(model, new)
    constant = torch.randn(3, 8, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for old_block, new_block in zip(model.blocks, resized.blocks, strict=True):
        with torch.no_grad():
            hidden = old_block.token_mixing.dense_0(constant.expand(-1, -1, 64))
            now = new_block.token_mixing.dense_0(constant.expand(-1, -1, new[0] * new[1]))
            copies = now.shape[-1] // hidden.shape[-1]
            assert largest(now, hidden.repeat(1, 1, copies)) <= 1e-10
            answer = new_block.token_mixing(constant.expand(-1, -1, new[0] * new[1])).unflatten(2, new)
            expected = old_block.token_mixing(constant.expand(-1, -1, 64)).unflatten(2, (8, 8))
            to_rows, to_columns = (
                torch.eye(8, dtype=torch.float64).repeat(n // 8, 1) if n % 8 == 0 else torch.from_numpy(triangle(8, n))
                for n in new
            )  # repeated for the parts, or resampled
            expected = to_rows @ expected @ to_columns.mT
            assert largest(answer, expected) <= 1e-10


def with_uniform_output(model: Mixer) -> Mixer:
    """Changes token mixing to write the same value to every patch."""
    with torch.no_grad():
        for block in model.blocks:
            dense = block.token_mixing.dense_1
            dense.weight.copy_(dense.weight[:1].expand_as(dense.weight))
            dense.bias.fill_(dense.bias[0])
    return model


@pytest.mark.parametrize("new", [*BEYOND, (16, 16), (8, 8)], ids=str)
@pytest.mark.parametrize("patch", [(4, 4), (2, 3)], ids=str)
def test_one_repeated_patch_gives_the_same_tokens_at_every_size(new: Pair, patch: Pair) -> None:
    model = with_uniform_output(make((8 * patch[0], 8 * patch[1]), patch, num_blocks=3))
    resized = resize(model, on_grid(model, new))
    one = torch.randn(2, 3, *patch, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before, after = model.tokens(one.repeat(1, 1, 8, 8)), resized.tokens(one.repeat(1, 1, *new))
        assert largest(before, before[:, :1]) <= 1e-10
        assert largest(after, before[:, :1].expand_as(after)) <= 1e-10
        assert largest(resized(one.repeat(1, 1, *new)), model(one.repeat(1, 1, 8, 8))) <= 1e-10
        without = make((8 * patch[0], 8 * patch[1]), patch, num_blocks=3, seed=1)
        assert largest(without.tokens(one.repeat(1, 1, 8, 8)), before) > 0.1


def smooth(height: int, width: int, channels: int, linear: bool) -> Tensor:
    """(1, channels, H, W): a random smooth function over the unit square, sampled at the patches' centers."""
    rng = np.random.default_rng(0)
    y, x = ((np.arange(n) + 0.5) / n for n in (height, width))
    a, b, c, d = rng.normal(size=(4, channels, 1, 1))
    values = a + b * y[:, None] + c * x
    if not linear:
        values = values + 0.5 * d * np.cos(np.pi * y)[:, None] * np.cos(np.pi * x)
    return torch.from_numpy(values)[None]


def with_smooth_kernels(model: Mixer) -> Mixer:
    """Builds token mixing's kernels from the lowest cosines over the grid, at the scale of random ones."""
    rows, columns = (
        torch.cos(torch.arange(2, dtype=torch.float64)[:, None] * torch.pi * (torch.arange(n) + 0.5) / n)
        for n in model.grid
    )
    basis = torch.kron(rows, columns) * 2**0.5  # (4, S)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for block in model.blocks:
            reads, writes = block.token_mixing.dense_0, block.token_mixing.dense_1
            mix = torch.randn(len(reads.weight), 4, dtype=torch.float64, generator=generator)
            reads.weight.copy_(mix @ basis / basis.shape[1])
            mix = torch.randn(writes.weight.shape[1], 4, dtype=torch.float64, generator=generator)
            writes.weight.copy_((mix @ basis).T / mix.shape[0] ** 0.5)
            writes.bias.copy_(torch.randn(4, dtype=torch.float64, generator=generator) @ basis / 2)
    return model


def naive(model: Mixer, new: Pair) -> Mixer:
    """The naive method: W1, W2 and b2 resized as images by plain bilinear interpolation."""
    resized = Mixer(**model.config | {"image_size": on_grid(model, new)}).double().eval()
    state = dict(model.state_dict())
    for i in range(model.config["num_blocks"]):
        for name, turn in (("dense_0.weight", False), ("dense_1.weight", True), ("dense_1.bias", False)):
            tensor = state[f"blocks.{i}.token_mixing.{name}"]
            flat = (tensor.T if turn else tensor).reshape(-1, 1, *model.grid)
            larger = F.interpolate(flat, new, mode="bilinear").flatten(1)
            state[f"blocks.{i}.token_mixing.{name}"] = larger.T if turn else larger.reshape(*tensor.shape[:-1], -1)
    resized.load_state_dict(state)
    return resized


def mixing_error(model: Mixer, resized: Mixer, linear: bool) -> float:
    """The relative error of token mixing on the new grid, resampled to the old one."""
    worst = 0.0
    for old_block, new_block in zip(model.blocks, resized.blocks, strict=True):
        with torch.no_grad():
            before = old_block.token_mixing(smooth(*model.grid, 8, linear).flatten(2)).unflatten(2, model.grid)
            after = new_block.token_mixing(smooth(*resized.grid, 8, linear).flatten(2)).unflatten(2, resized.grid)
        back = F.interpolate(after, model.grid, mode="bilinear", antialias=True)
        worst = max(worst, float((back - before).norm() / before.norm()))
    return worst


CLOSE = 0.05  # relative error; that of naive interpolation is more than four times as large


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "smooth"])
@pytest.mark.parametrize("new", [(18, 18), (15, 15), (9, 9), (8, 8), (12, 16), (18, 12), (17, 11)], ids=str)
def test_smooth_token_maps_are_mixed_as_before(new: Pair, linear: bool) -> None:
    model = with_smooth_kernels(make((12, 12), (1, 1)))
    ours, theirs = mixing_error(model, resize(model, new), linear), mixing_error(model, naive(model, new), linear)
    assert ours <= CLOSE
    assert theirs > 4 * CLOSE


@pytest.mark.parametrize("new", [(18, 18), (6, 6), (15, 17)], ids=str)
def test_hidden_units_respond_to_smooth_maps_as_before_for_any_weights(new: Pair) -> None:
    model = make((12, 12), (1, 1), tokens_mlp_dim=40)
    before, after = smooth(12, 12, 8, linear=True).flatten(2), smooth(*new, 8, linear=True).flatten(2)
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            was = F.linear(before, block.token_mixing.dense_0.weight)

            def error(changed: Mixer, i: int = i, was: Tensor = was) -> float:
                now = F.linear(after, changed.blocks[i].token_mixing.dense_0.weight)
                return float((now - was).norm() / was.norm())

            assert error(resize(model, new)) <= CLOSE
            assert error(naive(model, new)) > 4 * CLOSE


@pytest.mark.parametrize("between", [(18, 18), (15, 15), (12, 18), (17, 13)], ids=str)
def test_up_and_down_again_is_nearly_the_original(between: Pair) -> None:
    model = with_smooth_kernels(make((12, 12), (1, 1)))
    again = resize(resize(model, between), 12)
    assert again.config == model.config
    assert again.metadata.provenance["resized_from"] == [[12, 12], list(between)]
    pixels = torch.cat([smooth(12, 12, 3, linear=True), smooth(12, 12, 3, linear=False)])
    with torch.no_grad():
        before = model.tokens(pixels)
        error = (again.tokens(pixels) - before).norm() / before.norm()
    assert error <= CLOSE


@pytest.mark.parametrize("new", [(18, 18), (6, 6), (9, 8)], ids=str)
def test_a_smooth_image_has_nearly_the_same_features_at_another_size(new: Pair) -> None:
    model = with_smooth_kernels(make((12, 12), (1, 1)))
    with torch.no_grad():
        before = model.features(smooth(12, 12, 3, linear=False))

        def error(changed: Mixer) -> float:
            return float((changed.features(smooth(*new, 3, linear=False)) - before).norm() / before.norm())

        assert error(resize(model, new)) <= CLOSE
        assert error(resize(model, new)) < error(naive(model, new)) / 3


# D_S and cost


@pytest.mark.parametrize(
    ("old", "new", "times"),
    [
        ((8, 8), (16, 16), 4), ((8, 8), (24, 24), 9), ((8, 8), (16, 8), 2), ((8, 8), (8, 24), 3), ((8, 8), (16, 24), 6),
        ((8, 8), (8, 8), 1), ((8, 8), (12, 12), 1), ((8, 8), (4, 4), 1), ((8, 8), (10, 8), 1), ((8, 8), (7, 9), 1),
        ((8, 8), (16, 12), 2), ((8, 8), (6, 24), 3), ((8, 4), (8, 12), 3), ((8, 4), (4, 8), 2), ((1, 1), (3, 2), 6),
    ],
    ids=str,
)  # fmt: skip
def test_d_s_grows_by_the_number_of_parts(old: Pair, new: Pair, times: int) -> None:
    model = make((2 * old[0], 3 * old[1]), (2, 3))
    resized = resize(model, on_grid(model, new))
    assert resized.grid == new
    assert resized.config == model.config | {"image_size": on_grid(model, new), "tokens_mlp_dim": 5 * times}
    assert resized.config == resized_config(model.config, on_grid(model, new))
    counted = cost(build_meta(resized_config(model.config, on_grid(model, new)))).parameters
    assert counted == sum(parameter.numel() for parameter in resized.parameters())
    assert all(tensor.isfinite().all() for tensor in resized.state_dict().values())
    with torch.no_grad():
        assert resized(images(resized)).shape == (2, 3)


# ../shared/paper/table1_computed.csv (each variant at 224 px and as Supplement C makes it for 448 px): parameters
# without the head in millions, GMAC per image
AT_448 = {
    "S/32": (21.61, 5.241),
    "S/16": (30.068, 20.038),
    "B/32": (66.314, 17.11),
    "B/16": (86.227, 67.051),
    "L/32": (224.018, 59.807),
    "L/16": (279.476, 237.377),
    "H/14": (588.442, 645.016),
}


def config_of(name: str, num_classes: int) -> dict:
    with torch.device("meta"):
        return allmlp.create(name, num_classes=num_classes).config


@pytest.mark.parametrize("name", AT_448)
def test_what_table_1_costs_at_448(name: str) -> None:
    resized = resized_config(config_of(name, num_classes=0), 448)
    assert resized["tokens_mlp_dim"] == 4 * VARIANTS[name]["tokens_mlp_dim"]
    counted = cost(build_meta(resized))
    assert round(counted.parameters / 1e6, 3) == AT_448[name][0]
    assert round(counted.macs / 1e9, 3) == AT_448[name][1]


def test_b_16_at_448() -> None:
    """Only token mixing has more parameters."""
    config = config_of("B/16", num_classes=1000)
    resized = resized_config(config, 448)
    assert resized["tokens_mlp_dim"] == 1536
    assert cost(build_meta(config)).parameters == 59_880_472
    old, new = 2 * 196 * 384 + 384 + 196, 2 * 784 * 1536 + 1536 + 784  # of one block's token mixing
    assert cost(build_meta(resized)).parameters == 59_880_472 + 12 * (new - old)


def test_resized_config_does_not_change_its_argument() -> None:
    config = make().config
    before = dict(config)
    resized_config(config, 24)
    assert config == before


# What does not change


@pytest.mark.parametrize("size", [24, 16, 8, (24, 12)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_types_are_kept_and_values_rounded_once(dtype: torch.dtype, size: int | Pair) -> None:
    model = make().to(dtype)
    resized, exact = resize(model, size), resize(copy.deepcopy(model).double(), size)
    for name, tensor in resized.state_dict().items():
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert torch.equal(tensor, exact.state_dict()[name].to(dtype)), name


def test_all_but_token_mixing_is_bit_for_bit_the_same() -> None:
    model = make().float()
    for size in (24, 16, 8):
        resized = resize(model, size).state_dict()
        for name, tensor in model.state_dict().items():
            if "token_mixing" not in name:
                assert torch.equal(resized[name], tensor), name
            elif name.endswith("weight"):
                assert resized[name].shape != tensor.shape, name


def test_mode_and_what_is_frozen_are_kept() -> None:
    model = make().train()
    model.stem.requires_grad_(False)
    model.blocks[1].token_mixing.dense_0.weight.requires_grad_(False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert len(frozen) == 3
    for size in (12, 24, 16):
        resized = resize(model, size)
        assert all(module.training for module in resized.modules())
        assert {name for name, parameter in resized.named_parameters() if not parameter.requires_grad} == frozen
        assert all(parameter.is_leaf and parameter.grad is None for parameter in resized.parameters())
        assert not any(module.training for module in resize(model.eval(), size).modules())
        model.train()


def test_a_resized_model_can_be_trained() -> None:
    resized = resize(make(), 16).train()
    resized(images(resized)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in resized.parameters())


def test_settings_of_the_model_are_kept() -> None:
    model = make(gelu="erf", norm_eps=1e-5, dropout=0.1, stochastic_depth=0.25, rescale=True)
    resized = resize(model, 24)
    assert resized.config == model.config | {"image_size": (24, 24), "tokens_mlp_dim": 20}
    assert [block.token_drop_path.rate for block in resized.blocks] == [
        block.token_drop_path.rate for block in model.blocks
    ]
    assert resized.pre_head_layer_norm.eps == 1e-5


def test_a_model_without_a_head_and_one_of_one_channel() -> None:
    assert not [name for name in resize(make(num_classes=0), 24).state_dict() if name.startswith("head")]
    gray = resize(make(in_channels=1), 16)
    assert gray(torch.zeros(1, 1, 16, 16)).shape == (1, 3)


def test_metadata_is_kept_and_names_the_old_size(tmp_path) -> None:
    model = make()
    view = Preprocessing(crop="resize", crop_ratio=0.7, interpolation="bicubic", mean=(0.1, 0.2, 0.3))
    model.metadata = Metadata(classes=("a", "b", "c"), preprocessing=view, provenance={"source": {"file": "x.npz"}})
    once = resize(model, (24, 12))
    assert (once.metadata.classes, once.metadata.preprocessing) == (
        ("a", "b", "c"),
        view,
    )
    assert once.metadata.provenance == {"source": {"file": "x.npz"}, "resized_from": [[12, 12]]}
    twice = resize(once, 16)
    assert twice.metadata.provenance["resized_from"] == [[12, 12], [24, 12]]
    assert once.metadata.provenance["resized_from"] == [[12, 12]]
    assert model.metadata.provenance == {"source": {"file": "x.npz"}}
    save(twice, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    assert asdict(again.metadata) == asdict(twice.metadata)
    assert again.config == twice.config


def test_resizing_draws_no_random_numbers() -> None:
    model, before = make(), torch.get_rng_state()
    resize(model, 24)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_default_device_does_not_matter() -> None:
    model = make()
    with torch.device("meta"):
        resized = [resize(model, size) for size in (12, 24, 16)]
    for found, size in zip(resized, (12, 24, 16), strict=True):
        expected = resize(model, size).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    model = make().cuda()
    for size in (12, 24, 16):
        resized, expected = resize(model, size), resize(copy.deepcopy(model).cpu(), size)
        for name, tensor in resized.state_dict().items():
            assert tensor.is_cuda
            assert torch.equal(tensor.cpu(), expected.state_dict()[name]), name


# Errors


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (26, r"image size 26×26 is not a multiple of the patch size 4×4: use 24×24"),
        ((24, 27), r"image size 24×27 is not a multiple of the patch size 4×4: use 24×28"),
        (3, r"image size 3×3 is not a multiple of the patch size 4×4: use 4×4"),
        (0, r"image_size = \(0, 0\): must be at least 1 pixel"),
        ((24, -4), r"image_size = \(24, -4\): must be at least 1 pixel"),
        (24.5, r"size 24\.5: give a whole number of pixels, or two, \(height, width\)"),
        ((24, 24, 24), r"size \(24, 24, 24\): give a whole number of pixels, or two"),
        ("24", r"size '24': give a whole number"),
        (None, r"size None: give a whole number"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "call",
    [lambda model, size: resize(model, size), lambda model, size: resized_config(model.config, size)],
    ids=["resize", "resized_config"],
)
def test_a_size_that_does_not_fit_names_size_and_patch(size, message: str, call: Callable) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=f"^{message}"):
        call(model, size)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_sizes_as_numpy_and_lists_give_them() -> None:
    model = make()
    for size in (np.int64(24), [24, 24], (np.int32(24), 24)):
        resized = resize(model, size)
        assert resized.image_size == (24, 24)
        assert all(type(side) is int for side in resized.image_size)


def test_the_name_in_the_package() -> None:
    assert allmlp.resize is resize
