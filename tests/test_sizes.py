"""Checks of a Mixer's arguments and of its inputs."""

import math
import re

import numpy as np
import pytest
import torch
from reference import small

from allmlp.errors import UserError


@pytest.mark.parametrize(
    ("image", "patch", "suggested"),
    [((29, 21), (4, 8), (28, 24)), ((12, 13), (4, 4), (12, 12)), ((3, 8), (8, 8), (8, 8)), (225, 16, (224, 224))],
)
def test_image_size_that_is_not_a_multiple_names_both_sizes_and_one_that_fits(image, patch, suggested) -> None:
    (h, w), (ph, pw) = ((s, s) if isinstance(s, int) else s for s in (image, patch))
    message = f"image size {h}×{w} is not a multiple of the patch size {ph}×{pw}: use {suggested[0]}×{suggested[1]}, or"
    with pytest.raises(UserError, match=re.escape(message)):
        small(image_size=image, patch_size=patch)
    assert small(image_size=suggested, patch_size=patch).image_size == suggested


@pytest.mark.parametrize("shape", [(2, 3, 12, 16), (2, 3, 16, 12), (2, 1, 12, 12), (3, 12, 12), (2, 1, 3, 12, 12)])
@pytest.mark.parametrize("method", ["forward", "features", "tokens"])
def test_images_of_another_shape_are_refused_with_the_models_shape(shape: tuple[int, ...], method: str) -> None:
    message = f"images of shape {shape}: this model takes (batch, 3, 12, 12); resize the images"
    with pytest.raises(UserError, match=re.escape(message)):
        getattr(small(), method)(torch.zeros(shape))


@pytest.mark.parametrize("name", ["dropout", "stochastic_depth"])
@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, math.nan])
def test_rates_outside_of_zero_to_one_are_refused(name: str, rate: float) -> None:
    with pytest.raises(UserError, match=f"{name} = {rate}: must be a probability, at least 0 and below 1"):
        small(**{name: rate})


@pytest.mark.parametrize("name", ["patch_size", "image_size"])
@pytest.mark.parametrize("value", [0, -4])
def test_sizes_in_pixels_below_one_are_refused(name: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"^{name} = \({value}, {value}\): must be at least 1 pixel$"):
        small(**{name: value})


def test_one_side_below_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"^image_size = \(12, 0\): must be at least 1 pixel$"):
        small(image_size=(12, 0))


COUNTS = ["num_blocks", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim", "in_channels"]


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [(name, value, 1) for name in COUNTS for value in (0, -4, 2.0, "3")]
    + [("num_classes", value, 0) for value in (-1, 2.0, "3")],
)
def test_counts_that_are_not_whole_or_too_small_are_refused(name: str, value: object, least: int) -> None:
    with pytest.raises(
        UserError, match=rf"^{name} = {re.escape(repr(value))}: must be a whole number, at least {least}$"
    ):
        small(**{name: value})


@pytest.mark.parametrize("name", ["image_size", "patch_size"])
@pytest.mark.parametrize("size", [64.0, (64, 32, 9), (64,), "64", None, (64, 32.0), np.float64(64)])
def test_sizes_of_another_type_are_refused(name: str, size: object) -> None:
    message = f"size {size!r}: give a whole number of pixels, or two, (height, width)"
    with pytest.raises(UserError, match=re.escape(message)):
        small(**{name: size})


def test_numpy_integers_are_sizes_too_and_are_stored_as_python_integers() -> None:
    model = small(image_size=np.int64(64), patch_size=(np.int32(4), np.int64(8)))
    assert model.config["image_size"] == model.image_size == (64, 64)
    assert model.patch_size == (4, 8)
    assert {type(side) for key in ("image_size", "patch_size") for side in model.config[key]} == {int}


def test_an_unknown_gelu_is_refused_with_both_forms() -> None:
    with pytest.raises(UserError, match=r"gelu = 'relu': must be 'tanh' .* or 'erf'"):
        small(gelu="relu")


def test_user_errors_are_value_errors_of_one_line() -> None:
    with pytest.raises(ValueError, match="multiple") as caught:
        small(image_size=13)
    assert "\n" not in str(caught.value)
