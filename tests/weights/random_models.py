"""Small Mixers with random weights, and what a refusal of a weights file must look like."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from layouts import random_weights, timm
from torch import Tensor

from allmlp.errors import UserError
from allmlp.model import Mixer
from allmlp.weights.load import load


def cases(number: int) -> settings:
    """Settings of a property-based test: the same cases each time, however slow the machine."""
    return settings(max_examples=number, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def make(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Mixer:
    """A small Mixer in evaluation mode whose every parameter is random."""
    sizes = {"num_classes": 3, "image_size": 12, "patch_size": 4, "num_blocks": 2, "hidden_dim": 8}
    model = Mixer(**sizes | {"tokens_mlp_dim": 5, "channels_mlp_dim": 6} | options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model.to(dtype).eval()


def timm_state(seed: int = 0, **sizes: Any) -> dict[str, Tensor]:
    """Random float32 weights in timm's names."""
    return {k: torch.tensor(v, dtype=torch.float32) for k, v in timm(random_weights(seed, **sizes)).items()}


def assert_same_bits(found: Mixer, expected: Mixer) -> None:
    before, after = expected.state_dict(), found.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name


def refused(path: Path | str, *words: str, error: type[Exception] = UserError, **given: Any) -> str:
    """Checks that loading raises one printable line that names the file and these words; returns it."""
    with pytest.raises(error) as caught:
        load(path, **given)
    said = str(caught.value)
    assert said.isprintable(), repr(said)
    assert str(path).partition("\n")[0] in said
    for word in words:
        assert word in said.replace(str(path), ""), said
    return said


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
