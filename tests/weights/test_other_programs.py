"""Weights as other programs leave them: prefixes, training checkpoints, folders, config.json; and what save takes."""

import argparse
import collections
import copy
import json
import pathlib
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from random_models import assert_same_bits, cases, make, refused, timm_state, warnings_of
from safetensors.torch import save_file
from torch import Tensor, nn

import allmlp
from allmlp.errors import UserError
from allmlp.metadata import Preprocessing
from allmlp.model import Mixer
from allmlp.weights.layouts import LAYOUTS, Layout
from allmlp.weights.load import load

PREFIXES = (
    "",
    "model.",
    "net.",
    "module.",
    "_orig_mod.",
    "model._orig_mod.module.",
    "ema.module.",
    "a.b.c.",
    "backbone.",
)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
AROUND: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda state: state,
    "timm": lambda state: {
        "epoch": 3, "arch": "mixer_b16_224", "state_dict": state, "version": 2, "metric": np.float64(81.2),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        "args": argparse.Namespace(lr=0.1, data_dir=Path("/data"), img_size=None, mean=(0.5, 0.5), hflip=0.5),
    },
    "Lightning": lambda state: {
        "epoch": 1, "state_dict": state, "pytorch-lightning_version": "2.1", "hyper_parameters": {"lr": 0.1},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5), "dirpath": "x"}},
        "loops": collections.OrderedDict(),
    },
    "averaged": lambda state: {"state_dict_ema": state, "state_dict": {k: -v for k, v in state.items()}},
    "mmengine": lambda state: {"meta": {"seed": 1, "time": "today"}, "state_dict": state, "message_hub": {}},
    "nested": lambda state: {"model": {"model": {"module": state}}, "seeds": np.arange(3), "name": np.str_("x")},
}  # fmt: skip


def stored(model: Mixer, layout: Layout, prefix: str) -> dict[str, Tensor]:
    """The tensors of a model in a layout of torch's, below a prefix."""
    names = layout.names(len(model.blocks))
    return {prefix + names[name]: tensor.clone() for name, tensor in model.state_dict().items()}


def write(path: Path, state: Any, container: str) -> None:
    if container == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=container == "zip")


@cases(60)
@given(
    prefix=st.sampled_from(PREFIXES),
    layout=st.sampled_from([layout for layout in LAYOUTS if not layout.flax and "lucidrains" not in layout.title]),
    around=st.sampled_from(sorted(AROUND)),
    container=st.sampled_from(["zip", "pickle", "safetensors"]),
    dtype=st.sampled_from(DTYPES),
    extra=st.booleans(),
)
def test_what_other_programs_save_is_read(
    prefix: str, layout: Layout, around: str, container: str, dtype: torch.dtype, extra: bool, tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("w") / "w.any"
    model = make(dtype=dtype)
    state = stored(model, layout, prefix)
    if extra and prefix not in ("", "_orig_mod.") and layout.title.startswith("timm"):
        state |= {"loss.weight": torch.ones(2), "n_averaged": torch.tensor(3)}
    write(path, state if container == "safetensors" else AROUND[around](state), container)
    found = load(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name].to(dtype), tensor), name
    assert found.config | {"gelu": "", "norm_eps": 0} == model.config | {"gelu": "", "norm_eps": 0}
    assert len(allmlp.predict(found, [Image.new("RGB", (9, 9), "red")], device="cpu")[0].classes) == 3


def test_two_models_are_told_apart(tmp_path: Path) -> None:
    state = timm_state()
    torch.save({f"{p}.{name}": t for p in ("student", "teacher") for name, t in state.items()}, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "'student.' and 'teacher.'", "save one of them")
    torch.save(state | {f"teacher.{name}": t for name, t in state.items()}, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "'' and 'teacher.'")
    half = {f"model.{name}": t for name, t in state.items() if "norm2" not in name}
    torch.save(half, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "missing: ", "norm2")


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_timms_own_saver(tmp_path: Path) -> None:
    utils, timm = pytest.importorskip("timm.utils"), pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 16, "num_blocks": 2, "embed_dim": 16, "num_classes": 5}
    model = timm.models.mlp_mixer.MlpMixer(**sizes)
    optimizer = torch.optim.AdamW(model.parameters())
    args = argparse.Namespace(
        model="mixer", lr=0.1, data=Path("x"), model_kwargs={}, seed=np.int64(3), amp_dtype="float16"
    )
    for ema in (None, utils.ModelEmaV3(model)):
        folder = tmp_path / str(bool(ema))
        folder.mkdir()
        utils.CheckpointSaver(model, optimizer, args, ema, checkpoint_dir=folder).save_checkpoint(1, metric=0.5)
        found = load(folder / "model_best.pth.tar")
        assert torch.equal(found.get_parameter("stem.weight"), model.stem.proj.weight)


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return pathlib.Path.touch, (Path("ran"),)


class Odd(argparse.Namespace):
    """Not the class that is allowed."""


@pytest.mark.parametrize(
    "inside",
    [
        Runs(),
        argparse.Namespace(x=Runs()),
        np.array([Runs()], dtype=object),
        collections.deque([Runs()]),
        Odd(),
        collections.defaultdict(list),
        torch.nn.Linear(1, 1),
        print,
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_code_runs(inside: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    warnings.simplefilter("ignore")
    for zipped in (True, False):
        torch.save({"state_dict": timm_state(), "args": inside}, "w.pt", _use_new_zipfile_serialization=zipped)
        refused("w.pt", "can run code", "state_dict()")
    Path("w.pt").write_bytes(pickle.dumps({"state_dict": inside}))
    refused("w.pt")
    assert not Path("ran").exists()


# config.json and folders

CONFIG = {
    "architecture": "mixer_b16_224", "num_classes": 3, "label_names": ["cat", "dog", "fly"],
    "pretrained_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1], "crop_pct": 0.9, "interpolation": "bicubic"},
}  # fmt: skip


def test_config_json_beside_the_weights_counts_as_on_the_hub(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file(timm_state(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(CONFIG).encode())
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = load(path).metadata
        assert found.classes == ("cat", "dog", "fly")
        view = Preprocessing(mean=(0, 0, 0), std=(1, 1, 1), crop_ratio=0.9, interpolation="bicubic")
        assert found.preprocessing == view
    assert warnings_of(caplog) == []
    for other in ({"model_type": "vit", "id2label": {}}, [1], "x"):
        (tmp_path / "config.json").write_text(json.dumps(other))
        assert load(tmp_path).metadata.classes is None
    (tmp_path / "config.json").write_text("{broken")
    assert load(tmp_path).metadata.classes is None
    assert "config.json cannot be read" in "".join(warnings_of(caplog))
    native = tmp_path / "native"
    native.mkdir()
    allmlp.save(make(), native / "model.safetensors", classes=["x", "y", "z"])
    (native / "config.json").write_text(json.dumps(CONFIG))
    assert load(native).metadata.classes == ("x", "y", "z")  # the file's own


def test_a_folder_stands_for_the_weights_in_it(tmp_path: Path) -> None:
    torch.save(timm_state(), tmp_path / "pytorch_model.bin")
    assert load(tmp_path).num_classes == 3
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    refused(run, "neither model.safetensors nor pytorch_model.bin", "name the weights file")
    (run / "recipe.json").touch()
    refused(run, "not finished", "mixer train --resume")
    allmlp.save(make(), run / "checkpoints" / "last.safetensors")
    refused(run, "checkpoints/last.safetensors")
    allmlp.save(make(), run / "model.safetensors")
    assert_same_bits(load(run), make())


# What save takes, load gives back

WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda model: model,
    "compile": lambda model: torch.compile(model),  # pyright: ignore[reportReturnType]
    "DataParallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
}
NAMES = st.text(min_size=0, max_size=9) | st.sampled_from(["", "\ud800", "café", "a\nb", "x" * 2000, "[red]", "%s"])


@cases(40)
@given(
    wraps=st.lists(st.sampled_from(sorted(WRAPS)), max_size=3, unique=True),
    dtype=st.sampled_from(DTYPES),
    classes=st.none() | st.lists(NAMES, min_size=3, max_size=3),
    strided=st.booleans(),
    shared=st.booleans(),
)
def test_everything_that_save_takes_load_gives_back(
    wraps: list[str], dtype: torch.dtype, classes: list[str] | None, strided: bool, shared: bool, tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("w") / "w.safetensors"
    model = make(dtype=dtype)
    if strided:
        model.head.weight = nn.Parameter(model.get_parameter("head.weight").detach().mT.contiguous().mT)
    if shared:
        model.blocks[1].norm1 = model.blocks[0].norm1
    expected = copy.deepcopy(model)
    expected.head.weight = nn.Parameter(expected.get_parameter("head.weight").detach().contiguous())
    whole: nn.Module = model
    for name in wraps:
        whole = WRAPS[name](whole)
    allmlp.save(whole, path, classes=classes)
    found = load(path)
    assert_same_bits(found, expected)
    assert found.metadata.classes == (None if classes is None else tuple(classes))


def test_sharded_weights_are_refused(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = make()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(UserError, match=r"sharded \(FSDP2\): .*full_tensor"):
            allmlp.save(model, tmp_path / "w.safetensors")
    finally:
        torch.distributed.destroy_process_group()


def test_timms_averages_are_unwrapped(tmp_path: Path) -> None:
    utils = pytest.importorskip("timm.utils")
    for average in (utils.ModelEmaV2, utils.ModelEmaV3):
        allmlp.save(average(make()), tmp_path / "w.safetensors")
        assert_same_bits(load(tmp_path / "w.safetensors"), make())
