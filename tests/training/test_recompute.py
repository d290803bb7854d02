"""Recomputed activations: the same gradients from less memory."""

import pytest
import torch
from torch import Tensor

from allmlp.model import Mixer
from allmlp.rng import sample_keys
from allmlp.training.memory import recompute_blocks

SIZES = {"num_classes": 3, "image_size": 8, "patch_size": 2, "num_blocks": 3, "hidden_dim": 8}
NOISY = {"dropout": 0.3, "stochastic_depth": 0.6}


def make(recompute: bool, **options) -> Mixer:
    model = Mixer(**SIZES, tokens_mlp_dim=6, channels_mlp_dim=16, seed=0, **options).double().train()
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    if recompute:
        recompute_blocks(model)
    return model


def images() -> Tensor:
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def gradients(model: Mixer, seed: int = 3) -> list[Tensor]:
    logits = model(images(), sample_keys(seed, torch.arange(5)))
    torch.manual_seed(9)  # the state of torch's generator in the backward pass does not matter
    logits.logsumexp(1).sum().backward()
    return [logits.detach()] + [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("options", [{}, NOISY, NOISY | {"rescale": True}])
def test_gradients_are_the_same_bit_for_bit(options: dict) -> None:
    kept, recomputed = gradients(make(False, **options)), gradients(make(True, **options))
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))
    assert len(kept) == 1 + len(list(make(False).parameters()))
    if options:
        assert not torch.equal(kept[0], gradients(make(True, **options), seed=4)[0])


def test_with_a_frozen_body_the_head_has_the_same_gradient() -> None:
    def found(recompute: bool) -> list[Tensor]:
        model = make(recompute, **NOISY).requires_grad_(False)
        model.head.requires_grad_(True)
        return gradients(model)

    kept, recomputed = found(False), found(True)
    assert len(kept) == len(recomputed) == 3
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_less_is_kept_for_the_backward_pass() -> None:
    def kept(recompute: bool) -> int:
        model, seen = make(recompute, **NOISY), {}

        def keep(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(images(), sample_keys(0, torch.arange(5))).sum()
        assert loss.requires_grad
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        return sum(t.untyped_storage().nbytes() for place, t in seen.items() if place not in own)

    assert kept(True) < kept(False) / 4


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_gives_the_same(context: type) -> None:
    with context():
        assert torch.equal(make(True, **NOISY).eval()(images()), make(False).eval()(images()))


def test_the_parameters_keep_their_names() -> None:
    assert make(True).state_dict().keys() == make(False).state_dict().keys()
