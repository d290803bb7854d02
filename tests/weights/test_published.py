"""The table of published checkpoints agrees with the paper and timm, and class names with timm."""

import importlib.metadata
import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import allmlp
from allmlp.variants import VARIANTS, variant_of
from allmlp.weights.layouts import TIMM
from allmlp.weights.published import CHECKPOINTS, MIIL, SYNSETS, candidates, class_names, synset_names

SUBSETS = {1000: "imagenet-1k", 21843: "imagenet-21k-goog", 11221: "imagenet-21k-miil"}


def config_of(name: str | None, **options) -> dict:
    with torch.device("meta"):
        return allmlp.create(name, **options).config


# Class names


@pytest.mark.parametrize("classes", SUBSETS)
def test_names_are_timms_in_timms_order(classes: int) -> None:
    info = pytest.importorskip("timm.data").ImageNetInfo(SUBSETS[classes])
    names, synsets = class_names(classes), synset_names(classes)
    assert names is not None
    assert len(set(names)) == classes == info.num_classes()
    assert list(synsets) == info.label_names()
    assert tuple(synsets.values()) == names
    for i, (ours, synset) in enumerate(zip(names, synsets, strict=True)):
        theirs = info.index_to_description(i)
        assert ours in (theirs, f"{theirs} ({synset})"), i
        assert ours.strip() == ours != ""
        assert ours.isprintable()
    if classes == 1000:
        assert [names[i] for i in (0, 134, 517)] == ["tench, Tinca tinca", "crane (n02012849)", "crane (n03126707)"]


def test_where_names_are_not_known_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For other numbers, without timm, or with a timm without its data."""
    for classes in (0, 10, 1001, -1):
        assert (class_names(classes), synset_names(classes)) == (None, {})

    def distribution(name: str) -> SimpleNamespace:
        if not (tmp_path / "timm").exists():
            raise importlib.metadata.PackageNotFoundError(name)
        return SimpleNamespace(locate_file=lambda path: tmp_path / path)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    folder = tmp_path / "timm" / "data" / "_info"
    assert synset_names.__wrapped__(1000) == {}
    folder.mkdir(parents=True)
    assert synset_names.__wrapped__(1000) == {}
    for text in ("n1\nn2\n", "n1\n" * 1000):
        (folder / "imagenet_synsets.txt").write_text(text)
        (folder / "imagenet_synset_to_lemma.txt").write_text("n1\tone\n")
        assert synset_names.__wrapped__(1000) == {}


def test_timm_is_not_imported_for_its_names() -> None:
    program = (
        "import sys; from allmlp.weights import published; published.class_names(1000); print('timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"False\n"


# The table


def test_the_table_is_consistent() -> None:
    assert len({checkpoint.file for checkpoint in CHECKPOINTS}) == len(CHECKPOINTS)
    for checkpoint in CHECKPOINTS:
        assert checkpoint.classes in SYNSETS
        assert checkpoint.source
        assert checkpoint.image_size == 224
        assert checkpoint.top1 is None or (0.5 < checkpoint.top1 < 0.9 and checkpoint.classes == 1000)
        stem = checkpoint.file.rpartition("/")[2]
        letter, patch = checkpoint.variant.split("/")
        assert checkpoint.authors == (not checkpoint.file.startswith("timm/"))
        if checkpoint.authors:
            assert (stem, checkpoint.sha256) == (f"Mixer-{letter}_{patch}.npz", "")
            assert ("21k" in checkpoint.file) == (checkpoint.classes == 21843)
        else:
            assert stem.startswith(f"mixer_{letter.lower()}{patch}_224.")
            assert checkpoint.classes == (1000 if stem.endswith("ft_in1k") else 11221 if "miil" in stem else 21843)


def test_accuracies_are_those_of_the_paper_and_misleading_names_have_a_note() -> None:
    """Table 3: ImageNet alone, 300 epochs, Mixer-B/16 76.44 %, Mixer-L/16 71.76 %."""
    table = {c.file: c for c in CHECKPOINTS}
    for variant, accuracy in (("B", 0.7644), ("L", 0.7176)):
        scratch, untuned = table[f"imagenet1k/Mixer-{variant}_16.npz"], table[f"imagenet21k/Mixer-{variant}_16.npz"]
        assert (scratch.top1, untuned.top1) == (accuracy, None)
        assert all(score in untuned.note for score in ("80.64", "82.89"))
        misnamed = table[f"timm/mixer_{variant.lower()}16_224.goog_in21k_ft_in1k"]
        assert misnamed.data == scratch.data
        assert misnamed.top1 == pytest.approx(accuracy, abs=0.005)
    assert {c.file for c in CHECKPOINTS if "not fine-tuned from ImageNet-21k" in c.note} == {
        file for file in table if file.endswith("goog_in21k_ft_in1k")
    }


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
        assert len(ours[name].sha256) == 8
        assert config.url.endswith(f"-{ours[name].sha256}.pth")
        view = MIIL if "miil" in name else TIMM.preprocessing
        assert (config.mean, config.std, config.crop_pct) == (view.mean, view.std, view.crop_ratio)
        assert config.interpolation == view.interpolation


# Variants


def test_variants() -> None:
    for name, sizes in VARIANTS.items():
        options = {"num_classes": 0, "image_size": 32 * sizes["patch_size"], "gelu": "erf", "norm_eps": 1e-5}
        assert variant_of(config_of(name)) == variant_of(config_of(name, **options)) == name
    assert variant_of(config_of("S/16", patch_size=8)) == "S/8"
    for options in (
        {"num_blocks": 11}, {"hidden_dim": 512}, {"channels_mlp_dim": 384, "tokens_mlp_dim": 3072}, {"patch_size": 8},
        {"patch_size": (16, 32)}, {"image_size": (224, 448)}, {"image_size": (448, 224)},
    ):  # fmt: skip
        assert variant_of(config_of("B/16", **options)) is None


def test_candidates_have_the_sizes_and_the_classes() -> None:
    configs = {**{name: config_of(name) for name in VARIANTS}, "S/8": config_of("S/16", patch_size=8)}
    found = []
    for (name, config), classes, authors in itertools.product(configs.items(), [*SYNSETS, 10, 0], [True, False]):
        these = candidates(config | {"num_classes": classes}, authors=authors)
        assert all((c.variant, c.classes, c.authors) == (name, classes, authors) for c in these)
        found += [c.file for c in these]
    assert sorted(found) == sorted(c.file for c in CHECKPOINTS)
    assert candidates(config_of("B/16", num_classes=1000, image_size=448), authors=True) == []
