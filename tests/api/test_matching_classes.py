"""Which of a model's classes a class folder is: by name, by number, by position."""

import numpy as np
import pytest

import allmlp
from allmlp.api.evaluate import match_classes
from allmlp.data.dataset import ImageDataset
from allmlp.data.stores import ArrayStore
from allmlp.errors import UserError
from allmlp.metadata import Metadata
from allmlp.model import Mixer


def model(count: int, names: tuple[str, ...] | None) -> Mixer:
    sizes = {"patch_size": 8, "num_blocks": 1, "hidden_dim": 8, "tokens_mlp_dim": 4, "channels_mlp_dim": 8}
    made = allmlp.create(num_classes=count, image_size=16, **sizes)
    made.metadata = Metadata(classes=names)
    return made


def dataset(*classes: str) -> ImageDataset:
    """One image of each class."""
    names = tuple(map(str, range(len(classes))))
    store = ArrayStore(np.zeros((len(classes), 4, 4, 3), np.uint8), names)
    return ImageDataset(store=store, names=names, labels=np.arange(len(classes)), classes=classes)


TWELVE = tuple(sorted(map(str, range(12))))  # 0, 1, 10, 11, 2, …


@pytest.mark.parametrize(
    ("count", "names", "folders", "labels", "said"),
    [
        (12, None, TWELVE, [int(name) for name in TWELVE], "numbers"),
        (1000, None, ("3", "700", "9"), [3, 700, 9], "numbers"),
        (12, None, ("000", "007", "010"), [0, 7, 10], "numbers"),
        (3, ("cat", "dog", "fly"), ("0", "2"), [0, 2], "numbers"),
        (3, ("cat", "dog", "fly"), ("fly", "cat"), [2, 0], ""),
        (3, ("2", "1", "0"), ("0", "2"), [2, 0], ""),  # names of its own that are numbers
        (11, None, ("1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9"), [0, 9, 10, *range(1, 9)], "by position"),
        (2, None, ("blue", "red"), [0, 1], "by position"),
        (2, None, ("1", "red"), [0, 1], "by position"),
    ],
)
def test_labels_are_positions_of_the_models_classes(
    count: int,
    names: tuple[str, ...] | None,
    folders: tuple[str, ...],
    labels: list[int],
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = match_classes(dataset(*folders), model(count, names), folders)
    assert found.labels.tolist() == labels
    assert len(found.classes) == count
    assert len(caplog.messages) == bool(said)
    assert said in "".join(caplog.messages)


@pytest.mark.parametrize(
    ("count", "names", "folders", "said"),
    [
        (3, None, ("0", "3"), "do not name their 3 classes"),
        (3, None, ("01", "1"), "do not name their 3 classes"),
        (3, ("cat", "dog", "fly"), ("0", "3"), "'0', '3'.*rename"),
        (3, ("cat", "dog", "fly"), ("0", "dog"), "'0'.*rename"),
    ],
)
def test_folders_that_match_nothing(count: int, names: tuple[str, ...] | None, folders: tuple, said: str) -> None:
    with pytest.raises(UserError, match=said):
        match_classes(dataset(*folders), model(count, names), folders)
