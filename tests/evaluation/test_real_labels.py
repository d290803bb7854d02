"""ImageNet-ReaL on a stand-in for its labels, by hand; and the labels that timm contains."""

import json
from pathlib import Path

import numpy as np
import pytest

from allmlp.errors import UserError
from allmlp.evaluation.real_labels import IMAGES, read_real_labels, score_real
from allmlp.weights.published import synset_names

pytest.importorskip("timm")
SYNSETS = synset_names(1000)
LABELS = {1: [5], 2: [7, 9], 3: [], 7: [9], IMAGES: [999]}
NAMES = [f"val/n0/ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 2, 3, 7, IMAGES)]
TRUE = [LABELS.get(i, []) for i in range(1, IMAGES + 1)]


def test_timm_has_the_labels() -> None:
    """46,837 images have labels, as the authors count."""
    labels = read_real_labels()
    assert labels is not None
    assert (len(labels), sum(map(bool, labels))) == (IMAGES, 46_837)


@pytest.mark.parametrize("classes", [list(SYNSETS), list(SYNSETS.values())], ids=["synsets", "names"])
def test_by_hand(classes: list[str]) -> None:
    """Right, right by its second label, without label, wrong, right."""
    found = score_real(NAMES, np.array([5, 9, 5, 3, 999]), classes, TRUE)
    assert found == (4, 3, 1)
    assert found is not None
    assert found.top1 == 3 / 4


def test_classes_in_another_order_and_among_others() -> None:
    """As a model of ImageNet-21k has them: a class beyond the 1,000 is wrong."""
    classes = ["n99999999", *reversed(SYNSETS)]
    predicted = np.array([1000 - i for i in (5, 9, 5, 9)] + [0])
    assert score_real(NAMES, predicted, classes, TRUE) == (4, 3, 1)


def test_other_images_and_other_classes() -> None:
    assert score_real(["a.jpg"], np.array([0]), list(SYNSETS), TRUE) is None
    assert score_real(["ILSVRC2012_val_00060000.JPEG"], np.array([0]), list(SYNSETS), TRUE) is None
    assert score_real(NAMES[:1], np.array([0]), ["cat", "dog"], TRUE) is None
    assert score_real(NAMES[2:3], np.array([0]), list(SYNSETS), TRUE) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[[1], [2]]", "2 entries, and ReaL has 50,000"),
        ("{", "cannot be read as JSON"),
        (json.dumps([[0]] * (IMAGES - 1) + [[1000]]), r"entry 49999 is \[1000\], not a list of classes from 0 to 999"),
        ("3", "holds 3"),
    ],
)
def test_a_file_that_is_not_reals(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "real.json"
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        read_real_labels(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"real\.json cannot be read"):
        read_real_labels(tmp_path / "real.json")
