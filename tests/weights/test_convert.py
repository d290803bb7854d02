"""Saving in each format: bit for bit, atomic, and with a warning for what it cannot store; the native metadata."""

import copy
import json
import resource
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import current
from layouts import timm as timm_layout
from random_models import assert_same_bits, cases, make, refused, warnings_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import allmlp.model
from allmlp.errors import RunError, UserError
from allmlp.metadata import Metadata, Preprocessing
from allmlp.weights.convert import ENDINGS, Format, save_as
from allmlp.weights.load import load
from allmlp.weights.native import save

FORMATS: tuple[Format, ...] = ("native", "npz", "timm")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
VIEW = Preprocessing(crop="resize", crop_ratio=0.7, interpolation="nearest", mean=(0.1, 0.2, 0.3), std=(1, 2, 3.5))
METADATA = Metadata(
    classes=("Äpfel", 'qu"ote', "猫 \n"), preprocessing=VIEW, provenance={"a": [1, None], "ü": {"b": 1}}
)


def target(folder: Path, to: Format) -> Path:
    return folder / f"m{ENDINGS[to]}"


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    return {name: tensor.view(torch.uint8).numpy() for name, tensor in load_file(path).items()}


@cases(60)
@given(st.sampled_from(FORMATS), st.sampled_from(DTYPES), st.sampled_from(["tanh", "erf"]), st.data())
def test_a_round_trip_restores_everything(to: Format, dtype: torch.dtype, gelu: str, data: st.DataObject) -> None:
    """Weights bit for bit; in safetensors also config and metadata. Saving again writes the same."""
    options: dict[str, Any] = {"patch_size": data.draw(st.sampled_from([4, (2, 3), (4, 2)])), "gelu": gelu}
    options["image_size"] = data.draw(st.sampled_from([12, (8, 12), (12, 24)]))
    options["num_classes"], options["in_channels"] = data.draw(st.sampled_from([0, 1, 3])), data.draw(st.integers(1, 4))
    options |= data.draw(
        st.sampled_from([{}, {"norm_eps": 1e-5, "dropout": 0.1, "stochastic_depth": 0.2, "rescale": True}])
    )
    model = make(dtype=dtype, **options).train()
    with torch.no_grad():  # values that arithmetic would change: −0, and a subnormal number
        model.stem.bias[:2] = torch.tensor([-0.0, torch.finfo(dtype).smallest_normal / 2], dtype=dtype)
    model.stem.requires_grad_(False)
    model.metadata = METADATA if options["num_classes"] == 3 else Metadata()
    before, state = copy.deepcopy(model.metadata), copy.deepcopy(model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        path, second = target(Path(folder), to), Path(folder) / f"second{ENDINGS[to]}"
        path.write_bytes(b"something else")
        save_as(model, str(path), to)
        assert list(Path(folder).iterdir()) == [path]
        assert path.stat().st_size < sum(t.numel() * t.itemsize for t in state.values()) + 20_000
        again = load(path, image_size=model.image_size)
        if to == "npz":  # 16 bits become float32
            sizes = (
                "num_classes",
                "image_size",
                "patch_size",
                "num_blocks",
                "hidden_dim",
                "tokens_mlp_dim",
                "in_channels",
            )
            assert {key: again.config[key] for key in sizes} == {key: model.config[key] for key in sizes}
            for name, tensor in state.items():
                expected = tensor if dtype in DTYPES[:2] else tensor.float()
                assert torch.equal(again.state_dict()[name].view(torch.uint8), expected.view(torch.uint8)), name
        else:
            assert (again.config, again.metadata) == (model.config, model.metadata)
            assert all(type(value) is type(model.config[key]) for key, value in again.config.items())
            assert_same_bits(again, model)
            images = torch.randn(2, model.config["in_channels"], *model.image_size).to(dtype)
            assert torch.equal(again(images), model.eval()(images))
            model.train()
        if to != "npz" or dtype in DTYPES[:2]:
            save_as(again, second, to)
            ours, theirs = arrays_of(path), arrays_of(second)
            assert ours.keys() == theirs.keys()
            assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    assert (model.metadata, model.training, model.stem.weight.requires_grad) == (before, True, False)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("options", [{}, {"num_classes": 0}, {"num_blocks": 11}, {"patch_size": (2, 3)}], ids=str)
def test_names_and_axes_are_those_of_the_authors_and_of_timm(tmp_path: Path, options: dict) -> None:
    model = make(**options)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    save_as(model, tmp_path / "m.npz", "npz")
    save_as(model, tmp_path / "m.safetensors", "timm")
    with np.load(tmp_path / "m.npz", allow_pickle=False) as arrays:
        found = dict(arrays)
    with zipfile.ZipFile(tmp_path / "m.npz") as archive:
        assert len(archive.namelist()) == len(weights)  # nothing but these arrays
    named = {name: tensor.numpy() for name, tensor in load_file(tmp_path / "m.safetensors").items()}
    for ours, theirs in ((found, current(weights)), (named, timm_layout(weights))):
        assert ours.keys() == theirs.keys()
        for name, array in theirs.items():
            assert ours[name].dtype == np.float32
            assert ours[name].flags.c_contiguous
            assert np.array_equal(ours[name], array), name
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"  # required by other readers


@pytest.mark.parametrize("classes", [3, 0])
def test_timm_loads_the_weights_and_computes_the_same(tmp_path: Path, classes: int) -> None:
    timm = pytest.importorskip("timm.models.mlp_mixer")
    model = make(gelu="erf", num_classes=classes)
    save_as(model, tmp_path / "m.safetensors", "timm")
    sizes = {"img_size": 12, "patch_size": 4, "num_blocks": 2, "embed_dim": 8, "mlp_ratio": (5 / 8, 6 / 8)}
    theirs = timm.MlpMixer(num_classes=classes, **sizes).eval()
    theirs.load_state_dict(load_file(tmp_path / "m.safetensors"), strict=True)
    images = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images) if classes else model.features(images)
        assert float((theirs(images) - expected).abs().max() / expected.abs().max()) <= 1e-5
    assert expected.std() > 0.1


# Warnings

LOSSES: list[tuple[Format, dict, Metadata, list[list[str]]]] = [  # the words for each loss
    ("npz", {}, Metadata(), []),
    ("timm", {"gelu": "erf"}, Metadata(classes=("a", "b", "c"), preprocessing=VIEW), []),  # which it stores
    ("native", {"norm_eps": 1e-4, "gelu": "erf", "image_size": (8, 12)}, METADATA, []),
    ("npz", {"gelu": "erf"}, Metadata(), [["erf GELU", "tanh", "approximate=False"]]),
    ("timm", {"gelu": "tanh"}, Metadata(), [["tanh GELU", "erf", "act_layer=timm.layers.GELUTanh"]]),
    ("timm", {"norm_eps": 1e-5, "gelu": "erf"}, Metadata(), [["ε of 1e-05", "1e-06"]]),
    ("npz", {"image_size": (8, 12)}, Metadata(), [["grid", "image_size=(8, 12)"]]),
    ("npz", {}, Metadata(classes=("a", "b", "c")), [["class names"]]),
    ("npz", {}, Metadata(preprocessing=Preprocessing(mean=(0.1, 0.2, 0.3))), [["normalization", "(0.1, 0.2, 0.3)"]]),
    ("npz", {}, Metadata(preprocessing=Preprocessing(std=(0.2, 0.2, 0.2))), [["normalization", "(0.2, 0.2, 0.2)"]]),
    ("npz", {}, Metadata(preprocessing=Preprocessing(crop="resize")), [["evaluation crop", "resize"]]),
    ("npz", {"gelu": "erf", "norm_eps": 1e-4, "image_size": (12, 8)}, METADATA,
     [["erf GELU"], ["ε of 0.0001"], ["grid"], ["class names"], ["normalization"], ["crop", "0.7", "nearest"]]),
]  # fmt: skip


@pytest.mark.parametrize(("to", "options", "metadata", "losses"), LOSSES)
def test_what_is_lost_is_said_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, to: Format, options: dict, metadata: Metadata, losses: list
) -> None:
    model, path = make(**options), target(tmp_path, to)
    model.metadata = metadata
    save_as(model, path, to)
    said = warnings_of(caplog)
    assert len(said) == bool(losses)
    for part, words in zip("".join(said).split("; ") if losses else [], losses, strict=True):
        assert all(word in part for word in words), part
    if losses:
        assert said[0].isprintable()
        assert str(path) in said[0]
    if "image_size" in options and to == "npz":
        refused(path, "6 patches", "image_size=")
        assert_same_bits(load(path, image_size=options["image_size"]), model)


# The native format


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
    save(model, str(path), steps=7, a="new")
    added = {**before.provenance, "steps": 7, "a": "new"}
    assert load(path).metadata == Metadata(classes=before.classes, provenance=added)
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
        old = file.metadata()
    kept = {name: tensor.clone() for name, tensor in load_file(path).items()}
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


def test_a_key_beside_those_of_a_file_in_timms_layout_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_as(make(), path, "timm")
    rewrite(path, more="x")
    refused(path, "changed or damaged")


def test_a_newer_version_asks_to_update(saved: Path) -> None:
    rewrite(saved, version="2")
    refused(saved, "version 2", "update allmlp")


# Errors


@pytest.mark.parametrize("classes", [["a", "b"], ["a", "b", "c", "d"], [], "abc", [1, 2, 3]], ids=str)
def test_wrong_classes(tmp_path: Path, classes: Any) -> None:
    strings = not isinstance(classes, str) and all(isinstance(name, str) for name in classes)
    with pytest.raises(UserError, match=f"{len(classes)} class names.*head of 3" if strings else "list of strings"):
        save(make(), tmp_path / "m.safetensors", classes=classes)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"m\.npz: .*\.safetensors"):
        save(make(), tmp_path / "m.npz")
    for to in FORMATS:
        for name in ("m.pt", "m", "m.npz.bak", "safetensors", "m.npz" if to != "npz" else "m.safetensors"):
            with pytest.raises(UserError, match=rf"{name}: .*\{ENDINGS[to]}"):
                save_as(make(), tmp_path / name, to)
        with pytest.raises(UserError, match="no/where is not a folder: create it"):
            save_as(make(), target(tmp_path / "no" / "where", to), to)
        target(tmp_path, to).mkdir(exist_ok=True)
        with pytest.raises((UserError, RunError), match=r"m\.(npz|safetensors)"):
            save_as(make(), target(tmp_path, to), to)
    assert {path.name for path in tmp_path.iterdir()} == {"m.npz", "m.safetensors"}
    assert not any(any(path.iterdir()) for path in tmp_path.iterdir())


def interrupt(*_args: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("to", FORMATS)
def test_a_full_disk_or_an_interrupt_leaves_the_old_file(
    tmp_path: Path, to: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, (soft, hard) = target(tmp_path, to), resource.getrlimit(resource.RLIMIT_FSIZE)
    for before in (None, b"old"):
        if before:
            path.write_bytes(before)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # fails like a full disk
        try:
            with pytest.raises(
                RunError,
                match=r"m\.(npz|safetensors) cannot be written .File too large.: raise",
            ):
                save_as(make(), path, to)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", interrupt)
            with pytest.raises(KeyboardInterrupt):
                save_as(make(), path, to)
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == ({path: before} if before else {})
