"""Saving in other formats: bit for bit and atomic, with a warning for what a format cannot store."""

import copy
import json
import logging
import resource
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from allmlp.errors import RunError, UserError
from allmlp.metadata import Metadata, Preprocessing
from allmlp.model import Mixer
from allmlp.weights.convert import ENDINGS, Format, save_as
from allmlp.weights.load import load

FORMATS: tuple[Format, ...] = ("native", "npz", "timm")
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def make(seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> Mixer:
    """A small Mixer whose every parameter is random."""
    sizes = {"num_classes": 3, "image_size": 12, "patch_size": 4, "num_blocks": 2, "hidden_dim": 8}
    model = Mixer(**sizes | {"tokens_mlp_dim": 5, "channels_mlp_dim": 6} | options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model.to(dtype).eval()


def odd(model: Mixer) -> Mixer:
    """Sets values that arithmetic would change: −0 and a subnormal number."""
    with torch.no_grad():
        model.head.bias[:2] = torch.tensor([-0.0, 1e-40 if model.head.bias.dtype == torch.float32 else 0.1])
    return model


def target(folder: Path, to: Format) -> Path:
    return folder / f"m{ENDINGS[to]}"


def assert_same_bits(found: Mixer, expected: Mixer) -> None:
    before, after = expected.state_dict(), found.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name].view(BITS[tensor.dtype]), tensor.view(BITS[tensor.dtype])), name


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# Round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_classes": 0}, {"patch_size": (2, 3)}, {"in_channels": 1}], ids=str)
@pytest.mark.parametrize("to", FORMATS)
def test_every_tensor_comes_back_bit_for_bit(tmp_path: Path, to: Format, options: dict, dtype: torch.dtype) -> None:
    model = make(dtype=dtype, **options)
    if "num_classes" not in options:
        odd(model)
    path = target(tmp_path, to)
    save_as(model, path, to)
    again = load(path, image_size=12)
    assert_same_bits(again, model)
    sizes = ("num_classes", "image_size", "patch_size", "num_blocks", "hidden_dim", "tokens_mlp_dim", "in_channels")
    assert {key: again.config[key] for key in sizes} == {key: model.config[key] for key in sizes}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("to", FORMATS)
def test_a_second_round_trip_writes_the_same_bytes(tmp_path: Path, to: Format) -> None:
    first, second = target(tmp_path, to), tmp_path / f"again{ENDINGS[to]}"
    save_as(make(gelu="erf" if to == "timm" else "tanh"), first, to)
    save_as(load(first), second, to)
    if to == "npz":  # a zip stores the time
        with np.load(first) as a, np.load(second) as b:
            assert a.files == b.files
            assert all(a[name].tobytes() == b[name].tobytes() for name in a.files)
    else:
        assert load_file(first).keys() == load_file(second).keys()
        assert all(torch.equal(tensor, load_file(second)[name]) for name, tensor in load_file(first).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("to", FORMATS)
def test_16_bit_weights_stay_16_bit_and_keep_their_values(tmp_path: Path, to: Format, dtype: torch.dtype) -> None:
    model, path = make(dtype=dtype), target(tmp_path, to)
    save_as(model, path, to)
    assert path.stat().st_size < 2 * sum(p.numel() for p in model.parameters()) + 20_000
    if to == "npz":
        with np.load(path, allow_pickle=False) as arrays:
            assert {array.dtype.str for array in arrays.values()} == {"|V2" if dtype == torch.bfloat16 else "<f2"}
    else:
        assert {tensor.dtype for tensor in load_file(path).values()} == {dtype}
    again = load(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name].float(), tensor.float()), name
    if to != "npz":  # weights from an .npz become float32
        assert_same_bits(again, model)


def test_native_is_what_save_writes(tmp_path: Path) -> None:
    model = make()
    model.metadata = Metadata(classes=("a", "b", "c"), provenance={"seed": 1})
    save_as(model, tmp_path / "a.safetensors", "native")
    from allmlp.weights.native import save

    save(model, tmp_path / "b.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as a, safe_open(tmp_path / "b.safetensors", "pt") as b:
        assert a.metadata() == b.metadata()
    assert asdict(load(tmp_path / "a.safetensors").metadata) == asdict(model.metadata)
    assert_same_bits(load(tmp_path / "a.safetensors"), model)


@pytest.mark.parametrize("to", FORMATS)
def test_the_model_is_not_modified(tmp_path: Path, to: Format) -> None:
    model = make().train()
    model.stem.requires_grad_(False)
    model.metadata = Metadata(classes=("a", "b", "c"), provenance={"a": {"b": 1}})
    before, metadata = copy.deepcopy(model.state_dict()), copy.deepcopy(model.metadata)
    save_as(model, target(tmp_path, to), to)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert (model.metadata, model.training, model.stem.weight.requires_grad) == (metadata, True, False)


# The authors'


def authors_arrays(model: Mixer) -> dict[str, np.ndarray]:
    """Written out: the names and axes of Supplement E's flax code."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    arrays = {"stem/kernel": state["stem.weight"].transpose(2, 3, 1, 0), "stem/bias": state["stem.bias"]}
    for i in range(model.config["num_blocks"]):
        for j in (0, 1):
            arrays[f"MixerBlock_{i}/LayerNorm_{j}/scale"] = state[f"blocks.{i}.norm{j + 1}.weight"]
            arrays[f"MixerBlock_{i}/LayerNorm_{j}/bias"] = state[f"blocks.{i}.norm{j + 1}.bias"]
            for mixing in ("token_mixing", "channel_mixing"):
                ours, theirs = f"blocks.{i}.{mixing}.dense_{j}", f"MixerBlock_{i}/{mixing}/Dense_{j}"
                arrays[f"{theirs}/kernel"], arrays[f"{theirs}/bias"] = state[f"{ours}.weight"].T, state[f"{ours}.bias"]
    arrays["pre_head_layer_norm/scale"] = state["pre_head_layer_norm.weight"]
    arrays["pre_head_layer_norm/bias"] = state["pre_head_layer_norm.bias"]
    if model.config["num_classes"]:
        arrays["head/kernel"], arrays["head/bias"] = state["head.weight"].T, state["head.bias"]
    return arrays


@pytest.mark.parametrize("options", [{}, {"num_classes": 0}, {"num_blocks": 11}, {"patch_size": (2, 3)}], ids=str)
def test_npz_has_the_authors_names_and_axes(tmp_path: Path, options: dict) -> None:
    model = make(**options)
    save_as(model, tmp_path / "m.npz", "npz")
    expected = authors_arrays(model)
    with np.load(tmp_path / "m.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == set(expected)
        for name, array in expected.items():
            assert arrays[name].dtype == np.float32
            assert arrays[name].flags.c_contiguous
            assert np.array_equal(arrays[name], array), name


def test_npz_contains_only_arrays(tmp_path: Path) -> None:
    """NumPy stores unknown keyword arguments as arrays, so an option must not become one."""
    save_as(make(), tmp_path / "m.npz", "npz")
    with zipfile.ZipFile(tmp_path / "m.npz") as archive:
        assert len(archive.namelist()) == len(make().state_dict())
        assert all(name.endswith(("/kernel.npy", "/bias.npy", "/scale.npy")) for name in archive.namelist())


# timm's


def test_timm_loads_the_weights_and_computes_the_same(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm.models.mlp_mixer")
    model = make(gelu="erf")
    save_as(model, tmp_path / "m.safetensors", "timm")
    theirs = timm.MlpMixer(
        num_classes=3, img_size=12, patch_size=4, num_blocks=2, embed_dim=8, mlp_ratio=(5 / 8, 6 / 8)
    ).eval()
    theirs.load_state_dict(load_file(tmp_path / "m.safetensors"), strict=True)
    images = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
        assert float((theirs(images) - expected).abs().max() / expected.abs().max()) <= 1e-5
        assert expected.std() > 0.1


def test_timm_without_a_head(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm.models.mlp_mixer")
    model = make(gelu="erf", num_classes=0)
    save_as(model, tmp_path / "m.safetensors", "timm")
    theirs = timm.MlpMixer(
        num_classes=0, img_size=12, patch_size=4, num_blocks=2, embed_dim=8, mlp_ratio=(5 / 8, 6 / 8)
    )
    theirs.load_state_dict(load_file(tmp_path / "m.safetensors"), strict=True)


@pytest.mark.parametrize(
    "options",
    [
        {"gelu": "tanh", "norm_eps": 1e-5, "dropout": 0.1, "stochastic_depth": 0.25, "rescale": True},
        {"gelu": "erf"},
        {"image_size": (8, 12), "patch_size": (4, 2), "in_channels": 1},
        {"num_classes": 0},
    ],
    ids=str,
)
def test_config_and_metadata_in_timms_layout_are_restored(tmp_path: Path, options: dict) -> None:
    model = make(**options)
    view = Preprocessing(crop="resize", crop_ratio=0.7, interpolation="nearest", mean=(0.1, 0.2, 0.3), std=(1, 2, 3.5))
    classes = ("Äpfel", 'qu"ote', "猫 \n") if model.config["num_classes"] else None
    model.metadata = Metadata(classes=classes, preprocessing=view, provenance={"a": [1, None], "ü": {"b": 0.1}})
    save_as(model, tmp_path / "m.safetensors", "timm")
    again = load(tmp_path / "m.safetensors")  # without image_size, also if the grid is not square
    assert again.config == model.config
    assert asdict(again.metadata) == asdict(model.metadata)
    assert_same_bits(again, model)
    images = torch.randn(2, model.config["in_channels"], *model.image_size)
    assert torch.equal(again(images), model(images))


def test_a_change_of_tensors_or_header_in_timms_layout_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_as(make(), path, "timm")
    with safe_open(path, "pt") as file:
        said = file.metadata()
    tensors = load_file(path)
    assert said["format"] == "pt"  # required by other readers
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    changed["head.bias"][0] += 1
    forged = json.dumps(json.loads(said["allmlp.metadata"]) | {"classes": ["x", "y", "z"]})
    for broken, header in ((changed, said), (tensors, said | {"allmlp.metadata": forged})):
        save_file(broken, path, header)
        with pytest.raises(UserError, match=r"m\.safetensors was changed or damaged since it was saved"):
            load(path)
    save_file(tensors, path, said)
    load(path)


# Warnings


def test_no_warning_if_nothing_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_as(make(), tmp_path / "m.npz", "npz")
    save_as(make(gelu="erf"), tmp_path / "m.safetensors", "timm")
    save_as(make(norm_eps=1e-4, gelu="erf", image_size=(8, 12)), tmp_path / "o.safetensors", "native")
    metadata = Metadata(classes=("a", "b", "c"), preprocessing=Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3))
    model = make(gelu="erf")
    model.metadata = metadata
    save_as(model, tmp_path / "n.safetensors", "timm")  # which stores the metadata
    assert warnings_of(caplog) == []


VIEWS = {"mean": Preprocessing(mean=(0.1, 0.2, 0.3)), "std": Preprocessing(std=(0.2, 0.2, 0.2))}


@pytest.mark.parametrize(
    ("to", "options", "metadata", "telling"),
    [
        ("npz", {"gelu": "erf"}, Metadata(), ["the erf GELU", "the authors' layout implies tanh", "approximate=False"]),
        (
            "timm",
            {"gelu": "tanh"},
            Metadata(),
            ["the tanh GELU", "timm's layout implies erf", "act_layer=timm.layers.GELUTanh"],
        ),
        ("npz", {"norm_eps": 1e-5}, Metadata(), ["LayerNorm's ε of 1e-05", "implies 1e-06"]),
        ("timm", {"norm_eps": 1e-5, "gelu": "erf"}, Metadata(), ["LayerNorm's ε of 1e-05", "implies 1e-06"]),
        ("npz", {"image_size": (8, 12)}, Metadata(), ["the shape of the grid", "image_size=(8, 12)"]),
        ("npz", {"image_size": (12, 8)}, Metadata(), ["the shape of the grid", "image_size=(12, 8)"]),
        ("npz", {}, Metadata(classes=("a", "b", "c")), ["the class names"]),
        ("npz", {}, Metadata(preprocessing=VIEWS["mean"]), ["the normalization", "(0.1, 0.2, 0.3)"]),
        ("npz", {}, Metadata(preprocessing=VIEWS["std"]), ["the normalization", "(0.2, 0.2, 0.2)"]),
    ],
    ids=["npz gelu", "timm gelu", "npz eps", "timm eps", "wide", "tall", "classes", "mean", "std"],
)
def test_each_loss_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, to: Format, options: dict, metadata: Metadata, telling: list[str]
) -> None:
    model, path = make(**options), target(tmp_path, to)
    model.metadata = metadata
    save_as(model, path, to)
    (said,) = warnings_of(caplog)
    assert str(path) in said
    assert "\n" not in said
    for words in telling:
        assert words in said
    assert said.count(";") == 0


def test_all_losses_are_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make(gelu="erf", norm_eps=1e-4, image_size=(8, 12))
    model.metadata = Metadata(classes=("a", "b", "c"), preprocessing=VIEWS["mean"])
    save_as(model, tmp_path / "m.npz", "npz")
    (said,) = warnings_of(caplog)
    for words in ("erf GELU", "ε of 0.0001", "shape of the grid", "class names", "normalization"):
        assert words in said


def test_a_wide_grid_is_restored_with_the_size_in_the_warning(tmp_path: Path) -> None:
    model = make(image_size=(8, 12))
    save_as(model, tmp_path / "m.npz", "npz")
    assert_same_bits(load(tmp_path / "m.npz", image_size=(8, 12)), model)
    with pytest.raises(UserError, match=r"6 patches .* do not form a square.*give image_size="):
        load(tmp_path / "m.npz")


# Errors


@pytest.mark.parametrize(
    ("to", "name"),
    [
        ("native", "m.npz"), ("native", "m.pt"), ("npz", "m.safetensors"), ("npz", "m"), ("npz", "m.npz.bak"),
        ("timm", "m.pth"), ("timm", "m.npz"), ("timm", "safetensors"), ("npz", "M.NPY"),
    ],
)  # fmt: skip
def test_a_wrong_file_ending_is_refused(tmp_path: Path, to: Format, name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}: the format '{to}' needs a file name that ends in \{ENDINGS[to]}"):
        save_as(make(), tmp_path / name, to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", FORMATS)
def test_a_missing_folder(tmp_path: Path, to: Format) -> None:
    with pytest.raises(UserError, match="no/where is not a folder: create it first"):
        save_as(make(), target(tmp_path / "no" / "where", to), to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", FORMATS)
def test_a_folder_in_place_of_the_file(tmp_path: Path, to: Format) -> None:
    """One line that names it, no traceback."""
    target(tmp_path, to).mkdir()
    with pytest.raises((UserError, RunError), match=r"m\.(npz|safetensors)"):
        save_as(make(), target(tmp_path, to), to)
    assert list(tmp_path.iterdir()) == [target(tmp_path, to)]


@pytest.mark.parametrize("to", FORMATS)
def test_paths_as_text(tmp_path: Path, to: Format) -> None:
    save_as(make(), str(target(tmp_path, to)), to)
    assert target(tmp_path, to).is_file()


@pytest.mark.parametrize("to", FORMATS)
def test_an_existing_file_is_replaced(tmp_path: Path, to: Format) -> None:
    path = target(tmp_path, to)
    path.write_bytes(b"something else")
    save_as(make(seed=1), path, to)
    assert_same_bits(load(path), make(seed=1))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("to", FORMATS)
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, to: Format, existing: bool) -> None:
    path = target(tmp_path, to)
    if existing:
        save_as(make(), path, to)
    before = path.read_bytes() if existing else None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # fails like a full disk
    try:
        with pytest.raises(RunError, match=r"m\.(npz|safetensors) cannot be written \(.*\): free some space"):
            save_as(make(seed=1), path, to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == ([path] if existing else [])
    assert not existing or path.read_bytes() == before


@pytest.mark.parametrize("to", FORMATS)
def test_an_interrupt_leaves_the_old_file(tmp_path: Path, to: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    path = target(tmp_path, to)
    save_as(make(), path, to)
    before = path.read_bytes()

    def interrupted(self: Path, other: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_as(make(seed=1), path, to)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before
