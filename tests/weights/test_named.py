"""Published weights by name: what the table says, a hub's cache laid out by hand, names that are none, no network."""

import json
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file

import allmlp
from allmlp.errors import UserError
from allmlp.factory import create
from allmlp.variants import COSTS, VARIANTS
from allmlp.weights.named import NAMED, advise_to_finetune, resolve_weights
from allmlp.zoo.systems import SYSTEMS

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("weights", NAMED.values(), ids=NAMED)
def test_the_table_is_right_about_sizes(weights) -> None:
    options = {"last_conv": True} if weights.model == "EfficientNet-L2" else {}
    with torch.device("meta"):
        model = create(weights.model, num_classes=weights.classes, image_size=weights.image_size, **options)
    assert sum(p.numel() for p in model.parameters()) == weights.parameters
    assert weights.megabytes == round(4 * weights.parameters / 1e6)


@pytest.mark.parametrize("weights", NAMED.values(), ids=NAMED)
def test_timm_publishes_them_under_this_license_for_these_classes(weights) -> None:
    config = timm.models.get_pretrained_cfg(weights.hub.removeprefix("timm/")).to_dict()
    assert config["hf_hub_id"] == weights.hub
    assert config["license"] == weights.license
    assert config["num_classes"] == weights.classes
    assert config["input_size"][1:] == (weights.image_size,) * 2


def test_costs_are_those_that_are_counted() -> None:
    from allmlp.flops import cost

    for name in ("B/16", "S/32", "ViT-B/16", "BiT-R50x1", "HaloNet-H4"):
        with torch.device("meta"):
            counted = cost(create(name))
        known = COSTS[name] if name in COSTS else (SYSTEMS[name].parameters, SYSTEMS[name].macs)
        assert known == (counted.parameters, counted.macs)
    assert COSTS.keys() == VARIANTS.keys()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty cache and no network; returns a function that lays out a repository's files in it."""
    root = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(repo: str, state: dict, config: dict) -> None:
        folder = root / f"models--{repo.replace('/', '--')}"
        snapshot = folder / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
        save_file(state, snapshot / "model.safetensors")
        (snapshot / "config.json").write_text(json.dumps(config))

    return put


def test_a_name_loads_from_the_cache(hub, mixer) -> None:
    theirs = timm.create_model("mixer_b16_224", num_classes=1000).eval()
    pretrained = {"mean": [0.0] * 3, "std": [1.0] * 3, "crop_pct": 0.875, "input_size": [3, 224, 224]}
    hub("timm/mixer_b16_224.miil_in21k_ft_in1k", theirs.state_dict(), {"pretrained_cfg": pretrained})
    for name in ("mixer-b16-miil-in1k", "Mixer-B16-MIIL-in1k"):
        model = allmlp.load(name)
        assert model.metadata.preprocessing.mean == (0.0, 0.0, 0.0)
        assert model.metadata.provenance["source"]["hub"] == "timm/mixer_b16_224.miil_in21k_ft_in1k"
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), rtol=1e-4, atol=1e-5)
    info = json.loads(mixer("info", "mixer-b16-miil-in1k", "--json").out)
    assert info["variant"] == "Mixer-B/16"
    assert info["num_classes"] == 1000


def test_a_comparison_systems_name_loads_from_the_cache(hub) -> None:
    theirs = timm.create_model("vit_base_patch32_224", num_classes=1000).eval()
    hub("timm/vit_base_patch32_224.augreg_in21k_ft_in1k", theirs.state_dict(), {"pretrained_cfg": {"std": [0.4] * 3}})
    model = allmlp.load("vit-b32-augreg-in1k")
    assert model.metadata.preprocessing.std == (0.4, 0.4, 0.4)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        wanted = theirs(images)
        assert (model(images) - wanted).norm() <= 1e-6 * wanted.norm()


def test_without_a_network_one_line_says_what_to_do(hub, mixer, tmp_path: Path) -> None:
    start = time.perf_counter()
    done = mixer("finetune", "mixer-b16-in21k", "--data", "digits", "--out", tmp_path / "run")
    assert time.perf_counter() - start < 15
    assert done.status == 1
    assert len(done.errors) == 1
    assert "timm/mixer_b16_224.goog_in21k" in done.errors[0]
    assert "connect once, or give a local file" in done.errors[0]
    assert "about 304 MB" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mixer-b16-in22k", "no published weights of this name: the nearest are mixer-b16-in21k"),
        ("vit-b16-augreg", "the nearest are .*vit-b16-augreg-in1k"),
        ("B/16", "B/16 names a model without weights: give trained weights, such as mixer-b16-in21k"),
        ("Mixer-S/32", "names a model without weights: give trained weights, a file"),
        ("BoTNet-T7", "names a model without weights"),
        ("nothing-like-it", "nothing-like-it"),
    ],
)
def test_names_that_are_none(name: str, said: str, mixer) -> None:
    with pytest.raises(UserError, match=said):
        allmlp.load(name)
    done = mixer("evaluate", name, "--data", "digits")
    assert done.status == 2
    assert len(done.errors) == 1


def test_a_file_of_the_same_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_weights("mixer-b16-in21k") == "hf-hub:timm/mixer_b16_224.goog_in21k"
    Path("mixer-b16-in21k").mkdir()
    assert resolve_weights("mixer-b16-in21k") == "mixer-b16-in21k"
    for other in ("x.safetensors", "runs/a", "hf-hub:owner/name", "/abs/B"):
        assert resolve_weights(other) == other


def test_advice_for_few_photographs() -> None:
    said = advise_to_finetune(800, "my photos/", 64)
    assert "800 training images" in said
    assert "mixer finetune mixer-b16-in21k --data 'my photos/' (downloads 304 MB)" in said
    assert advise_to_finetune(5_000, "photos/", 224) == ""
    assert advise_to_finetune(800, "photos/", 32) == ""


def test_training_on_few_photographs_advises_once(mixer, tiny, tmp_path: Path) -> None:
    from conftest import write_pictures

    data = write_pictures(tmp_path / "data", {"red": 12, "blue": 12}) or tmp_path / "data"
    options = ["--steps", 1, "-b", 4, *tiny, "--patch-size", 32, "--workers", 0, "--compile", "off"]
    done = mixer("train", "--data", data, "--image-size", 64, *options, "--out", tmp_path / "a")
    assert done.status == 0, done.err
    assert done.err.count("starting from published weights is far better") == 1
    small = mixer("train", "--data", data, "--image-size", 32, *options, "--out", tmp_path / "b")
    digits = mixer("train", "digits", "--image-size", 64, *options, "--out", tmp_path / "c")
    started = mixer("train", "--data", data, "--weights", tmp_path / "a", "--steps", 1, "-b", 4, "--workers", 0)
    for run in (small, digits, started):
        assert "starting from published weights" not in run.err


def test_the_list_of_models(mixer) -> None:
    listed = json.loads(mixer("models", "--json").out)
    assert [row["name"] for row in listed["mixer"]] == [f"Mixer-{name}" for name in VARIANTS]
    assert [row["name"] for row in listed["systems"]] == list(SYSTEMS)
    names = [row["name"] for row in listed["weights"]]
    assert names[: len(NAMED)] == list(NAMED)
    assert {row["license"] for row in listed["weights"]} == {"apache-2.0"}
    by_hand = [row for row in listed["weights"] if row["name"] is None]
    assert "imagenet21k/Mixer-L_16.npz" in [row["file"] for row in by_hand]
    text = mixer("models").out
    assert all(name in text for name in [*SYSTEMS, *NAMED, "Mixer-H/14"])
    alone = json.loads(mixer("models", "weights", "--json").out)
    assert list(alone) == ["weights"]
    assert mixer("models", "others").status == 2
