"""The cost of a Mixer, compared with the formulas and with a real forward pass."""

import pytest
import torch
from torch import Tensor

from allmlp.factory import build_meta
from allmlp.flops import Cost, cost
from allmlp.model import Mixer
from allmlp.variants import VARIANTS

TINY = {
    "num_classes": 5,
    "image_size": (8, 12),
    "patch_size": 4,
    "num_blocks": 2,
    "hidden_dim": 16,
    "tokens_mlp_dim": 10,
    "channels_mlp_dim": 24,
}


def config(name: str, image_size: int = 224, num_classes: int = 1000) -> dict:
    return VARIANTS[name] | {"image_size": image_size, "num_classes": num_classes}


def cost_of(settings: dict) -> Cost:
    return cost(build_meta(settings))


def macs(c: dict) -> int:
    """The formula: stem, both MLPs of every block, and head."""
    height, width = (c["image_size"],) * 2 if isinstance(c["image_size"], int) else c["image_size"]
    patch, channels = c["patch_size"], c["hidden_dim"]
    tokens = height // patch * (width // patch)
    stem = tokens * channels * 3 * patch**2
    block = 2 * tokens * channels * (c["tokens_mlp_dim"] + c["channels_mlp_dim"])
    return stem + c["num_blocks"] * block + channels * c["num_classes"]


@pytest.mark.parametrize("settings", [config("B/16"), config("B/32", 448), config("S/16", num_classes=0), TINY])
def test_macs_equal_the_formula(settings: dict) -> None:
    found = cost_of(settings)
    assert found.macs == macs(settings)
    assert found.flops == 2 * found.macs


def test_parameters_equal_the_models() -> None:
    assert cost_of(TINY).parameters == sum(p.numel() for p in Mixer(**TINY, seed=0).parameters())


def saved_bytes(settings: dict) -> int:
    """What autograd keeps in a real forward pass of one image, each storage once, without parameters."""
    model = Mixer(**settings, seed=0)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.zeros(1, model.config["in_channels"], *model.image_size))
    assert output.grad_fn is not None
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for pointer, size in sizes.items() if pointer not in parameters)


@pytest.mark.parametrize("options", [{}, {"num_blocks": 1}, {"gelu": "erf"}, {"in_channels": 1}, {"num_classes": 0}])
def test_activation_bytes_equal_those_of_a_real_forward_pass(options: dict) -> None:
    assert cost_of(TINY | options).activation_bytes == saved_bytes(TINY | options)


def test_nothing_is_computed_and_no_random_number_is_drawn_for_h14() -> None:
    found = cost_of(config("H/14"))
    assert found.parameters == 432_350_952
    assert found.macs == macs(config("H/14"))
    assert torch.empty(0).device.type == "cpu"
