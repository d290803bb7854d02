"""Files of the earlier version (package mlp_mixer): weights load as it saved them, and runs are not resumed.

tests/golden/make_earlier.py made the files and the expected values.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import allmlp
from allmlp.errors import UserError
from allmlp.metadata import Metadata, Preprocessing
from allmlp.model import Mixer

EARLIER = Path(__file__).resolve().parents[1] / "golden" / "earlier"
RUN_WEIGHTS = ("run/model.safetensors", "run/checkpoints/best.safetensors", "run/checkpoints/last.safetensors")
SIGNED = ("native.safetensors", "bfloat16.safetensors", "timm.safetensors", *RUN_WEIGHTS)  # with a SHA-256
METADATA = Metadata(
    classes=("Äpfel", 'qu"ote', "猫"),
    preprocessing=Preprocessing(crop="resize", crop_ratio=0.75, interpolation="bicubic", mean=(0.1, 0.2, 0.3)),
    provenance={"seed": 1, "by": {"ü": [0.1]}},
)


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(EARLIER / "expected.npz") as arrays:
        return dict(arrays)


def flat(model: Mixer) -> torch.Tensor:
    """Every parameter, in the order of their names."""
    return torch.cat([tensor.flatten() for _, tensor in sorted(model.state_dict().items())])


def assert_logits(model: Mixer, images: np.ndarray, logits: np.ndarray) -> None:
    with torch.no_grad():
        found = model(torch.tensor(images)).numpy()
    assert np.abs(logits).max() > 1e-3
    np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-6)


# Weights


@pytest.mark.parametrize("name", ["native.safetensors", "timm.safetensors", "authors.npz"])
def test_weights_are_bit_identical(expected: dict[str, np.ndarray], name: str) -> None:
    model = allmlp.load(EARLIER / name, image_size=(8, 12))
    assert torch.equal(flat(model).view(torch.int32), torch.tensor(expected["weights"]).view(torch.int32))
    if name.endswith(".npz"):  # which stores neither
        model = Mixer(**model.config | {"norm_eps": 1e-5}).eval()
        model.load_state_dict(allmlp.load(EARLIER / name, image_size=(8, 12)).state_dict())
    assert_logits(model, expected["images"], expected["logits"])


def test_bfloat16_weights_stay_bfloat16(expected: dict[str, np.ndarray]) -> None:
    model = allmlp.load(EARLIER / "bfloat16.safetensors")
    weights = flat(model)
    assert weights.dtype == torch.bfloat16
    assert torch.equal(weights.view(torch.int16), torch.tensor(expected["weights"]).bfloat16().view(torch.int16))
    assert_logits(model.float(), expected["images"], expected["bfloat16_logits"])


@pytest.mark.parametrize("name", ["native.safetensors", "bfloat16.safetensors", "timm.safetensors"])
def test_config_and_metadata_are_as_saved(name: str) -> None:
    model = allmlp.load(EARLIER / name)
    assert model.metadata == METADATA
    assert model.config == {
        "num_classes": 3, "image_size": (8, 12), "patch_size": (4, 4), "num_blocks": 2, "hidden_dim": 8,
        "tokens_mlp_dim": 5, "channels_mlp_dim": 6, "in_channels": 3, "gelu": "tanh", "norm_eps": 1e-5, "dropout": 0.0,
        "stochastic_depth": 0.1, "rescale": False,
    }  # fmt: skip


@pytest.mark.parametrize("name", RUN_WEIGHTS)
def test_weights_of_a_run_have_its_recipe_and_classes(name: str) -> None:
    metadata = allmlp.load(EARLIER / name).metadata
    assert metadata.classes == tuple("0123456789")
    assert metadata.provenance["recipe"] == json.loads((EARLIER / "run/recipe.json").read_text())


def test_final_weights_of_a_run_have_its_scores_and_logits(expected: dict[str, np.ndarray]) -> None:
    model = allmlp.load(EARLIER / "run/model.safetensors")
    summary = json.loads((EARLIER / "run/summary.json").read_text())
    for key in ("test_top1", "val_top1", "seed", "command", "commit"):
        assert model.metadata.provenance[key] == summary[key]
    assert_logits(model, expected["run_images"], expected["run_logits"])


@pytest.mark.parametrize("name", SIGNED)
def test_a_flipped_byte_is_detected(tmp_path: Path, name: str) -> None:
    sound, path = (EARLIER / name).read_bytes(), tmp_path / "damaged.safetensors"
    start = 8 + int.from_bytes(sound[:8], "little")
    rng = random.Random(0)
    for place in {0, 7, 8, start - 1, start, len(sound) - 1, *rng.sample(range(8, start), 60),
                  *rng.sample(range(start, len(sound)), 60)}:  # fmt: skip
        damaged = bytearray(sound)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged\.safetensors"):
            allmlp.load(path)
    path.write_bytes(sound)
    allmlp.load(path)


def test_a_flipped_byte_of_an_npz_is_detected(tmp_path: Path) -> None:
    """By the zip's checksum of each array."""
    sound, path = (EARLIER / "authors.npz").read_bytes(), tmp_path / "damaged.npz"
    place = sound.index(b"head/bias.npy") + 200
    damaged = bytearray(sound)
    damaged[place] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"damaged\.npz"):
        allmlp.load(path, image_size=(8, 12))


@pytest.mark.parametrize("name", ["native.safetensors", "bfloat16.safetensors"])
def test_saving_again_writes_the_current_format(tmp_path: Path, name: str) -> None:
    before = allmlp.load(EARLIER / name)
    allmlp.save(before, tmp_path / "m.safetensors")
    again = allmlp.load(tmp_path / "m.safetensors")
    assert b'"format":"allmlp"' in (tmp_path / "m.safetensors").read_bytes()
    assert (again.config, again.metadata) == (before.config, before.metadata)
    assert torch.equal(flat(again), flat(before))


# The commands


def test_evaluate_splits_as_the_stored_recipe_says(mixer: Callable) -> None:
    answer = mixer(
        "evaluate", EARLIER / "run/model.safetensors", "--data", "digits", "--precision", "float32", "--json"
    )
    assert answer.status == 0, answer.err
    found, summary = json.loads(answer.out), json.loads((EARLIER / "run/summary.json").read_text())
    assert found["images"] == summary["images"]["test"]
    assert "40%" in found["data"]
    assert "split seed 3" in found["data"]
    assert found["top1"] == pytest.approx(summary["test_top1"], abs=0.003)  # one image may round to another class


def test_predict_names_the_classes(mixer: Callable, pictures: Callable, tmp_path: Path) -> None:
    images = pictures(tmp_path, {"red": 1}) / "red"
    answer = mixer("predict", EARLIER / "run/model.safetensors", images, "--json")
    assert answer.status == 0, answer.err
    (row,) = json.loads(answer.out)["predictions"]
    assert {best["class"] for best in row["predictions"]} <= set("0123456789")


# A run cannot be resumed


@pytest.fixture(params=["finished", "stopped"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = shutil.copytree(EARLIER / "run", tmp_path / "run")
    (folder / ".lock").touch()  # every run leaves it
    if request.param == "stopped":
        for name in ("summary.json", "model.safetensors"):
            (folder / name).unlink()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "words",
    [
        lambda run: ("train", "--resume", run),
        lambda run: ("train", "digits", "--out", run, "--resume", "auto"),
        lambda run: ("status", run),
    ],
    ids=["resume", "resume auto", "status"],
)
def test_a_run_is_refused_in_one_line_and_left_as_it_was(run: Path, mixer: Callable, words: Callable) -> None:
    before = contents(run)
    answer = mixer(*words(run))
    assert answer.status == 2
    assert answer.out == ""
    (line,) = answer.errors
    assert line == answer.last
    assert str(run) in line
    assert "earlier version" in line
    assert "cannot be resumed" in line
    assert "weights" in line  # which can still be used
    assert contents(run) == before
