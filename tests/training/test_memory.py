"""Recomputed activations give the same gradients from less memory; freed memory is kept."""

import platform
import subprocess
import sys

import pytest
import torch
from tiny_models import NOISY, tiny, tiny_images
from torch import Tensor

from allmlp.model import Mixer
from allmlp.rng import sample_keys
from allmlp.training.memory import recompute_blocks


def make(recompute: bool, **options) -> Mixer:
    model = tiny(num_blocks=3, **options).train()
    if recompute:
        recompute_blocks(model)
    return model


def gradients(model: Mixer, seed: int = 3) -> list[Tensor]:
    logits = model(tiny_images(), sample_keys(seed, torch.arange(5)))
    torch.manual_seed(9)  # the state of torch's generator in the backward pass does not matter
    logits.logsumexp(1).sum().backward()
    return [logits.detach()] + [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("options", [{}, NOISY, NOISY | {"rescale": True}], ids=str)
def test_gradients_are_the_same_bit_for_bit(options: dict, frozen: bool) -> None:
    models = [make(recompute, **options) for recompute in (False, True, True)]
    for model in models if frozen else []:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    kept, recomputed, other = (gradients(model, seed) for model, seed in zip(models, (3, 3, 4), strict=True))
    assert len(kept) == 1 + (2 if frozen else len(list(models[0].parameters())))
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))
    assert torch.equal(kept[0], other[0]) == (not options)
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(*(model.eval()(tiny_images()) for model in models[:2]))


def test_less_is_kept_for_the_backward_pass() -> None:
    def kept(recompute: bool) -> int:
        model, seen = make(recompute, **NOISY), {}

        def keep(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(tiny_images(), sample_keys(0, torch.arange(5))).sum()
        assert loss.requires_grad
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        return sum(t.untyped_storage().nbytes() for place, t in seen.items() if place not in own)

    assert kept(True) < kept(False) / 4


PROGRAM = """
import resource
import numpy as np
from allmlp.training.memory import keep_freed_memory
if {keep}:
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        np.empty(64 << 20, np.uint8).fill(1)  # above the 32 MB that glibc returns at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this setting")
def test_freed_memory_is_kept_and_costs_no_page_faults() -> None:
    def faults(keep: bool) -> int:
        program = PROGRAM.format(keep=keep)
        return int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout)

    assert faults(keep=True) < 100 < faults(keep=False)
