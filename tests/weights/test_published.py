"""The table of published checkpoints agrees with the paper and timm, and class names with timm."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch

import allmlp
from allmlp.variants import VARIANTS
from allmlp.weights import published
from allmlp.weights.layouts import TIMM
from allmlp.weights.published import CHECKPOINTS, MIIL, SYNSETS, candidates, class_names, synset_names, variant_of

SUBSETS = {1000: "imagenet-1k", 21843: "imagenet-21k-goog", 11221: "imagenet-21k-miil"}


def config_of(name: str | None, **options) -> dict:
    with torch.device("meta"):
        return allmlp.create(name, **options).config


@pytest.fixture
def uncached() -> Iterator[None]:
    """Clears the caches of names before and after a test."""
    for found in (class_names, synset_names):
        found.cache_clear()
    yield
    for found in (class_names, synset_names):
        found.cache_clear()


# Class names


@pytest.mark.parametrize("classes", SUBSETS)
def test_names_are_timms_in_timms_order(classes: int) -> None:
    data = pytest.importorskip("timm.data")
    info = data.ImageNetInfo(SUBSETS[classes])
    names, synsets = class_names(classes), synset_names(classes)
    assert names is not None
    assert len(names) == classes == info.num_classes()
    assert list(synsets) == info.label_names()
    assert tuple(synsets.values()) == names
    for i, (ours, synset) in enumerate(zip(names, synsets, strict=True)):
        theirs = info.index_to_description(i)
        assert ours in (theirs, f"{theirs} ({synset})"), i


@pytest.mark.parametrize("classes", SUBSETS)
def test_names_are_distinct_and_in_one_line(classes: int) -> None:
    pytest.importorskip("timm")
    names = class_names(classes)
    assert names is not None
    assert len(set(names)) == classes
    assert all(name == name.strip() and name.isprintable() and name for name in names)


def test_the_two_cranes_are_distinguished() -> None:
    pytest.importorskip("timm")
    names = class_names(1000)
    assert names is not None
    assert names[0] == "tench, Tinca tinca"
    assert names[281].startswith("tabby")
    assert [names[i] for i in (134, 517)] == ["crane (n02012849)", "crane (n03126707)"]
    assert synset_names(1000)["n01440764"] == names[0]


@pytest.mark.parametrize("classes", [0, 1, 10, 999, 1001, 21841, 11821, -1])
def test_no_names_for_another_number(classes: int) -> None:
    assert class_names(classes) is None
    assert synset_names(classes) == {}


def test_without_timm_there_are_no_names(uncached: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> NoReturn:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    for classes in SUBSETS:
        assert class_names(classes) is None
        assert synset_names(classes) == {}


@pytest.mark.parametrize("files", [{}, {"imagenet_synsets.txt": "n1\nn2\n"}, {"imagenet_synsets.txt": "n1\n" * 1000}])
def test_a_timm_without_its_data_gives_no_names(
    uncached: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]
) -> None:
    """A broken installation, or another version: no names, rather than wrong ones."""
    folder = tmp_path / "timm" / "data" / "_info"
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
        (folder / "imagenet_synset_to_lemma.txt").write_text("n1\tone\n")
    found = SimpleNamespace(locate_file=lambda path: tmp_path / path)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: found)
    assert class_names(1000) is None


def test_timm_is_not_imported_for_its_names() -> None:
    program = (
        "import sys; from allmlp.weights import published;"
        "first = 'timm' in sys.modules; names = published.class_names(1000);"
        "print(first, 'timm' in sys.modules, names is None or len(names))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split()[:2] == ["False", "False"]
    assert done.stdout.split()[2] in ("1000", "True")


# The table


def test_files_and_digests_are_unique() -> None:
    files = [checkpoint.file for checkpoint in CHECKPOINTS]
    assert len(set(files)) == len(files)
    digests = [checkpoint.sha256 for checkpoint in CHECKPOINTS if checkpoint.sha256]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda checkpoint: checkpoint.file)
def test_a_row_of_the_table_is_consistent(checkpoint: published.PublishedCheckpoint) -> None:
    assert checkpoint.variant in {*VARIANTS, "S/8"}
    assert checkpoint.classes in SYNSETS
    assert checkpoint.source
    assert checkpoint.data
    assert checkpoint.image_size == 224
    assert checkpoint.top1 is None or 0.5 < checkpoint.top1 < 0.9
    assert checkpoint.classes == 1000 or checkpoint.top1 is None  # top-1 is on ImageNet's classes
    stem = checkpoint.file.rpartition("/")[2]
    assert checkpoint.authors == (not checkpoint.file.startswith("timm/"))
    letter, patch = checkpoint.variant.split("/")
    if checkpoint.authors:
        assert stem == f"Mixer-{letter}_{patch}.npz"
        assert checkpoint.sha256 == ""
        assert ("21k" in checkpoint.file.lower()) == (checkpoint.classes == 21843)
    else:
        assert stem.startswith(f"mixer_{letter.lower()}{patch}_224.")
        assert len(checkpoint.sha256) == 8
        assert set(checkpoint.sha256) <= set("0123456789abcdef")
        assert checkpoint.classes == (1000 if stem.endswith("ft_in1k") else 11221 if "miil" in stem else 21843)


def test_accuracies_are_those_of_the_paper() -> None:
    """Table 3: ImageNet alone, 300 epochs, Mixer-B/16 76.44 %, Mixer-L/16 71.76 %."""
    papers = {c.file: c.top1 for c in CHECKPOINTS if "Tolstikhin" in c.source}
    assert papers["imagenet1k/Mixer-B_16.npz"] == 0.7644
    assert papers["imagenet1k/Mixer-L_16.npz"] == 0.7176
    untuned = [c for c in CHECKPOINTS if c.file.startswith("imagenet21k/")]
    assert len(untuned) == 2
    for checkpoint in untuned:
        assert checkpoint.top1 is None
        assert "80.64" in checkpoint.note
        assert "82.89" in checkpoint.note


def test_misleading_names_have_a_note() -> None:
    scratch = {c.variant: c for c in CHECKPOINTS if c.file.startswith("imagenet1k/")}
    misnamed = [c for c in CHECKPOINTS if c.file.endswith("goog_in21k_ft_in1k")]
    assert len(misnamed) == 2
    for checkpoint in misnamed:
        assert "not fine-tuned from ImageNet-21k" in checkpoint.note
        assert checkpoint.data == scratch[checkpoint.variant].data
        assert checkpoint.top1 == pytest.approx(scratch[checkpoint.variant].top1, abs=0.005)
    assert all("not fine-tuned" not in c.note for c in CHECKPOINTS if c not in misnamed)


def test_rows_of_timm_agree_with_timm() -> None:
    timm = pytest.importorskip("timm.models.mlp_mixer")
    theirs = {
        f"timm/{name}.{tag}": config
        for name, configs in timm.default_cfgs.items()
        for tag, config in configs.cfgs.items()
        if name.startswith("mixer_") and config.url
    }
    ours = {c.file: c for c in CHECKPOINTS if not c.authors}
    assert ours.keys() == theirs.keys()
    for name, config in theirs.items():
        assert config.num_classes == ours[name].classes
        assert config.url.endswith(f"-{ours[name].sha256}.pth")
        view = MIIL if "miil" in name else TIMM.preprocessing
        assert (config.mean, config.std) == (view.mean, view.std)
        assert config.crop_pct == view.crop_ratio
        assert config.interpolation == view.interpolation


# Variants


@pytest.mark.parametrize("name", VARIANTS)
def test_the_variants_of_table_1(name: str) -> None:
    assert variant_of(config_of(name)) == name
    side = 32 * VARIANTS[name]["patch_size"]
    # neither head, image size nor GELU matter
    assert variant_of(config_of(name, num_classes=0, image_size=side, gelu="erf", norm_eps=1e-5)) == name


def test_gsams_s_8() -> None:
    assert variant_of(config_of("S/16", patch_size=8)) == "S/8"
    assert any(checkpoint.variant == "S/8" for checkpoint in CHECKPOINTS)


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 11}, {"hidden_dim": 512}, {"tokens_mlp_dim": 385}, {"tokens_mlp_dim": 1536},
        {"channels_mlp_dim": 384, "tokens_mlp_dim": 3072}, {"patch_size": 8}, {"patch_size": (16, 32)},
        {"patch_size": (32, 16)}, {"image_size": (224, 448)}, {"image_size": (448, 224)},
    ],
    ids=str,
)  # fmt: skip
def test_other_sizes_have_no_name(options: dict) -> None:
    assert variant_of(config_of("B/16", **options)) is None


def test_candidates_have_the_sizes_and_the_classes() -> None:
    def files(name: str, classes: int, authors: bool, **options) -> set[str]:
        found = candidates(config_of(name, num_classes=classes, **options), authors=authors)
        assert all((c.variant, c.classes, c.authors) == (name, classes, authors) for c in found)
        return {checkpoint.file for checkpoint in found}

    b16 = {f"{folder}/Mixer-B_16.npz" for folder in ("imagenet1k", "sam", "gsam")}
    assert files("B/16", 1000, authors=True) == b16
    assert files("B/16", 21843, authors=True) == {"imagenet21k/Mixer-B_16.npz"}
    assert files("B/16", 1000, authors=False) == {
        "timm/mixer_b16_224.goog_in21k_ft_in1k",
        "timm/mixer_b16_224.miil_in21k_ft_in1k",
    }
    assert files("B/16", 11221, authors=False) == {"timm/mixer_b16_224.miil_in21k"}
    assert files("L/16", 1000, authors=True) == {"imagenet1k/Mixer-L_16.npz"}
    assert files("H/14", 1000, authors=True) == set()
    assert files("B/16", 10, authors=True) == files("B/16", 0, authors=False) == set()
    assert files("B/16", 1000, authors=True, image_size=448) == set()
    configs = {**{name: config_of(name) for name in VARIANTS}, "S/8": config_of("S/16", patch_size=8)}
    everything = {
        checkpoint.file
        for config in configs.values()
        for classes in SYNSETS
        for authors in (True, False)
        for checkpoint in candidates(config | {"num_classes": classes}, authors=authors)
    }
    assert everything == {checkpoint.file for checkpoint in CHECKPOINTS}
