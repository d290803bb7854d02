"""The model against the paper's equations, and blocks with absent tokens."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference import (
    close,
    gelu_erf,
    gelu_tanh,
    numpy_forward,
    random_images,
    random_model,
    randomise,
    small,
    weights_of,
)
from torch import Tensor

from allmlp.errors import UserError
from allmlp.model import Mixer, MixerBlock, MlpBlock, mean_pool
from allmlp.rng import sample_keys

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


def test_every_parameter_but_the_dead_one_reaches_the_logits() -> None:
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
def test_permuting_patches_and_token_mixing_alike_changes_nothing(seed: int) -> None:
    model = random_model(image_size=(12, 8))
    images = random_images(model)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    grid = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)  # (B, 3, S, 4, 4)
    moved = grid[:, :, order].unflatten(2, (3, 2)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    with torch.no_grad():
        tokens, logits = model.tokens(images), model(images)
        assert not close(model(moved), logits, 1e-3)  # token mixing depends on the order
        for block in model.blocks:
            first, second = block.token_mixing.dense_0, block.token_mixing.dense_1
            first.weight.copy_(first.weight[:, order])
            second.weight.copy_(second.weight[order])
            second.bias.copy_(second.bias[order])
        assert close(model.tokens(moved), tokens[:, order])
        assert close(model(moved), logits)


@pytest.mark.parametrize(("form", "reference"), [("tanh", gelu_tanh), ("erf", gelu_erf)])
def test_gelu_has_the_named_form(form: str, reference: Callable) -> None:
    x = torch.linspace(-12, 12, 2001, dtype=torch.float64)
    assert close(MlpBlock(1, 1, form).gelu(x), reference(x.numpy()), 1e-12)


def test_under_the_meta_device_nothing_is_allocated() -> None:
    with torch.device("meta"):
        model = small()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in small().named_parameters()
    }


def test_config_builds_the_same_model_again() -> None:
    model = small(image_size=(8, 20), gelu="erf", dropout=0.1, stochastic_depth=0.2, rescale=True, in_channels=2)
    again = Mixer(**model.config, seed=0)
    assert again.config == model.config
    assert "seed" not in model.config
    assert model.config["image_size"] == (8, 20)
    assert model.config["patch_size"] == (4, 4)
    for name, value in weights_of(model).items():
        assert torch.equal(value, weights_of(again)[name]), name


def test_has_the_attributes_of_a_classifier() -> None:
    model = small(image_size=(8, 20), in_channels=2, num_classes=np.int64(7))
    assert (model.num_classes, model.in_channels, model.image_size) == (7, 2, (8, 20))
    assert type(model.num_classes) is int
    assert small(num_classes=0).num_classes == 0


# Absent tokens

MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)


def random_block(**options) -> MixerBlock:
    block = MixerBlock(5, 6, 7, 8, **options).double()
    randomise(block, seed=3)
    return block


def random_tokens() -> Tensor:
    return torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def with_absent(x: Tensor, value: float) -> Tensor:
    return torch.where(MASK[..., None], x, value)


def outcomes(x: Tensor, mask: Tensor | None, of_absent: bool = False, **options) -> list[Tensor]:
    """Of two blocks and a pooling: outputs at present tokens, pooled tokens, and all gradients."""
    blocks = [random_block(**options), random_block(index=1, **options)]
    x = x.clone().requires_grad_()
    keys, y = sample_keys(0, torch.arange(3)), x
    for block in blocks:
        y = block.train()(y, keys, mask)
    pooled = mean_pool(y, mask)
    loss = pooled.square().sum() + (y.square().sum() if of_absent else 0)
    parameters = [parameter for block in blocks for parameter in block.parameters()]
    gradients = torch.autograd.grad(loss, [x, *parameters])
    present = y if mask is None else y[mask]
    return [present.detach(), pooled.detach(), *gradients]


@pytest.mark.parametrize("of_absent", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, 7.0])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.3, "drop_path": 0.4, "rescale": True}])
def test_what_absent_tokens_hold_changes_neither_outputs_nor_gradients(
    options: dict, value: float, of_absent: bool
) -> None:
    expected = outcomes(with_absent(random_tokens(), 0.0), MASK, of_absent, **options)
    found = outcomes(with_absent(random_tokens(), value), MASK, of_absent, **options)
    for a, b in zip(found, expected, strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)
    assert (found[2][~MASK] == 0).all()  # the gradient of absent tokens


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3, "drop_path": 0.4}])
def test_with_all_tokens_present_a_mask_changes_no_bit(options: dict) -> None:
    plain = outcomes(random_tokens(), None, **options)
    masked = outcomes(random_tokens(), torch.ones_like(MASK), **options)
    plain[0] = plain[0].flatten(0, 1)
    assert all(torch.equal(a, b) for a, b in zip(masked, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_pooling_all_tokens_with_a_mask_changes_no_bit_in_any_type(dtype: torch.dtype) -> None:
    x = torch.randn(4, 49, 6, generator=torch.Generator().manual_seed(5)).to(dtype)
    pooled = mean_pool(x, torch.ones(4, 49, dtype=torch.bool))
    assert pooled.dtype == dtype
    assert torch.equal(pooled, mean_pool(x))
    assert torch.equal(mean_pool(x), x.mean(1))


def test_absent_tokens_are_zeros_to_token_mixing_and_are_left_out_of_the_mean() -> None:
    block, x = random_block().eval(), random_tokens()
    with torch.no_grad():
        normed = torch.where(MASK[..., None], block.norm1(x), 0.0)
        y = x + block.token_mixing(normed.mT).mT
        y = y + block.channel_mixing(block.norm2(y))
        assert close(block(x, mask=MASK)[MASK], y[MASK], 1e-12)
    means = torch.stack([row[present].mean(0) for row, present in zip(x, MASK, strict=True)])
    assert close(mean_pool(x, MASK), means, 1e-12)


def test_pooling_a_row_without_tokens_is_refused() -> None:
    mask = MASK.clone()
    mask[1] = False
    with pytest.raises(UserError, match=r"mask: row 1 has no token present \(at least 1 .*\): leave this sample out"):
        mean_pool(random_tokens(), mask)


@pytest.mark.parametrize("mask", [MASK.float(), MASK[:, :4], MASK[0], MASK[..., None], MASK.long()])
def test_masks_of_another_shape_or_type_are_refused(mask: Tensor) -> None:
    for call in (lambda: random_block()(random_tokens(), mask=mask), lambda: mean_pool(random_tokens(), mask)):
        with pytest.raises(UserError, match=r"^mask of shape \(.*\) and type .*: use shape \(3, 5\) and type torch"):
            call()
