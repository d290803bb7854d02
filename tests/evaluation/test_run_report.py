"""Which images a report shows, and the example files of a run."""

from pathlib import Path

import numpy as np
from PIL import Image

from allmlp.data.dataset import ImageDataset
from allmlp.data.sources import load_source
from allmlp.data.stores import ArrayStore
from allmlp.evaluation.classification import Classification
from allmlp.evaluation.run_report import choose_examples, find_mistakes, make_example, save_examples


def result(labels: list[int], predicted: list[int], sure: list[float], classes=("a", "b", "c")) -> Classification:
    """Every second image of the dataset is readable, so that rows and indices differ."""
    count = len(labels)
    names = tuple(f"{i}.png" for i in range(2 * count))
    pixels = np.arange(2 * count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    dataset = ImageDataset(
        store=ArrayStore(pixels, names), names=names, labels=np.repeat(labels, 2), classes=tuple(classes)
    )
    best = np.stack([predicted, (np.array(predicted) + 1) % 3], axis=1)
    return Classification(
        dataset=dataset,
        indices=np.arange(count) * 2 + 1,
        labels=np.array(labels),
        best=best,
        probabilities=np.stack([np.array(sure), 1 - np.array(sure)], axis=1).astype(np.float32),
        loss=1.0,
        unreadable={},
    )


RESULT = result([0, 0, 0, 1, 1, 2], [0, 1, 0, 1, 2, 0], [0.9, 0.6, 0.7, 0.8, 0.95, 0.6])


def test_examples_cover_every_class_before_any_class_repeats() -> None:
    assert choose_examples(RESULT) == [0, 3, 5, 1, 4, 2]
    assert choose_examples(RESULT, 4) == [0, 3, 5, 1]


def test_the_most_confident_mistakes_come_first() -> None:
    assert find_mistakes(RESULT) == [4, 1, 5]  # of 0.6 and 0.6, the earlier image first
    assert find_mistakes(RESULT, 1) == [4]
    assert find_mistakes(result([0, 1], [0, 1], [0.9, 0.9])) == []


def test_an_example_is_the_image_of_its_row() -> None:
    shown = make_example(RESULT, 4)
    assert shown.name == "9.png"
    assert np.asarray(shown.image).max() == 9
    assert shown.label == "b"
    assert [name for name, _ in shown.predictions] == ["c", "a"]
    np.testing.assert_allclose([p for _, p in shown.predictions], [0.95, 0.05], atol=1e-6)


def test_examples_as_files(tmp_path: Path) -> None:
    named = result([0, 1], [0, 1], [0.9, 0.9], classes=("../up/and away", "ümlaut: " + "x" * 300, "c"))
    save_examples(tmp_path / "examples", named, [1, 0])
    files = sorted(path.name for path in (tmp_path / "examples").iterdir())
    assert files[1] == "1-___up_and away.png"
    assert files[0].startswith("0-ümlaut_ xxx")
    assert len(files[0].encode()) < 255
    with Image.open(tmp_path / "examples" / files[0]) as image:
        assert image.mode == "RGB"
        assert np.asarray(image).max() == 3  # the second readable image is the fourth of the dataset


def test_the_examples_of_a_run_were_never_trained_on(digits_run) -> None:
    files = sorted((digits_run.out / "examples").iterdir())
    assert [path.name for path in files] == [f"{i}-{i}.png" for i in range(8)]
    source = load_source("digits")
    test = source.split("test")
    for path in files:
        label = int(path.stem.split("-")[1])
        with Image.open(path) as image:
            shown = np.asarray(image)
        found = [i for i in range(len(test)) if np.array_equal(np.asarray(test.read(i)), shown)]
        assert any(test.labels[i] == label for i in found)


def test_the_report_of_a_run_shows_its_test_images(digits_run) -> None:
    page = (digits_run.out / "report.html").read_text()
    test = load_source("digits").split("test")
    assert sum(name in page for name in test.names) >= 24
    assert not any(name in page for name in load_source("digits").split("train").names)
