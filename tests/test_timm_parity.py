"""With gelu="erf" and the same random weights, the model computes what timm's does."""

import gc

import pytest
import torch
from reference import randomise
from torch import Tensor

from allmlp.factory import create
from allmlp.model import Mixer

timm = pytest.importorskip("timm")

TOLERANCE = 1e-5  # relative, float32; the other form of GELU differs by about 1e-4


def timm_name(name: str) -> str:
    for ours, theirs in (
        ("stem.", "stem.proj."),
        ("token_mixing.dense_0", "mlp_tokens.fc1"),
        ("token_mixing.dense_1", "mlp_tokens.fc2"),
        ("channel_mixing.dense_0", "mlp_channels.fc1"),
        ("channel_mixing.dense_1", "mlp_channels.fc2"),
        ("pre_head_layer_norm", "norm"),
    ):
        name = name.replace(ours, theirs)
    return name


def random_float32(variant: str, **options) -> Mixer:
    with torch.device("meta"):  # no initial weights: they would be overwritten
        model = create(variant, **options)
    model.to_empty(device="cpu").eval()
    randomise(model, seed=11)
    return model


def timm_with_weights_of(model: Mixer, name: str) -> torch.nn.Module:
    with torch.device("meta"):
        peer = timm.create_model(name, pretrained=False)
    peer.load_state_dict({timm_name(k): v for k, v in model.state_dict().items()}, assign=True)  # memory is shared
    return peer.eval()


def tokens_and_logits(peer: torch.nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    seen = []
    peer.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits = peer(images)
    return seen[0], logits


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("variant", "name"), [("S/32", "mixer_s32_224"), ("B/16", "mixer_b16_224"), ("L/16", "mixer_l16_224")]
)
def test_agrees_with_timm(variant: str, name: str) -> None:
    gc.collect()  # L/16 holds 0.8 GB
    model = random_float32(variant, gelu="erf")
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(12))
    with torch.no_grad():
        expected_tokens, expected_logits = tokens_and_logits(timm_with_weights_of(model, name), images)
        tokens = model.tokens(images)
        assert relative(tokens, expected_tokens) <= TOLERANCE
        assert relative(model(images), expected_logits) <= TOLERANCE
    assert 0.1 < expected_tokens.std() < 100  # neither vanished nor blown up: the comparison means something
    assert (expected_logits[0] - expected_logits[1]).abs().max() > 0.01


def test_the_authors_gelu_differs_from_timms() -> None:
    model = random_float32("S/32", gelu="tanh")
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(12))
    with torch.no_grad():
        expected_tokens, expected_logits = tokens_and_logits(timm_with_weights_of(model, "mixer_s32_224"), images)
        assert relative(model.tokens(images), expected_tokens) > TOLERANCE
        assert relative(model(images), expected_logits) > TOLERANCE
