"""Devices: float32 that is float32, failures in one line, and systems other than Linux."""

import pytest
import torch

import allmlp
from allmlp.device import device_errors, exact_float32
from allmlp.errors import RunError


def settings() -> tuple[str, str]:
    return torch.backends.cudnn.conv.fp32_precision, torch.get_float32_matmul_precision()  # pyright: ignore


def test_float32_is_not_tf32_within_the_outermost_block_only() -> None:
    before = settings()
    with exact_float32():
        with exact_float32():
            assert settings() == ("ieee", "highest")
        assert settings() == ("ieee", "highest")
    assert settings() == before


@pytest.mark.gpu
def test_the_stem_is_computed_in_float32() -> None:
    model = allmlp.create("S/16", num_classes=0).cuda()
    images = torch.randn(4, 3, 224, 224, device="cuda")
    with torch.no_grad(), exact_float32():
        found = model.stem(images)
        expected = model.double().stem(images.double())
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), ["4 images", "halve it"]),
        (MemoryError(), ["4 images", "halve it"]),
        (
            RuntimeError("CUDA error: an illegal memory access\nCompile with"),
            ["illegal", "--device cpu"],
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), ["CUDNN_STATUS_EXECUTION_FAILED", "--device cpu"]),
    ],
)
def test_failures_of_a_device_are_one_line(error: Exception, words: list[str]) -> None:
    with pytest.raises(RunError) as raised, device_errors("4 images", "halve it"):
        raise error
    assert all(word in str(raised.value) for word in words)
    assert "\n" not in str(raised.value)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes differ") as raised, device_errors("4 images", "halve it"):
        raise RuntimeError("shapes differ")
    assert not isinstance(raised.value, RunError)
