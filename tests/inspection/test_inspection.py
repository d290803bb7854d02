"""What is found in a data set with planted problems, and what the page says of it."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import write_tree

from allmlp.data.sources import load_source
from allmlp.files import to_json
from allmlp.inspection.contents import Contents, inspect
from allmlp.inspection.dedup import find_removals
from allmlp.inspection.inspection_page import write_inspection_page

pytest.importorskip("imagehash")


def photograph(seed: int, side: int = 64) -> Image.Image:
    """Smooth random shapes, as photographs have."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PHOTOS = [photograph(seed) for seed in range(12)]
FILES = {f"train/cat/{i}.png": encoded(PHOTOS[i]) for i in range(4)}
FILES |= {f"train/dog/{i}.png": encoded(PHOTOS[i]) for i in range(4, 6)}
FILES |= {f"test/{'cat' if i < 8 else 'dog'}/{i}.png": encoded(PHOTOS[i]) for i in range(6, 10)}
FILES |= {
    "test/cat/same.png": encoded(PHOTOS[0]),  # the same file
    "train/dog/pixels.bmp": encoded(PHOTOS[1], "BMP"),  # the same pixels under another class
    "test/dog/small.jpg": encoded(PHOTOS[4].resize((40, 40)), "JPEG", quality=80),  # looks the same
    "train/cat/gray.png": encoded(PHOTOS[10].convert("L").resize((32, 90))),
    "train/cat/broken.png": b"this is no picture",
    "train/cat/notes.txt": b"",
    "train/cat/<b>.png": encoded(PHOTOS[11]),
}


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> Contents:
    root = write_tree(tmp_path_factory.mktemp("inspected") / "data", FILES)
    done: list[tuple[int, int]] = []
    found = inspect(load_source(str(root), val_fraction=0, test_fraction=0), lambda *numbers: done.append(numbers))
    assert done[-1] == (16, 16)
    return found


def test_what_was_planted_is_found(contents: Contents) -> None:
    found = {(one.kind, one.first.name, one.second.name) for one in contents.duplicates()}
    assert found == {
        ("same file", "train/cat/0.png", "test/cat/same.png"),
        ("same pixels", "train/cat/1.png", "train/dog/pixels.bmp"),
        ("looks the same", "train/dog/4.png", "test/dog/small.jpg"),
    }
    by_kind = {one.kind: one for one in contents.duplicates()}
    assert by_kind["same file"].across_parts
    assert not by_kind["same file"].two_classes
    assert by_kind["same pixels"].two_classes
    assert not by_kind["same pixels"].across_parts
    assert (by_kind["looks the same"].second.part, by_kind["looks the same"].second.label) == ("test", "dog")


def test_counts(contents: Contents) -> None:
    found = json.loads(to_json(contents.to_json_object()))
    assert found["parts"] == {"train": {"cat": 7, "dog": 3}, "test": {"cat": 3, "dog": 3}}
    assert (found["images"], found["largest_class"], found["commonest_share"]) == (16, "cat", 10 / 16)
    assert found["imbalance"] == pytest.approx(10 / 6)
    assert found["sizes"] == {"width": [32, 64, 64], "height": [40, 64, 90]}
    assert found["kinds"] == {"PNG, RGB": 12, "BMP, RGB": 1, "JPEG, RGB": 1, "PNG, L": 1}
    assert list(found["unreadable"]) == ["train/cat/broken.png"]
    assert found["left_out"] == {".txt": 1}
    assert found["duplicates"]["counts"]["same pixels"] == {"pairs": 1, "across_parts": 0, "two_classes": 1}
    assert (len(found["duplicates"]["pairs"]), found["duplicates"]["groups"]) == (3, 3)


def test_the_page(contents: Contents, tmp_path: Path) -> None:
    write_inspection_page(tmp_path / "page.html", contents)
    page = (tmp_path / "page.html").read_text("utf-8")
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "<b>" not in page
    text = " ".join(re.sub(r"<[^>]+>", " ", page[page.index("<body>") :]).split())
    assert "same file, across parts" in text
    assert "same pixels, two classes" in text
    assert "1 image cannot be read" in text
    assert "from 6 to 10 images" in text
    assert page.count("data:image/") == 2 * 3 + 6 + 6  # pairs, and examples of two classes


def test_images_to_remove(contents: Contents) -> None:
    train, test = contents.splits.split("train"), contents.splits.split("test")
    removals, tables = find_removals(train, [("here", test), ("again", test)], False, lambda *_: None)
    assert [(one.name, one.reason, one.source, one.match) for one in removals] == [
        ("train/cat/0.png", "same file", "here", "test/cat/same.png"),
        ("train/dog/4.png", "looks the same", "here", "test/dog/small.jpg"),
    ]
    assert [source for source, _ in tables] == ["", "here", "again"]
    exact, _ = find_removals(train, [("here", test)], True, lambda *_: None)
    assert [one.name for one in exact] == ["train/cat/0.png"]
