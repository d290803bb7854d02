"""Files of the earlier version (package mlp_mixer): weights load as it saved them, and runs are not resumed.

tests/golden/make_earlier.py made the files and the expected values.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import refused

import allmlp
from allmlp.metadata import Metadata, Preprocessing
from allmlp.model import Mixer

EARLIER = Path(__file__).resolve().parents[1] / "golden" / "earlier"
RUN_WEIGHTS = ("run/model.safetensors", "run/checkpoints/best.safetensors", "run/checkpoints/last.safetensors")
SUMMARY = json.loads((EARLIER / "run/summary.json").read_text())
METADATA = Metadata(
    classes=("Äpfel", 'qu"ote', "猫"),
    preprocessing=Preprocessing(crop="resize", crop_ratio=0.75, interpolation="bicubic", mean=(0.1, 0.2, 0.3)),
    provenance={"seed": 1, "by": {"ü": [0.1]}},
)
CONFIG = {
    "num_classes": 3, "image_size": (8, 12), "patch_size": (4, 4), "num_blocks": 2, "hidden_dim": 8,
    "tokens_mlp_dim": 5, "channels_mlp_dim": 6, "in_channels": 3, "gelu": "tanh", "norm_eps": 1e-5, "dropout": 0.0,
    "stochastic_depth": 0.1, "rescale": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(EARLIER / "expected.npz") as arrays:
        return dict(arrays)


def assert_logits(model: Mixer, images: np.ndarray, logits: np.ndarray) -> None:
    with torch.no_grad():
        found = model(torch.tensor(images)).numpy()
    assert np.abs(logits).max() > 1e-3
    np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["native.safetensors", "timm.safetensors", "bfloat16.safetensors", "authors.npz"])
def test_weights_are_as_saved(expected: dict[str, np.ndarray], name: str, tmp_path: Path) -> None:
    model = allmlp.load(EARLIER / name, image_size=(8, 12))
    weights = torch.cat([tensor.flatten() for _, tensor in sorted(model.state_dict().items())])
    assert torch.equal(weights, torch.tensor(expected["weights"]).to(weights.dtype))
    assert weights.dtype == (torch.bfloat16 if name.startswith("bfloat16") else torch.float32)
    if name.endswith(".npz"):  # which stores neither config nor metadata
        state, model = model.state_dict(), Mixer(**CONFIG).eval()
        model.load_state_dict(state)
    else:
        assert (model.config, model.metadata) == (CONFIG, METADATA)
        allmlp.save(model, tmp_path / "m.safetensors")
        again = allmlp.load(tmp_path / "m.safetensors")
        assert b'"format":"allmlp"' in (tmp_path / "m.safetensors").read_bytes()
        assert (again.config, again.metadata) == (CONFIG, METADATA)
    logits = expected["bfloat16_logits" if name.startswith("bfloat16") else "logits"]
    assert_logits(model.float(), expected["images"], logits)


def test_weights_of_a_run_have_its_recipe_classes_and_scores(expected: dict[str, np.ndarray]) -> None:
    for name in RUN_WEIGHTS:
        metadata = allmlp.load(EARLIER / name).metadata
        assert metadata.classes == tuple("0123456789")
        assert metadata.provenance["recipe"] == json.loads((EARLIER / "run/recipe.json").read_text())
    model = allmlp.load(EARLIER / RUN_WEIGHTS[0])
    for key in ("test_top1", "val_top1", "seed", "command", "commit"):
        assert model.metadata.provenance[key] == SUMMARY[key]
    assert_logits(model, expected["run_images"], expected["run_logits"])


@pytest.mark.parametrize("name", ["native.safetensors", "bfloat16.safetensors", "timm.safetensors", *RUN_WEIGHTS])
def test_a_flipped_byte_is_detected(tmp_path: Path, name: str) -> None:
    sound, path = (EARLIER / name).read_bytes(), tmp_path / "damaged.safetensors"
    start, rng = 8 + int.from_bytes(sound[:8], "little"), random.Random(0)
    edges = {0, 7, 8, start - 1, start, len(sound) - 1}
    for place in edges | {*rng.sample(range(8, start), 40), *rng.sample(range(start, len(sound)), 40)}:
        damaged = bytearray(sound)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        refused(path)


# The commands


def test_evaluate_and_predict(mixer: Any, pictures: Any, tmp_path: Path) -> None:
    """Data is split as the stored recipe says."""
    weights = EARLIER / RUN_WEIGHTS[0]
    answer = mixer("evaluate", weights, "--data", "digits", "--precision", "float32", "--json")
    assert answer.status == 0, answer.err
    found = json.loads(answer.out)
    assert found["images"] == SUMMARY["images"]["test"]
    assert "40%" in found["data"]
    assert found["top1"] == pytest.approx(SUMMARY["test_top1"], abs=0.003)  # one image may round to another class
    answer = mixer("predict", weights, pictures(tmp_path, {"red": 1}) / "red", "--json")
    (row,) = json.loads(answer.out)["predictions"]
    assert {best["class"] for best in row["predictions"]} <= set("0123456789")


@pytest.mark.parametrize("stopped", [False, True])
def test_a_run_is_refused_in_one_line_and_left_as_it_was(mixer: Any, tmp_path: Path, stopped: bool) -> None:
    run = shutil.copytree(EARLIER / "run", tmp_path / "run")
    (run / ".lock").touch()  # every run leaves it
    for name in ("summary.json", "model.safetensors") if stopped else ():
        (run / name).unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for words in (("train", "--resume", run), ("train", "digits", "--out", run, "--resume", "auto"), ("status", run)):
        answer = mixer(*words)
        assert (answer.status, answer.out) == (2, "")
        (line,) = answer.errors
        assert line == answer.last
        assert all(word in line for word in (str(run), "earlier version", "weights"))
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
