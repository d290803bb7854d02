"""The methods that users of timm call: they compute what timm's do, and change a model in place."""

from typing import Any

import pytest
import torch
from reference import randomise
from test_timm_parity import relative, timm_name

import allmlp
from allmlp.errors import UserError
from allmlp.metadata import Metadata
from allmlp.model import Mixer

IMAGES = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))  # a grid of 2 × 3 patches
SIZES: dict[str, Any] = {"num_blocks": 3, "hidden_dim": 8, "tokens_mlp_dim": 4, "channels_mlp_dim": 32}


@pytest.fixture
def model() -> Mixer:
    model = Mixer(num_classes=5, image_size=(8, 12), patch_size=4, gelu="erf", **SIZES).eval()
    randomise(model, 0)
    model.metadata = Metadata(classes=tuple("abcde"), provenance={"val_top1": 0.9, "recipe": "digits"})
    return model


@pytest.fixture
def peer(model: Mixer) -> torch.nn.Module:
    """timm's model with the same weights."""
    mlp_mixer = pytest.importorskip("timm.models.mlp_mixer")
    peer = mlp_mixer.MlpMixer(num_classes=5, img_size=(8, 12), patch_size=4, num_blocks=3, embed_dim=8)
    peer.load_state_dict({timm_name(k): v for k, v in model.state_dict().items()})
    return peer.eval()


def assert_same_weights(model: Mixer, expected: Mixer) -> None:
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_features_and_head(model: Mixer, peer: torch.nn.Module) -> None:
    assert model.num_features == peer.num_features == 8
    tokens = model.forward_features(IMAGES)
    assert relative(tokens, peer.forward_features(IMAGES)) < 1e-5
    assert torch.equal(model.forward_head(tokens), model(IMAGES))
    assert torch.equal(model.forward_head(tokens, pre_logits=True), model.features(IMAGES))
    assert model.get_classifier() is model.head


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indices": 2},
        {"indices": [0, -1], "norm": True},
        {"indices": [1], "stop_early": True, "output_fmt": "NLC"},
    ],
)
def test_intermediates(model: Mixer, peer: torch.nn.Module, options: dict[str, Any]) -> None:
    tokens, found = model.forward_intermediates(IMAGES, **options)
    expected_tokens, expected = peer.forward_intermediates(IMAGES, **options)
    assert len(found) == len(expected) > 0
    for ours, theirs in zip([tokens, *found], [expected_tokens, *expected], strict=True):
        assert relative(ours, theirs) < 1e-5
    only = model.forward_intermediates(IMAGES, intermediates_only=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(only, found, strict=True))


@pytest.mark.parametrize("indices", [0, 4, [], [3], [-4], "all", 1.5])
def test_indices_out_of_range(model: Mixer, indices: Any) -> None:
    with pytest.raises(UserError, match=r"indices = .*3"):
        model.forward_intermediates(IMAGES, indices)
    with pytest.raises(UserError, match=r"'NHWC'.*'NCHW'"):
        model.forward_intermediates(IMAGES, output_fmt="NHWC")  # pyright: ignore[reportArgumentType]


def test_reset_classifier(model: Mixer, tmp_path: Any) -> None:
    features = model.features(IMAGES)
    model.double().requires_grad_(False).reset_classifier(7)
    assert model.metadata == Metadata(provenance={"recipe": "digits"})
    assert model.head.weight.shape == (7, 8)
    assert model(IMAGES).dtype == torch.float64
    assert not model(IMAGES).any(), "a new head is zero"
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    allmlp.save(model, tmp_path / "seven.safetensors")
    assert allmlp.load(tmp_path / "seven.safetensors").num_classes == 7
    model.float().reset_classifier(0)
    assert relative(model(IMAGES), features) < 1e-5
    with pytest.raises(UserError, match="num_classes = -1"):
        model.reset_classifier(-1)
    assert model.num_classes == 0


@pytest.mark.parametrize("size", [(16, 12), (12, 16), (8, 12)])
def test_set_input_size_does_in_place_what_resize_does(model: Mixer, size: tuple[int, int], tmp_path: Any) -> None:
    expected = allmlp.resize(model, size)
    stem = model.stem.weight
    model.blocks[0].token_mixing.requires_grad_(False)
    model.set_input_size(size)
    assert model.stem.weight is stem
    assert (model.config, model.grid, model.metadata) == (expected.config, expected.grid, expected.metadata)
    assert not model.blocks[0].token_mixing.dense_0.weight.requires_grad
    assert model.blocks[1].token_mixing.dense_0.weight.requires_grad
    assert_same_weights(model, expected)
    assert model(torch.zeros(2, 3, *size)).shape == (2, 5)
    assert str(model) == str(expected), "in_features and out_features follow"
    allmlp.save(model, tmp_path / "resized.safetensors")
    assert_same_weights(allmlp.load(tmp_path / "resized.safetensors"), expected)


def test_a_wrong_size_changes_nothing(model: Mixer) -> None:
    before = model(IMAGES)
    with pytest.raises(UserError, match=r"9×12.*8×12"):
        model.set_input_size((9, 12))
    assert torch.equal(model(IMAGES), before)
