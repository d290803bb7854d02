"""mixer bench: its table, JSON and plot; weights beside models by name; mistakes."""

import json
from pathlib import Path

import pytest

from allmlp.factory import create
from allmlp.weights.native import save

SIZES = {"num_blocks": 1, "patch_size": 8, "hidden_dim": 16, "tokens_mlp_dim": 8, "channels_mlp_dim": 32}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save(create(num_classes=3, image_size=32, **SIZES), path)
    return path


def test_weights_and_a_system_by_name(mixer, weights: Path, tmp_path: Path) -> None:
    files = ["--out", tmp_path / "b.json", "--plot", tmp_path / "b.png"]
    options = ["--budget", "4s", "--device", "cpu", "--image-size", 64, "--batch-sizes", 1, 2]
    done = mixer("bench", weights, "BiT-R50x1", *options, *files, "--json")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert json.loads((tmp_path / "b.json").read_text()) == found
    small, large = found["models"]
    assert (small["name"], large["name"]) == (str(weights), "BiT-R50x1")
    assert small["image_size"] == large["image_size"] == [64, 64]
    assert small["images_per_second"] > large["images_per_second"]
    assert set(small["sweep"]) == {"1", "2"}
    assert small["pretraining_device_days"]["ImageNet, 300 epochs"] > 0
    assert found["threads"] >= 1
    assert (tmp_path / "b.png").stat().st_size > 1000


def test_the_tables(mixer, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = mixer("bench", weights, "--budget", "2s", "--device", "cpu", "--no-train")
    assert done.status == 0, done.err
    assert f"A  {weights}, 32 × 32 px" in done.out
    assert "images/s" in done.out
    assert "days of this device" not in done.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no models"),
        (("B/17",), "unknown model 'B/17'"),
        (("B/16", "--budget", "fast"), "--budget fast: give a time above 0"),
        (("B/16", "--budget", "0.1s"), "--budget 0.1 s for 1 model"),
        (("B/16", "--plot", "x.txt"), "--plot x.txt: give a file name that ends in"),
        (("B/16", "--out", "nowhere/x.json"), "--out nowhere/x.json: nowhere is not a folder"),
        (("B/16", "--plot", "."), "--plot . is a folder"),
        (("ViT-B/16", "--image-size", 100), "multiples of 16"),
        (("B/16", "--batch-sizes", 0), "--batch-sizes 0"),
    ],
)
def test_mistakes(mixer, words: tuple, said: str) -> None:
    done = mixer("bench", *words, "--device", "cpu")
    assert (done.status, done.out) == (2, "")
    assert len(done.errors) == 1
    assert said in done.errors[0]
