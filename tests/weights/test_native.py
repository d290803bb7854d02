"""The native format: what it holds besides the tensors, and errors for files that were changed.

Exact and atomic writing is tested for all formats in test_convert.py, damaged files in test_containers.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import assert_same_bits, make, refused
from safetensors import safe_open
from safetensors.torch import save_file

import allmlp.model
from allmlp.errors import UserError
from allmlp.metadata import Metadata
from allmlp.weights.load import load
from allmlp.weights.native import save


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "saved.safetensors"
    save(make(), path, classes=["a", "b", "c"])
    return path


def test_classes_and_provenance_are_added_to_the_metadata(tmp_path: Path) -> None:
    model, path = make(), tmp_path / "m.safetensors"
    save(model, path)
    assert load(path).metadata == Metadata()
    model.metadata = before = Metadata(classes=("x", "猫 \n", 'z"'), provenance={"a": [1, None], "ü": {"b": 0.1}})
    save(model, str(path), steps=7)
    assert load(path).metadata == Metadata(classes=before.classes, provenance={**before.provenance, "steps": 7})
    save(model, path, classes=["a", "b", "c"])
    assert load(path).metadata.classes == ("a", "b", "c")
    assert model.metadata == before == Metadata(classes=before.classes, provenance={"a": [1, None], "ü": {"b": 0.1}})


def test_a_loaded_model_can_be_trained_and_saved_over_its_file(saved: Path) -> None:
    model, before = load(saved), saved.read_bytes()
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad and p.is_leaf and p.device.type == "cpu" for p in model.parameters())
    model(torch.randn(1, 3, 12, 12)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1).step()
    assert saved.read_bytes() == before  # from which its tensors are mapped
    save(model, saved)
    assert_same_bits(load(saved), model)


def test_loading_draws_no_random_numbers(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_args: Any, **_options: Any) -> None:
        raise AssertionError("initial weights were drawn")

    monkeypatch.setattr(allmlp.model, "init_weights", never)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", never)
    before = torch.get_rng_state()
    load(saved)
    assert torch.equal(torch.get_rng_state(), before)


def rewrite(path: Path, tensors: dict | None = None, **metadata: str) -> None:
    """Changes tensors or header of the file and keeps the old SHA-256."""
    with safe_open(path, "pt") as file:
        old, kept = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    save_file(kept | (tensors or {}), path, old | metadata)


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": {"head.bias": torch.ones(3)}}, {"tensors": {"head.bias": torch.zeros(1, 3)}},
        {"tensors": {"more": torch.zeros(1)}}, {"metadata": json.dumps({"classes": ["x", "y", "z"]})}, {"config": "{}"},
    ],
    ids=str,
)  # fmt: skip
def test_a_change_after_saving_is_detected(saved: Path, change: dict) -> None:
    rewrite(saved)
    load(saved)
    rewrite(saved, **change)
    refused(saved, "changed or damaged", "SHA-256")


def test_a_newer_version_asks_to_update(saved: Path) -> None:
    rewrite(saved, version="2")
    refused(saved, "version 2", "update allmlp")


@pytest.mark.parametrize("classes", [["a", "b"], ["a", "b", "c", "d"], [], "abc", [1, 2, 3]], ids=str)
def test_wrong_classes(tmp_path: Path, classes: Any) -> None:
    strings = not isinstance(classes, str) and all(isinstance(name, str) for name in classes)
    with pytest.raises(UserError, match=f"{len(classes)} class names.*head of 3" if strings else "list of strings"):
        save(make(), tmp_path / "m.safetensors", classes=classes)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_ending_or_folder(tmp_path: Path) -> None:
    for name, word in (("m.npz", "safetensors"), ("m.safetensors.bak", "ending"), ("no/m.safetensors", "create it")):
        with pytest.raises(UserError, match=word):
            save(make(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []
