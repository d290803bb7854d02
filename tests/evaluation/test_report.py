"""The report of a run: what it shows, what it omits, and that names in it are never interpreted as markup."""

import base64
import io
import re
import time
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from allmlp.evaluation.charts import downsample, extract_curve, smooth
from allmlp.evaluation.report import Example, data_uri, format_duration, wilson, write_report

VOID = {"meta", "img", "br", "hr", "link", "input"}
ATTACK = "<script>alert(1)</script>"
SUMMARY = {
    "model": "S/32",
    "parameters": 19_104_624,
    "data": "digits",
    "images": {"train": 1258, "val": 179, "test": 30},
    "steps": 200,
    "train_seconds": 75.2,
    "images_per_second": 5123.4,
    "peak_memory_bytes": 3 * 2**30,
    "val_top1": 0.9,
    "test_top1": 28 / 30,
    "seed": 2024,
    "started": "2026-01-01T12:00:00+00:00",
    "command": "mixer train digits --seed 2024",
    "versions": {"torch": "2.11.0"},
    "unreadable_images": 0,
    "unreadable": [],
}
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
    def call(**changes) -> Page:
        arguments = {
            "recipe": {"optimizer": {"learning_rate": 1e-3}},
            "summary": SUMMARY,
            "metrics": METRICS,
            "confusion": np.array([[9, 1, 0], [0, 10, 0], [1, 0, 9]]),
            "classes": ["a", "b", "c"],
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


def test_shows_the_run(write):
    page = write()
    assert {"training", "confusion", "per-class", "mistakes", "examples", "details"} <= set(page.ids)
    assert not {"unreadable", "no-confusion", "pairs"} & set(page.ids)
    assert page.tags.count("svg") == 4
    for text in ("93.33 %", "28 of 30 correct", "78.7–98.2\u00a0%", "19.1 M", "1 min 15 s", "5,123", "3.0 GiB", "2024",
                 "torch 2.11.0", "train 1,258 · val 179 · test 30", "mixer train digits --seed 2024",
                 '"learning_rate": 0.001', "✓ correct", "✗ wrong"):  # fmt: skip
        assert text in page.text, text


def test_charts_have_names_and_follow_the_page_colors(write):
    page = write()
    names = [value for key, value in page.attributes if key == "aria-label"]
    assert names[0] == "Loss by step: training from 2 to 0.01; validation from 0.3 to 0.3"
    assert len(names) == 4
    assert "currentColor" in page.source
    assert "var(--validation)" in page.source
    assert "#01020" not in page.source


def test_needs_no_network(write):
    source = re.sub(r'xmlns(:\w+)?="[^"]*"', "", write(examples=[example(size=(300, 200))]).source)
    assert "http:" not in source
    assert "https:" not in source
    assert not re.search(r"@import|<link|<script", source)
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
    assert set(names) <= set(dict.fromkeys(value for key, value in page.attributes if key == "title"))


def test_without_labels_says_why_there_is_no_matrix(write):
    page = write(confusion=None, mistakes=[], examples=[], summary=SUMMARY | {"test_top1": None})
    assert "no-confusion" in page.ids
    assert not {"confusion", "mistakes", "examples"} & set(page.ids)
    assert "no labeled test split" in page.text


def test_without_mistakes_says_so(write):
    assert "There are no mistakes on this split." in write(mistakes=[], confusion=np.eye(3, dtype=int)).text


def test_counts_belong_to_their_split(write):
    page = write(split="val", summary=SUMMARY | {"test_top1": None})
    assert "Confusion matrix, validation split" in page.text
    assert re.search(r"validation top-1\s*90.00 %\s*28 of 30 correct", page.text)


def test_lists_at_most_20_unreadable_images(write):
    page = write(summary=SUMMARY | {"unreadable_images": 25, "unreadable": [f"bad-{i:02d}.jpg" for i in range(25)]})
    assert "25 images could not be read" in page.text
    assert "bad-19.jpg" in page.text
    assert "bad-20.jpg" not in page.text
    assert "and 5 more" in page.text


@pytest.mark.parametrize(
    "summary", [{}, dict.fromkeys(SUMMARY), {k: float("nan") for k, v in SUMMARY.items() if isinstance(v, int | float)}]
)
def test_a_summary_without_values(write, summary):
    page = write(summary=summary | {"unreadable_images": None, "unreadable": None}, metrics=[], recipe={})
    assert "No measurements were recorded" in page.text
    assert "svg" not in page.tags
    assert "nan" not in page.text.lower()


@pytest.mark.parametrize(
    "metrics",
    [
        [{"step": 0, "loss": 0.0, "gradient_norm": 0.0, "learning_rate": 0.0}],
        [{"step": s, "loss": [None, float("nan"), float("inf"), 1.0][s % 4]} for s in range(500)],
        [{"step": s, "loss": None, "gradient_norm": float("nan")} for s in range(500)] + [{"step": 9, "val_top1": 0.5}],
        [{"step": s, "loss": 1.0, "gradient_norm": [0.0, 1.0][s % 2]} for s in range(3)],
        [{"epoch": 1.0, "loss": 1.0}, {"step": 5}, {"step": 7, "val_loss": 2.0}],
    ],
)
def test_gaps_in_the_records(write, metrics):
    page = write(metrics=metrics)
    assert "svg" in page.tags
    assert not re.search(r"\b(nan|inf)\b", page.source, re.IGNORECASE)


def test_nan_probability_and_empty_classes(write):
    lost = Example(image=Image.new("L", (3, 1)), name="x", label="a", predictions=(("b", float("nan")),))
    page = write(examples=[lost], confusion=np.zeros((3, 3), int))
    assert "nan" not in page.text.lower()
    assert "0 of 0 correct" in page.text


@pytest.mark.parametrize("number", [31, 200, 1000])
def test_many_classes_stay_small(write, number):
    generator = np.random.default_rng(0)
    confusion = generator.poisson(0.05, (number, number)) + np.diag(generator.integers(30, 50, number))
    confusion[3, 7] = 60
    start = time.perf_counter()
    page = write(confusion=confusion, classes=[f"class {i}" for i in range(number)])
    assert time.perf_counter() - start < 10
    assert len(page.source) < 5e6
    assert page.tags.count("svg") == 5
    pairs = re.search(r'id="pairs".*?</table>', page.source, re.DOTALL)[0]
    assert pairs.count("<tr>") == 21
    assert re.search(r"<tbody>\s*<tr><td>class 3</td><td>class 7</td><td class=\"number\">60</td>", pairs)


def test_thirty_classes_are_a_table(write):
    page = write(confusion=np.eye(30, dtype=int), classes=[f"class {i}" for i in range(30)])
    assert page.tags.count("svg") == 4
    assert page.source.count('class="hit') == 30


def test_per_class_scores_lowest_recall_first(write):
    page = write(confusion=np.array([[3, 1, 0], [0, 0, 0], [4, 0, 4]]))
    table = re.search(r'id="per-class".*?</table>', page.source, re.DOTALL)[0]
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in table.split("<tr>")[2:]]
    assert rows == [["c", "8", "50.0 %", "100.0 %"], ["a", "4", "75.0 %", "42.9 %"], ["b", "0", "—", "0.0 %"]]


def test_long_curves_are_downsampled_but_keep_their_spikes(write):
    values = np.sin(np.arange(100_000) / 5000)
    values[77_777], values[500:510] = 99, np.nan
    kept = downsample(values)
    assert 77_777 in kept
    assert len(kept) <= 2000
    assert (np.diff(kept) > 0).all()
    page = write(metrics=[{"step": i, "loss": float(v), "gradient_norm": 1.0} for i, v in enumerate(values)])
    assert len(page.source) < 400_000


def test_smooth_is_a_centred_mean_that_keeps_gaps():
    line = np.arange(400.0)
    line[200] = np.nan
    result = smooth(line)
    assert np.isnan(result[200])
    np.testing.assert_allclose(result[10:190], line[10:190])
    np.testing.assert_array_equal(smooth(np.array([3.0, np.nan, 5.0])), [3, np.nan, 5])


def test_a_resumed_run_draws_each_step_once():
    steps, values = extract_curve([{"step": s, "loss": v} for s, v in ((1, 4.0), (2, 3.0), (3, 2.0), (2, 2.5))], "loss")
    assert steps.tolist() == [1, 2, 3]
    assert values.tolist() == [4, 2.5, 2]


def test_a_failed_write_leaves_the_old_report(write, tmp_path):
    before = write().source
    with pytest.raises(TypeError):
        write(recipe={("a", "tuple"): 1})
    assert (tmp_path / "report.html").read_text("utf-8") == before
    assert write().source == before  # the same run gives the same file


@pytest.mark.parametrize(
    ("size", "kind", "shown"),
    [((8, 8), "png", (128, 128)), ((32, 32), "png", (128, 128)), ((28, 20), "png", (112, 80)),
     ((100, 90), "jpeg", (100, 90)), ((640, 480), "jpeg", (160, 120)), ((1, 1000), "jpeg", (1, 160))],
)  # fmt: skip
def test_thumbnails(size, kind, shown):
    head, _, data = data_uri(Image.new("RGB", size)).partition(",")
    assert head == f"data:image/{kind};base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == shown


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # by hand: z² = 3.84146; (8, 10): center 0.99207 / 1.38415, half 0.31361 / 1.38415
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962), (0, 0, 0, 1)],
)
def test_wilson(correct, total, low, high):
    assert wilson(correct, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.9, "59.9 s"),
        (61, "1 min 1 s"),
        (59.97, "1 min 0 s"),
        (3599.7, "1 h 0 min"),
        (7260, "2 h 1 min"),
    ],
)
def test_duration(seconds, text):
    assert format_duration(seconds) == text
