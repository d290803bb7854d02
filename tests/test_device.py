"""Devices: float32 that is float32, failures in one line, and systems other than Linux."""

import math
import os
from pathlib import Path

import pytest
import torch

import allmlp
from allmlp import device
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


# Cores


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "max 100000"}, math.inf),
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 1.5),  # of the group around it
        ("0::/a/b\n", {"cpu.max": "50000 100000"}, 0.5),  # in a container, the root is its own group
        ("4:cpu,cpuacct:/d\n", {"cpu/d/cpu.cfs_quota_us": "300000", "cpu/d/cpu.cfs_period_us": "100000"}, 3),
        ("4:cpu:/d\n", {"cpu/d/cpu.cfs_quota_us": "-1", "cpu/d/cpu.cfs_period_us": "100000"}, math.inf),
        ("0::/\n", {"cpu.max": "damaged"}, math.inf),
        ("nonsense\n", {"cpu.max": "200000 100000"}, math.inf),
        (None, {}, math.inf),
    ],
)
def test_the_quota_of_a_control_group(tmp_path: Path, membership: str | None, files: dict, cores: float) -> None:
    if membership is not None:
        (tmp_path / "self").write_text(membership)
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text + "\n")
    assert device.cpu_quota(tmp_path / "cgroup", tmp_path / "self") == cores


def test_cores_are_those_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5}, raising=False)
    for quota, cores in ((math.inf, 3), (2, 2), (1.5, 2), (0.2, 1), (8, 3)):
        monkeypatch.setattr(device, "cpu_quota", lambda *_, quota=quota: quota)
        assert device.available_cores() == cores
