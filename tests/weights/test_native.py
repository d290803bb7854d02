"""The native format: bit-exact round trips, and errors for damaged files and files of others."""

import errno
import json
import os
import random
import re
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import allmlp.model
import allmlp.weights.native as native
from allmlp.errors import RunError, UserError
from allmlp.metadata import Metadata, Preprocessing
from allmlp.model import Mixer
from allmlp.weights.load import load
from allmlp.weights.native import save


def make(seed: int = 0, **options) -> Mixer:
    """A small Mixer whose every parameter is random."""
    sizes = {"num_classes": 3, "image_size": (8, 12), "patch_size": 4, "num_blocks": 2, "hidden_dim": 8}
    model = Mixer(**sizes | {"tokens_mlp_dim": 5, "channels_mlp_dim": 6, "seed": seed} | options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "saved.safetensors"
    save(make(), path, classes=["a", "b", "c"])
    return path


def refused(path: Path, message: str) -> None:
    """Checks that loading raises a one-line UserError that names the file."""
    with pytest.raises(UserError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gelu": "erf", "dropout": 0.1, "stochastic_depth": 0.25, "rescale": True, "in_channels": 1},
        {"num_classes": 0},
        {"patch_size": (2, 3)},
    ],
)
def test_round_trip_is_bit_exact(tmp_path: Path, options: dict) -> None:
    model = make(**options)
    save(model, tmp_path / "m.safetensors")
    again = load(str(tmp_path / "m.safetensors"))
    assert again.config == model.config
    assert [(type(value), key) for key, value in again.config.items()] == [
        (type(v), k) for k, v in model.config.items()
    ]
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    images = torch.randn(2, model.config["in_channels"], 8, 12)
    assert torch.equal(again(images), model.eval()(images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_special_values_and_other_types_are_restored(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float64: torch.int64}[dtype]
    model = make().to(dtype)
    with torch.no_grad():
        model.head.bias.copy_(
            torch.tensor([torch.finfo(dtype).smallest_normal / 2, -0.0, torch.finfo(dtype).max], dtype=dtype)
        )
    save(model, tmp_path / "m.safetensors")
    before, after = model.state_dict(), load(tmp_path / "m.safetensors").state_dict()
    for name in before:
        assert after[name].dtype == dtype
        assert torch.equal(before[name].view(bits), after[name].view(bits))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_of_a_diverged_run_are_refused(tmp_path: Path, value: float) -> None:
    model = make()
    with torch.no_grad():
        model.blocks[1].norm2.bias[3] = value
    save(model, tmp_path / "m.safetensors")
    refused(
        tmp_path / "m.safetensors", r"blocks\.1\.norm2\.bias contains numbers that are not finite.*earlier checkpoint"
    )


def test_metadata_is_saved_with_the_weights(tmp_path: Path) -> None:
    preprocessing = Preprocessing(crop="resize", crop_ratio=0.75, interpolation="bicubic", mean=(0, 0.1, 0.2))
    model = make()
    model.metadata = Metadata(
        classes=("Äpfel", 'qu"ote', "猫 \n"), preprocessing=preprocessing, provenance={"a": [1, None], "ü": {"b": 0.1}}
    )
    save(model, tmp_path / "m.safetensors", steps=7)
    metadata = load(tmp_path / "m.safetensors").metadata
    assert metadata.classes == model.metadata.classes
    assert metadata.preprocessing == preprocessing
    assert metadata.provenance == {"a": [1, None], "ü": {"b": 0.1}, "steps": 7}
    assert model.metadata.provenance == {"a": [1, None], "ü": {"b": 0.1}}  # the model is not modified


def test_given_classes_replace_those_of_the_metadata(tmp_path: Path) -> None:
    model = make()
    model.metadata = Metadata(classes=("x", "y", "z"))
    save(model, tmp_path / "m.safetensors")
    assert load(tmp_path / "m.safetensors").metadata.classes == ("x", "y", "z")
    save(model, tmp_path / "m.safetensors", classes=["a", "b", "c"])
    assert load(tmp_path / "m.safetensors").metadata.classes == ("a", "b", "c")
    save(make(), tmp_path / "m.safetensors")
    assert load(tmp_path / "m.safetensors").metadata.classes is None


def test_a_loaded_model_is_in_evaluation_mode_and_can_be_trained(saved: Path) -> None:
    model = load(saved)
    assert not model.training
    assert all(p.requires_grad and p.is_leaf and p.device.type == "cpu" for p in model.parameters())
    before = saved.read_bytes()
    model(torch.randn(1, 3, 8, 12)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1).step()
    assert saved.read_bytes() == before
    save(model, saved)  # over the file that its tensors are mapped from
    assert all(torch.equal(a, b) for a, b in zip(load(saved).parameters(), model.parameters(), strict=True))


def test_loading_draws_no_weights_and_no_random_numbers(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_args, **_options) -> None:
        raise AssertionError("initial weights were drawn")

    monkeypatch.setattr(allmlp.model, "init_weights", never)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", never)
    model = load(saved)
    assert all(torch.equal(a, b) for a, b in zip(make_state(), model.state_dict().values(), strict=True))


def make_state() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = [p.shape for p in Mixer(**CONFIG).parameters()]
    return [torch.empty(shape).normal_(generator=generator) for shape in shapes]


CONFIG = make().config


# Damage


@pytest.mark.parametrize("part", ["header", "data"])
def test_a_flipped_byte_is_detected(saved: Path, part: str) -> None:
    sound = saved.read_bytes()
    start = 8 + int.from_bytes(sound[:8], "little")
    rng = random.Random(0)
    places = range(start) if part == "header" else range(start, len(sound))
    assert len(sound) - start == 4 * sum(p.numel() for p in make().parameters())
    for place in [places[0], places[-1], *rng.sample(places, 40)]:
        damaged = bytearray(sound)
        damaged[place] ^= 1 << rng.randrange(8)
        saved.write_bytes(damaged)
        with pytest.raises(UserError, match=re.escape(str(saved))):
            load(saved)
    saved.write_bytes(sound)
    load(saved)


@pytest.mark.parametrize("kept", [1, 7, 8, 9, 500, -1000, -1])
def test_a_truncated_file_is_detected(saved: Path, kept: int) -> None:
    saved.write_bytes(saved.read_bytes()[:kept])
    shorter_than_any_header = "(is not a weights file|is damaged, not a valid)"
    refused(saved, shorter_than_any_header if 0 < kept <= 8 else "is damaged, not a valid safetensors file")


def test_an_empty_file_is_detected(saved: Path) -> None:
    saved.write_bytes(b"")
    refused(saved, "is empty: copy or download it again")


def test_appended_bytes_are_detected(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes() + b"\0")
    refused(saved, "is damaged, not a valid safetensors file")


@pytest.mark.parametrize("data", [b"these are words, and not a few of them", b"\x89PNG\r\n\x1a\n" + bytes(100), b"{}"])
def test_another_kind_of_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    refused(
        tmp_path / "a.safetensors", r"is not a weights file: it begins with '.*', unlike safetensors, \.npz and torch's"
    )


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    refused(tmp_path, "is a folder, not a weights file: name the file in it")
    refused(tmp_path / "none.safetensors", r"does not exist: give a weights file \(\.safetensors.*or hf-hub:OWNER")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_tensors_of_another_architecture(tmp_path: Path, metadata: dict | None) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "a.safetensors", metadata)
    refused(tmp_path / "a.safetensors", r"no token mixing of a Mixer \(its first names: w\): another architecture's")


def rewrite(path: Path, tensors: dict | None = None, **metadata: str) -> None:
    """Changes tensors or header of the file and keeps the old SHA-256."""
    with safe_open(path, "pt") as file:
        old, kept = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    save_file(kept | (tensors or {}), path, old | metadata)


def test_a_newer_format_version_asks_to_update(saved: Path) -> None:
    rewrite(saved, version="2")
    refused(saved, "has format version 2, this version reads 1: update allmlp")


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": {"head.bias": torch.ones(3)}},
        {"tensors": {"head.bias": torch.zeros(1, 3)}},
        {"tensors": {"more": torch.zeros(1)}},
        {"metadata": json.dumps({"classes": ["x", "y", "z"]})},
        {"config": "{}"},
    ],
)
def test_a_change_after_saving_is_detected(saved: Path, change: dict) -> None:
    rewrite(saved, **change)
    refused(saved, "was changed or damaged since it was saved")


# Errors of save


@pytest.mark.parametrize("classes", [["a", "b"], ["a", "b", "c", "d"], []])
def test_a_wrong_number_of_classes(tmp_path: Path, classes: list[str]) -> None:
    with pytest.raises(UserError, match=f"{len(classes)} class names for a head of 3: give one for each"):
        save(make(), tmp_path / "m.safetensors", classes=classes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["m.npz", "m", "m.safetensors.bak", "safetensors"])
def test_a_wrong_file_ending(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        UserError, match=rf"{name}: weights are saved as \.safetensors: give a file name with that ending"
    ):
        save(make(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no/where is not a folder: create it first"):
        save(make(), tmp_path / "no" / "where" / "m.safetensors")


def test_a_failed_write_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def fill_disk(tensors: dict, path: Path, metadata: dict) -> None:
        Path(path).write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(native, "save_file", fill_disk)
    with pytest.raises(OSError, match="No space left"):
        save(make(seed=1), saved)
    with pytest.raises(OSError, match="No space left"):
        save(make(seed=1), saved.with_name("new.safetensors"))
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_full_disk_is_a_run_error(saved: Path) -> None:
    before = saved.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # fails like a full disk
    try:
        with pytest.raises(RunError, match=r"saved\.safetensors cannot be written \(.*\): free some space"):
            save(make(seed=1), saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_an_existing_file_is_replaced(saved: Path) -> None:
    model = make(seed=1)
    save(model, saved)
    assert all(torch.equal(a, b) for a, b in zip(load(saved).parameters(), model.parameters(), strict=True))
    assert list(saved.parent.iterdir()) == [saved]
