"""The report of a run: what it shows, what it omits, and that names in it are never interpreted as markup."""

import base64
import io
import re
import time
import tracemalloc
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from made_results import classified, with_confusion
from matplotlib.axes import Axes
from PIL import Image

from allmlp.cli.commands.evaluate import print_result
from allmlp.evaluation.pages.charts import downsample, draw_confusion_image, extract_curve, smooth
from allmlp.evaluation.pages.examples import Example, choose_examples
from allmlp.evaluation.pages.report import write_report
from allmlp.evaluation.scores import to_json_object
from allmlp.pages.page import data_uri, format_duration

VOID = {"meta", "img", "br", "hr", "link", "input"}
ATTACK = "<script>alert(1)</script>"
SUMMARY = {
    "model": "S/32", "parameters": 19_104_624, "data": "digits", "images": {"train": 1258, "val": 179, "test": 30},
    "steps": 200, "train_seconds": 75.2, "images_per_second": 5123.4, "peak_memory_bytes": 3 * 2**30, "val_top1": 0.9,
    "test_top1": 28 / 30, "seed": 2024, "started": "2026-01-01T12:00:00+00:00",
    "command": "mixer train digits --seed 2024", "versions": {"torch": "2.11.0"}, "unreadable_images": 0,
    "unreadable": [],
}  # fmt: skip
METRICS = [
    {"step": s, "epoch": s / 20, "loss": 2 / s, "learning_rate": 1e-3, "gradient_norm": 1.0} for s in range(1, 201)
] + [{"step": s, "epoch": s / 20, "val_top1": 0.9, "val_loss": 0.3} for s in (100, 200)]


class Page(HTMLParser):
    """Checks that tags are balanced and ids are unique; collects tags, attributes and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.open, self.tags, self.attributes, self.ids, self.text = [], [], [], [], ""
        self.feed(self.source)
        self.close()
        assert not self.open
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def example(label: str = "a", predicted: str = "a", *, name: str = "x.png", size=(8, 8)) -> Example:
    return Example(image=Image.new("RGB", size), name=name, label=label, predictions=((predicted, 0.9), ("c", 0.1)))


@pytest.fixture
def write(tmp_path):
    def call(confusion=((9, 1, 0), (0, 10, 0), (1, 0, 9)), classes=("a", "b", "c"), **changes) -> Page:
        arguments = {
            "recipe": {"optimizer": {"learning_rate": 1e-3}},
            "summary": SUMMARY,
            "metrics": METRICS,
            "result": with_confusion(np.array(confusion), classes),
            "examples": [example()],
            "mistakes": [example("a", "b")],
            "split": "test",
        }
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            write_report(tmp_path / "report.html", **arguments | changes)
        assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
        return Page(tmp_path / "report.html")

    return call


def rows(page: Page, table: str) -> list[list[str]]:
    """The text of the cells of a table's body."""
    found = re.search(rf'id="{table}".*?<tbody>(.*?)</table>', page.source, re.DOTALL)
    assert found
    return [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in found[1].split("<tr>")[1:]]


def test_shows_the_run_without_a_network(write):
    page = write(examples=[example(size=(300, 200))])
    assert {"training", "confusion", "per-class", "mistakes", "examples", "details"} <= set(page.ids)
    assert not {"unreadable", "no-confusion", "pairs"} & set(page.ids)
    for text in ("93.33 %", "28 of 30 correct", "78.7–98.2\u00a0%", "19.1 M", "1 min 15 s", "5,123", "3.0 GiB", "2024",
                 "torch 2.11.0", "train 1,258 · val 179 · test 30", "mixer train digits --seed 2024",
                 '"learning_rate": 0.001', "✓ correct", "✗ wrong", "per_class.csv"):  # fmt: skip
        assert text in page.text, text
    names = [value for key, value in page.attributes if key == "aria-label"]
    assert names[0] == "Loss by step: training from 2 to 0.01; validation from 0.3 to 0.3"
    assert len(names) == page.tags.count("svg") == 4
    assert "currentColor" in page.source  # charts have the colors of the page
    assert "var(--validation)" in page.source
    assert "#01020" not in page.source
    source = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page.source)
    assert not re.search(r"https?:|@import|<link|<script", source)
    for target in re.findall(r'(?:src|href)="([^"]*)"', source) + re.findall(r"url\(([^)]*)\)", source):
        assert target.startswith(("data:image/", "#"))
    assert "default-src 'none'" in source


def test_names_are_text_not_markup(write):
    names = [ATTACK, '" onload="x', "$\\frac{"]
    hostile = example(ATTACK, names[1], name=f"{ATTACK}.png")
    summary = SUMMARY | {"model": ATTACK, "data": ATTACK, "device": ATTACK, "command": ATTACK, ATTACK: ATTACK}
    summary |= {"unreadable_images": 1, "unreadable": [f"{ATTACK}\udcff.png"]}
    page = write(classes=names, examples=[hostile], mistakes=[hostile], summary=summary, recipe={ATTACK: ATTACK})
    assert "script" not in page.tags
    assert "onload" not in dict(page.attributes)
    assert page.text.count(ATTACK) > 10
    assert f"{ATTACK}\\udcff.png" in page.text  # a file name that is not UTF-8
    assert set(names) <= {value for key, value in page.attributes if key == "title"}


def test_says_what_is_missing(write):
    page = write(result=None, mistakes=[], examples=[], summary=SUMMARY | {"test_top1": None})
    assert "no-confusion" in page.ids
    assert not {"confusion", "mistakes", "examples"} & set(page.ids)
    assert "no labeled test split" in page.text
    page = write(mistakes=[], split="val", summary=SUMMARY | {"test_top1": None})
    assert "There are no mistakes on this split." in page.text
    assert "Confusion matrix, validation split" in page.text
    assert re.search(r"validation top-1\s*90.00 %\s*28 of 30 correct", page.text)
    page = write(summary=SUMMARY | {"unreadable_images": 25, "unreadable": [f"bad-{i:02d}.jpg" for i in range(25)]})
    assert re.findall(r"bad-\d\d", page.text) == [f"bad-{i:02d}" for i in range(20)]
    assert "25 images could not be read" in page.text
    assert "and 5 more" in page.text


@pytest.mark.parametrize(
    "summary", [{}, {key: float("nan") for key, v in SUMMARY.items() if isinstance(v, int | float)}]
)
def test_a_summary_without_values(write, summary):
    page = write(summary=summary | {"unreadable_images": None, "model": None}, metrics=[], recipe={})
    assert "No measurements were recorded" in page.text
    assert "svg" not in page.tags
    assert "nan" not in page.text.lower()


@pytest.mark.parametrize(
    "metrics",
    [
        [{"step": 0, "loss": 0.0, "gradient_norm": 0.0, "learning_rate": 0.0}],
        [{"step": s, "loss": [None, float("nan"), float("inf"), 1.0][s % 4]} for s in range(500)],
        [{"step": s, "loss": None, "gradient_norm": [0.0, float("nan")][s % 2]} for s in range(9)] + [METRICS[-1]],
        [{"epoch": 1.0, "loss": 1.0}, {"step": 5}, {"step": 7, "val_loss": 2.0}],
    ],
)
def test_gaps_in_the_records(write, metrics):
    lost = Example(image=Image.new("L", (3, 1)), name="x", label="a", predictions=(("b", float("nan")),))
    page = write(metrics=metrics, examples=[lost])
    assert "svg" in page.tags
    assert not re.search(r"\b(nan|inf)\b", page.source, re.IGNORECASE)


@pytest.mark.parametrize("number", [30, 31, 251])
def test_confusion_and_scores(write, number):
    confusion = np.diag(np.arange(number) + 1)
    confusion[3, 7], confusion[5, 6], confusion[8, 8] = 60, 2, 0
    page = write(confusion=confusion, classes=[f"class {i}" for i in range(number)])
    correct, images, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    recall = {k: correct[k] / images[k] if images[k] else 2 for k in range(number)}
    expected = [
        [
            f"class {k}",
            str(images[k]),
            *("—" if not n else f"{100 * correct[k] / n:.1f} %" for n in (images[k], predicted[k])),
        ]
        for k in sorted(recall, key=recall.__getitem__)
    ]
    scores = rows(page, "per-class")
    if number <= 30:
        assert scores == expected
        assert page.source.count('class="hit') == 30
        assert ">60</td>" in page.source
    else:
        assert [row[1:] for row in scores] == expected
        assert rows(page, "pairs") == [["class 3", "class 7", "60", "93.8 %"], ["class 5", "class 6", "2", "25.0 %"]]
        assert page.tags.count("svg") == 5
        assert ("blocks of 2" in page.source) == (number > 250)


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(arrays(np.int64, st.integers(2, 6).map(lambda n: (n, n)), elements=st.integers(0, 3)).filter(np.any))
def test_counts_are_those_of_the_matrix(confusion):
    result = with_confusion(confusion)
    matrix = np.zeros_like(confusion)
    matrix[result.confusion_counts[:, 0], result.confusion_counts[:, 1]] = result.confusion_counts[:, 2]
    assert (matrix == confusion).all()
    assert (result.confusion_counts[:, 2] > 0).all()
    for k, score in enumerate(result.per_class()):
        assert score.images == confusion[k].sum()
        assert score.recall == (confusion[k, k] / confusion[k].sum() if confusion[k].any() else None)
        assert score.precision == (confusion[k, k] / confusion[:, k].sum() if confusion[:, k].any() else None)


def test_a_block_of_the_confusion_image_adds_the_counts_of_its_classes(monkeypatch):
    shown = []
    monkeypatch.setattr(Axes, "imshow", lambda axes, pixels, **options: shown.append(pixels))
    draw_confusion_image(np.array([[0, 1, 3], [1, 2, 1], [2, 2, 7]]), 500)
    (pixels,) = shown
    assert pixels.shape == (250, 250, 4)
    assert {tuple(cell): pixels[*cell, 3] for cell in np.argwhere(pixels[..., 3])} == {
        (0, 0): np.sqrt(3 / 4),
        (0, 1): np.sqrt(1 / 4),
        (1, 1): 1,
    }


def test_the_classes_of_imagenet21k(write, capsys, monkeypatch):
    """Nothing takes memory for every pair of 21,843 classes, and neither page nor terminal shows every class."""
    rng, number = np.random.default_rng(0), 21_843
    labels = rng.integers(0, number, 100_000)
    labels[labels == 99] = 98
    predicted = np.where(rng.random(len(labels)) < 0.4, labels, rng.integers(0, number, len(labels)))
    result = classified(labels, predicted, classes=[f"n{i:08d} a name as long as they are" for i in range(number)])
    monkeypatch.setenv("COLUMNS", "200")  # so that a row takes one line
    tracemalloc.start()
    try:
        start = time.process_time()
        page = write(result=result)
        choose_examples(result)
        described = to_json_object(result)
        print_result(result, "test split", "--json lists all")
        seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seconds < 30  # tracemalloc makes it ten times as slow
    assert peak < 200e6
    assert len(page.source) < 2e6
    assert len(rows(page, "per-class")) == 1000
    assert "20,843 of 21,843 classes" in page.text
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 60
    assert "20 of 21,843 classes" in out
    assert sum(count for _, _, count in described["confusion_counts"]) == len(labels)
    assert described["per_class"][99]["recall"] is None


def test_curves(write):
    """Long ones are downsampled but keep their spikes; the mean is centered and keeps gaps; each step is drawn once."""
    values = np.sin(np.arange(100_000) / 5000)
    values[77_777], values[500:510] = 99, np.nan
    kept = downsample(values)
    assert 77_777 in kept
    assert len(kept) <= 2000
    assert (np.diff(kept) > 0).all()
    page = write(metrics=[{"step": i, "loss": float(v), "gradient_norm": 1.0} for i, v in enumerate(values)])
    assert len(page.source) < 400_000
    line = np.arange(400.0)
    line[200] = np.nan
    assert np.isnan(smooth(line)[200])
    np.testing.assert_allclose(smooth(line)[10:190], line[10:190])
    np.testing.assert_array_equal(smooth(np.array([3.0, np.nan, 5.0])), [3, np.nan, 5])
    resumed = extract_curve([{"step": s, "loss": v} for s, v in ((1, 4.0), (2, 3.0), (3, 2.0), (2, 2.5))], "loss")
    assert [list(axis) for axis in resumed] == [[1, 2, 3], [4, 2.5, 2]]


def test_a_failed_write_leaves_the_old_report(write, tmp_path):
    before = write().source
    with pytest.raises(TypeError):
        write(recipe={("a", "tuple"): 1})
    assert (tmp_path / "report.html").read_text("utf-8") == before
    assert write().source == before  # the same run gives the same file


@pytest.mark.parametrize(
    ("size", "kind", "shown"),
    [((8, 8), "png", (128, 128)), ((28, 20), "png", (112, 80)), ((100, 90), "jpeg", (100, 90)),
     ((640, 480), "jpeg", (160, 120)), ((1, 1000), "jpeg", (1, 160))],
)  # fmt: skip
def test_thumbnails(size, kind, shown):
    head, _, data = data_uri(Image.new("RGB", size)).partition(",")
    assert head == f"data:image/{kind};base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == shown


def test_duration():
    seconds = {
        0.04: "0.0 s",
        59.9: "59.9 s",
        61: "1 min 1 s",
        59.97: "1 min 0 s",
        3599.7: "1 h 0 min",
        7260: "2 h 1 min",
    }
    assert {number: format_duration(number) for number in seconds} == seconds
