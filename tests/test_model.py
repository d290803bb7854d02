"""The model against the paper's equations, the authors' initial weights, and what it says to wrong arguments."""

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference import gelu_erf, gelu_tanh, numpy_forward, randomise
from torch import Tensor, nn

from allmlp import rng
from allmlp.errors import UserError
from allmlp.model import Mixer, MixerBlock, MlpBlock, gelu
from allmlp.rng import sample_keys
from allmlp.variants import create

SMALL = {
    "num_classes": 5,
    "image_size": 12,
    "patch_size": 4,
    "num_blocks": 3,
    "hidden_dim": 16,
    "tokens_mlp_dim": 10,
    "channels_mlp_dim": 24,
    "seed": 0,
}


def small(**options) -> Mixer:
    return Mixer(**SMALL | options)


def random_model(seed: int = 1, **options) -> Mixer:
    """Float64, every parameter random: a fresh head is zero, and its logits agree with anything."""
    model = small(**options).double().eval()
    randomise(model, seed)
    return model


def random_images(model: Mixer, batch: int = 3, seed: int = 2) -> Tensor:
    shape = (batch, model.stem.in_channels, *model.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def close(actual: Tensor, expected: Tensor | np.ndarray, tolerance: float = 1e-10) -> bool:
    expected = torch.as_tensor(expected)
    return actual.shape == expected.shape and (actual - expected).abs().max().item() <= tolerance


# The equations


@pytest.mark.parametrize("form", ["tanh", "erf"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="small"),
        pytest.param({"image_size": (8, 20)}, id="rectangular-image"),
        pytest.param({"image_size": (12, 20), "patch_size": (6, 4)}, id="rectangular-patches"),
        pytest.param({"in_channels": 1}, id="1-channel"),
        pytest.param({"in_channels": 4}, id="4-channels"),
        pytest.param({"num_classes": 0}, id="no-head"),
        pytest.param({"image_size": 4, "num_blocks": 1}, id="one-token-one-block"),
    ],
)
def test_agrees_with_the_equations_in_numpy(options: dict, form: str) -> None:
    model = random_model(gelu=form, **options)
    images = random_images(model)
    weights = {name: value.numpy() for name, value in weights_of(model).items()}
    tokens, features, logits = numpy_forward(weights, images.numpy(), model.patch_size, form)
    with torch.no_grad():
        assert close(model.tokens(images), tokens)
        assert close(model.features(images), features)
        assert close(model(images), logits)


def test_parameters_have_the_shapes_of_the_paper() -> None:
    shapes = {name: tuple(value.shape) for name, value in small(num_blocks=1, image_size=(8, 20)).named_parameters()}
    dense = {  # S = 2 · 5 tokens, C = 16, D_S = 10, D_C = 24
        "blocks.0.token_mixing.dense_0": (10, 10),
        "blocks.0.token_mixing.dense_1": (10, 10),
        "blocks.0.channel_mixing.dense_0": (24, 16),
        "blocks.0.channel_mixing.dense_1": (16, 24),
        "stem": (16, 3, 4, 4),
        "head": (5, 16),
        "blocks.0.norm1": (16,),
        "blocks.0.norm2": (16,),
        "pre_head_layer_norm": (16,),
    }
    expected = {f"{name}.weight": shape for name, shape in dense.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in dense.items()}
    assert shapes == expected


def test_without_classes_the_output_is_the_features() -> None:
    model = random_model(num_classes=0)
    images = random_images(model)
    assert not any(name.startswith("head") for name, _ in model.named_parameters())
    assert torch.equal(model(images), model.features(images))
    assert model(images).shape == (3, 16)


def test_every_parameter_reaches_the_logits_but_the_dead_one() -> None:
    model = random_model()
    model(random_images(model)).square().sum().backward()
    dead = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-10}
    assert dead == {f"blocks.{i}.token_mixing.dense_1.bias" for i in range(3)}


def test_second_token_mixing_bias_shifts_tokens_but_never_reaches_the_logits() -> None:
    model = random_model()
    images = random_images(model)
    with torch.no_grad():
        tokens, logits = model.tokens(images), model(images)
        shifts = [torch.linspace(-1, 2, 9, dtype=torch.float64) * (i + 1) for i in range(3)]
        for block, shift in zip(model.blocks, shifts, strict=True):
            block.token_mixing.dense_1.bias += shift  # one constant per token, the same for all of its channels
        assert close(model(images), logits)
        assert close(model.tokens(images), tokens + sum(shifts)[:, None])


@pytest.mark.parametrize("seed", range(3))
def test_order_of_patches_is_free_if_token_mixing_follows_it(seed: int) -> None:
    model = random_model(image_size=(12, 8))
    images = random_images(model)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    grid = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)  # (B, 3, S, 4, 4)
    moved = grid[:, :, order].unflatten(2, (3, 2)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    with torch.no_grad():
        tokens, logits = model.tokens(images), model(images)
        assert not close(model(moved), logits, 1e-3)  # token mixing does tell the places apart
        for block in model.blocks:
            first, second = block.token_mixing.dense_0, block.token_mixing.dense_1
            first.weight.copy_(first.weight[:, order])
            second.weight.copy_(second.weight[order])
            second.bias.copy_(second.bias[order])
        assert close(model.tokens(moved), tokens[:, order])
        assert close(model(moved), logits)


# GELU


@pytest.mark.parametrize(("form", "reference"), [("tanh", gelu_tanh), ("erf", gelu_erf)])
@pytest.mark.parametrize("compiling", [False, True])
def test_gelu_is_the_named_form_compiled_or_not(
    form: str, reference: Callable, compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x = torch.linspace(-12, 12, 2001, dtype=torch.float64)
    assert close(gelu(x, form), reference(x.numpy()), 1e-12)


def test_compiled_gelu_and_its_gradient_equal_the_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def value_and_gradient() -> tuple[Tensor, Tensor]:
        x = torch.linspace(-12, 12, 2001, dtype=torch.float64, requires_grad=True)
        y = gelu(x, "tanh")
        return y, torch.autograd.grad(y.sum(), x)[0]

    eager = value_and_gradient()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.delattr(torch.nn.functional, "gelu")  # the compiled form is written out: it does not call this
    for compiled, expected in zip(value_and_gradient(), eager, strict=True):
        assert close(compiled, expected, 1e-12)


# Initial weights


def kernels(model: Mixer) -> dict[str, Tensor]:
    return {k: w for k, w in weights_of(model).items() if w.ndim > 1 and k != "head.weight"}


def test_initial_kernels_are_lecun_normal_cut_at_two_sigma() -> None:
    model = Mixer(
        num_classes=10,
        image_size=(48, 40),
        patch_size=8,
        num_blocks=2,
        hidden_dim=96,
        tokens_mlp_dim=200,
        channels_mlp_dim=160,
        seed=3,
    )
    assert len(kernels(model)) == 1 + 2 * 4
    for name, kernel in kernels(model).items():
        n, std = kernel.numel(), math.prod(kernel.shape[1:]) ** -0.5
        cut = 2 * std / 0.87962566
        assert kernel.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n)), name
        assert abs(kernel.mean().item()) < 5 * std / math.sqrt(n), name
        assert 0.95 * cut < kernel.abs().max().item() <= cut * (1 + 1e-6), name


def test_other_initial_parameters_are_those_of_the_authors() -> None:
    for name, value in weights_of(small()).items():
        if name.endswith("bias") or name == "head.weight":
            assert (value == 0).all(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            assert value.std() > 0, name


def test_initial_weights_are_a_function_of_seed_and_name() -> None:
    torch.manual_seed(1)
    first, again, other = kernels(small(seed=7)), kernels(small(seed=7)), kernels(small(seed=8))
    for name, kernel in first.items():
        assert torch.equal(kernel, again[name]), name
        assert not torch.equal(kernel, other[name]), name
    assert not torch.equal(
        first["blocks.0.channel_mixing.dense_0.weight"], first["blocks.1.channel_mixing.dense_0.weight"]
    )


def test_more_blocks_or_classes_leave_the_other_initial_weights_alone() -> None:
    weights, larger = weights_of(small(num_blocks=2)), weights_of(small(num_blocks=4, num_classes=0))
    common = weights.keys() & larger.keys()
    assert len(common) == len(weights) - 2  # all but the head
    for name in common:
        assert torch.equal(weights[name], larger[name]), name


def test_without_a_seed_initial_weights_follow_torchs_generator() -> None:
    def stem(torch_seed: int | None = None) -> Tensor:
        if torch_seed is not None:
            torch.manual_seed(torch_seed)
        return small(seed=None).stem.weight.detach()

    first, following = stem(5), stem()
    assert torch.equal(first, stem(5))
    assert not torch.equal(first, following)
    assert not torch.equal(first, stem(6))


def test_without_a_seed_the_size_of_the_head_changes_no_other_weight() -> None:
    found = []
    for num_classes in (0, 5, 1000):
        torch.manual_seed(11)
        found.append((kernels(small(seed=None, num_classes=num_classes)), torch.rand(4)))
    (first, first_next), *others = found
    for weights, following in others:
        assert torch.equal(following, first_next)  # torch's generator is left at the same place, too
        assert all(torch.equal(first[name], weights[name]) for name in first)


def test_with_a_seed_torchs_generator_stays_where_it_was() -> None:
    before = torch.get_rng_state()
    small(seed=1)
    create("S/32", num_classes=3, image_size=32, num_blocks=1, hidden_dim=8, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    small(seed=None)
    assert not torch.equal(torch.get_rng_state(), before)


def test_under_the_meta_device_nothing_is_allocated() -> None:
    with torch.device("meta"):
        model = small()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in small().named_parameters()
    }


def test_config_makes_the_same_model_again() -> None:
    model = small(image_size=(8, 20), gelu="erf", dropout=0.1, stochastic_depth=0.2, rescale=True, in_channels=2)
    again = Mixer(**model.config, seed=0)
    assert again.config == model.config
    assert "seed" not in model.config
    assert model.config["image_size"] == (8, 20)
    assert model.config["patch_size"] == (4, 4)
    for name, value in weights_of(model).items():
        assert torch.equal(value, weights_of(again)[name]), name


# Stochastic depth and dropout


def mark_branches(block: MixerBlock) -> MixerBlock:
    """Makes the token branch add 1 and the channel branch 10, so that a sum tells which of them survived."""
    with torch.no_grad():
        for mlp, value in ((block.token_mixing, 1.0), (block.channel_mixing, 10.0)):
            mlp.dense_1.weight.zero_()
            mlp.dense_1.bias.fill_(value)
    return block.double().train()


def survivors(block: MixerBlock, batch: int, seed: int | None = None) -> Tensor:
    """(batch,) sums of the marks of the surviving branches; fails if a branch survives for part of an image."""
    tokens, channels = block.token_mixing.dense_0.in_features, block.channel_mixing.dense_0.in_features
    with torch.no_grad():
        keys = None if seed is None else sample_keys(seed, torch.arange(batch))
        out = mark_branches(block)(torch.zeros(batch, tokens, channels, dtype=torch.float64), keys)
    assert (out == out[:, :1, :1]).all()
    return out[:, 0, 0]


def within(count: Tensor | int, n: int, p: float) -> bool:
    """Whether a binomial count lies within five standard deviations of its mean."""
    return abs(int(count) - n * p) <= 5 * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("seed", [None, 0, 1, 2**31 - 1])
@pytest.mark.parametrize("rescale", [False, True])
def test_branches_are_dropped_per_image_and_independently(rescale: bool, seed: int | None) -> None:
    torch.manual_seed(0)
    n, p = 20_000, 0.3
    block = MixerBlock(4, 6, 5, 7, drop_path=p, rescale=rescale)
    scale = 1 / (1 - p) if rescale else 1
    sums = survivors(block, n, seed)
    token = (sums - scale).abs().lt(1e-9) | (sums - 11 * scale).abs().lt(1e-9)
    channel = (sums - 10 * scale).abs().lt(1e-9) | (sums - 11 * scale).abs().lt(1e-9)
    assert (token | channel | (sums == 0)).all()
    assert within(token.sum(), n, 1 - p)
    assert within(channel.sum(), n, 1 - p)
    assert within((token & channel).sum(), n, (1 - p) ** 2)
    assert within((~token & ~channel).sum(), n, p**2)
    assert sums.mean().item() == pytest.approx(11 if rescale else 11 * (1 - p), rel=0.02)


def test_another_draw_drops_other_images() -> None:
    torch.manual_seed(0)
    block = MixerBlock(4, 6, 5, 7, drop_path=0.5)
    assert not torch.equal(survivors(block, 100), survivors(block, 100))


@pytest.mark.parametrize("seed", [None, 0, 1, 2**31 - 1])
@pytest.mark.parametrize("rescale", [False, True])
def test_stochastic_depth_rises_linearly_from_zero_over_the_blocks(rescale: bool, seed: int | None) -> None:
    torch.manual_seed(0)
    n = 8000
    model = small(num_blocks=4, stochastic_depth=0.6, rescale=rescale, image_size=8)
    for block, rate in zip(model.blocks, (0, 0.2, 0.4, 0.6), strict=True):
        sums = survivors(block, n, seed)
        marks = (sums * (1 - rate) if rescale else sums).round()  # 0, 1, 10 or 11
        for branch in (marks % 10 == 0, marks < 10):  # where the token branch's 1 is missing, the channel branch's 10
            assert branch.sum() == 0 if rate == 0 else within(branch.sum(), n, rate)
        assert (sums == 0).sum() == 0 if rate == 0 else within((sums == 0).sum(), n, rate**2)
        assert sums.max().item() == pytest.approx(11 / (1 - rate) if rescale else 11)


def test_blocks_drop_other_images() -> None:
    n, rate = 8000, 0.5
    model = small(num_blocks=5, stochastic_depth=rate, image_size=8)
    for block in model.blocks:
        block.drop_path = rate
    dropped = [survivors(block, n, seed=4) == 0 for block in model.blocks]
    for i, first in enumerate(dropped):
        for second in dropped[:i]:
            assert within((first & second).sum(), n, rate**4)


def test_each_mask_of_the_model_has_a_place_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    places = []

    def uniform(keys: Tensor, place: int, like: Tensor) -> Tensor:
        places.append((place, tuple(like.shape)))
        return rng.uniform(keys, place, like)

    monkeypatch.setattr("allmlp.model.uniform", uniform)
    model = small(dropout=0.1, stochastic_depth=0.5).train()  # 9 tokens, 16 channels
    model(torch.zeros(2, 3, 12, 12), torch.arange(2))
    assert len({place for place, _ in places}) == len(places) == 3 * 4 + 2 * 2  # the first block drops no branch
    block = [(2, 16, 10), (2, 16, 9), (2, 1, 1), (2, 9, 24), (2, 9, 16), (2, 1, 1)]
    assert [shape for _, shape in places] == [s for s in block if s != (2, 1, 1)] + block + block


@pytest.mark.parametrize("options", [{"dropout": 0.4}, {"stochastic_depth": 0.6}, {"dropout": 0.2, "rescale": True}])
def test_an_images_masks_follow_its_key_and_not_the_batch(options: dict) -> None:
    model = random_model(**options).train()
    images, keys = random_images(model, 16), sample_keys(0, torch.arange(16))
    with torch.no_grad():
        whole = model(images, keys)
        assert torch.equal(model(images, keys), whole)
        order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
        assert close(model(images[order], keys[order]), whole[order], 1e-12)
        assert close(torch.cat([model(images[i : i + 4], keys[i : i + 4]) for i in range(0, 16, 4)]), whole, 1e-12)
        assert not close(model(images, keys.roll(1)), whole, 1e-3)
        assert torch.equal(model.eval()(images, keys), model(images))  # in evaluation they say nothing


def test_stochastic_depth_of_a_single_block_is_zero() -> None:
    assert (survivors(small(num_blocks=1, stochastic_depth=0.9).blocks[0], 200) == 11).all()


@pytest.mark.parametrize("rescale", [False, True])
def test_evaluation_drops_nothing_and_scales_nothing(rescale: bool) -> None:
    plain = random_model()
    noisy = random_model(dropout=0.5, stochastic_depth=0.9, rescale=rescale)
    images = random_images(plain)
    with torch.no_grad():
        assert torch.equal(noisy(images), plain(images))
        assert torch.equal(noisy.tokens(images), plain.tokens(images))
        assert not torch.equal(noisy.train()(images), plain(images))


def test_training_without_rates_is_deterministic_and_equal_to_evaluation() -> None:
    model = random_model()
    images = random_images(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), model.train()(images))


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_dropout_comes_after_each_dense_layer_and_in_training_alone(seed: int | None) -> None:
    torch.manual_seed(0)
    n, p, shift = 40_000, 0.4, 3.0
    mlp = MlpBlock(1, 1, "erf", p).double()
    with torch.no_grad():
        mlp.dense_0.weight.zero_()
        mlp.dense_0.bias.fill_(1)
        mlp.dense_1.weight.fill_(1)
        mlp.dense_1.bias.fill_(shift)
        hidden = float(gelu_erf(np.array(1.0)))
        keys = None if seed is None else sample_keys(seed, torch.arange(n))
        trained = mlp.train()(torch.zeros(n, 1, dtype=torch.float64), keys)[:, 0]
        assert (mlp.eval()(torch.zeros(9, 1, dtype=torch.float64)) - hidden - shift).abs().max() < 1e-12
    outcomes = {  # output: its probability
        0.0: p,
        shift / (1 - p): (1 - p) * p,
        (hidden / (1 - p) + shift) / (1 - p): (1 - p) ** 2,
    }
    counts = [((trained - value).abs() < 1e-9).sum() for value in outcomes]
    assert sum(counts) == n
    assert all(within(count, n, chance) for count, chance in zip(counts, outcomes.values(), strict=True))


def test_dropout_of_the_model_reaches_both_mlps_of_every_block() -> None:
    for block in small(dropout=0.5).train().blocks:
        for mlp in (block.token_mixing, block.channel_mixing):
            x = torch.ones(64, mlp.dense_0.in_features)
            mlp.dense_1.bias.data.fill_(1)
            assert (mlp(x) == 0).any()


# What wrong arguments are told


@pytest.mark.parametrize(
    ("image", "patch", "suggested"),
    [((29, 21), (4, 8), (28, 24)), ((12, 13), (4, 4), (12, 12)), ((3, 8), (8, 8), (8, 8)), (225, 16, (224, 224))],
)
def test_image_size_that_is_no_multiple_names_both_sizes_and_one_that_fits(image, patch, suggested) -> None:
    (h, w), (ph, pw) = ((s, s) if isinstance(s, int) else s for s in (image, patch))
    message = f"image size {h}×{w} is not a multiple of the patch size {ph}×{pw}: use {suggested[0]}×{suggested[1]}, or"
    with pytest.raises(UserError, match=re.escape(message)):
        small(image_size=image, patch_size=patch)
    assert small(image_size=suggested, patch_size=patch).image_size == suggested


@pytest.mark.parametrize("shape", [(2, 3, 12, 16), (2, 3, 16, 12), (2, 1, 12, 12), (3, 12, 12), (2, 1, 3, 12, 12)])
@pytest.mark.parametrize("method", ["forward", "features", "tokens"])
def test_images_of_another_shape_are_told_the_models(shape: tuple[int, ...], method: str) -> None:
    message = f"images of shape {shape}: this model takes (batch, 3, 12, 12); resize the images"
    with pytest.raises(UserError, match=re.escape(message)):
        getattr(small(), method)(torch.zeros(shape))


@pytest.mark.parametrize("name", ["dropout", "stochastic_depth"])
@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, math.nan])
def test_rates_outside_of_zero_to_one_are_refused(name: str, rate: float) -> None:
    with pytest.raises(UserError, match=f"{name} = {rate}: a probability, at least 0 and below 1"):
        small(**{name: rate})


@pytest.mark.parametrize("name", ["patch_size", "image_size"])
@pytest.mark.parametrize("value", [0, -4])
def test_sizes_in_pixels_below_one_are_refused(name: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"^{name} = \({value}, {value}\): at least 1 pixel$"):
        small(**{name: value})


def test_one_side_below_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"^image_size = \(12, 0\): at least 1 pixel$"):
        small(image_size=(12, 0))


COUNTS = ["num_blocks", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim", "in_channels"]


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [(name, value, 1) for name in COUNTS for value in (0, -4, 2.0, "3")]
    + [("num_classes", value, 0) for value in (-1, 2.0, "3")],
)
def test_counts_that_are_not_whole_or_too_small_are_refused(name: str, value: object, least: int) -> None:
    with pytest.raises(UserError, match=rf"^{name} = {re.escape(repr(value))}: a whole number, at least {least}$"):
        small(**{name: value})


@pytest.mark.parametrize("name", ["image_size", "patch_size"])
@pytest.mark.parametrize("size", [64.0, (64, 32, 9), (64,), "64", None, (64, 32.0), np.float64(64)])
def test_sizes_of_another_type_are_refused(name: str, size: object) -> None:
    message = f"size {size!r}: give a whole number of pixels, or two, (height, width)"
    with pytest.raises(UserError, match=re.escape(message)):
        small(**{name: size})


def test_numpys_whole_numbers_are_sizes_too_and_are_stored_as_pythons() -> None:
    model = small(image_size=np.int64(64), patch_size=(np.int32(4), np.int64(8)))
    assert model.config["image_size"] == model.image_size == (64, 64)
    assert model.patch_size == (4, 8)
    assert {type(side) for key in ("image_size", "patch_size") for side in model.config[key]} == {int}


def test_unknown_gelu_is_told_both_forms() -> None:
    with pytest.raises(UserError, match=r"gelu = 'relu': 'tanh' .* or 'erf'"):
        small(gelu="relu")


def test_mistakes_of_the_caller_are_value_errors_of_one_line() -> None:
    with pytest.raises(ValueError, match="multiple") as caught:
        small(image_size=13)
    assert "\n" not in str(caught.value)
