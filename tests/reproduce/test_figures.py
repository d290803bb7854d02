"""The figures: which points they show, and that their pictures can be read."""

import itertools
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import pytest
import torch
from made_speeds import made_speeds
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from PIL import Image

from allmlp.errors import UserError
from allmlp.reproduce.figures import charts
from allmlp.reproduce.figures.contents import figure2_left, figure3, pictures, rows_of_figure_3
from allmlp.reproduce.figures.labels import Label, overlap, place_labels, text_box
from allmlp.reproduce.outputs import check_folder, describe_machine, write_table
from allmlp.reproduce.speeds import SpeedOptions
from allmlp.reproduce.tables.comparison import plan
from allmlp.reproduce.tables.table import Table


@pytest.fixture(scope="module")
def scales() -> Table:
    rows = rows_of_figure_3()
    return figure3(made_speeds(*plan(rows), SpeedOptions()), rows, {})


def test_the_frontier_is_the_one_that_the_caption_names() -> None:
    """ "Mixer … sits on frontier with HaloNet, ViT, NFNet, and MPL"."""
    rows = [row for row in figure2_left().rows if row["frontier"] == "yes"]
    assert {row["model"].partition("-")[0] for row in rows} == {"Mixer", "HaloNet", "ViT", "NFNet", "MPL"}


def test_figure_2_has_table_2_and_the_three_that_the_text_adds() -> None:
    labels = [row["label"] for row in figure2_left().rows]
    assert len(labels) == len(set(labels)) == 13
    assert {"BiT-R200x3", "ViT-L/16 (JFT)", "ViT-L/16 (21k)", "Mixer-L/16 (JFT)", "Mixer-L/16 (21k)"} <= set(labels)


def test_figure_3_has_the_three_families_at_224(scales: Table) -> None:
    assert {row["image_size"] for row in scales.rows} == {224}
    assert {row["data"] for row in scales.rows} == {"JFT-300M"}
    assert {charts.family_of(row) for row in scales.rows} == {"mixer", "bit", "vit"}
    labels = [row["label"] for row in scales.rows if charts.family_of(row) == "mixer"]
    assert len(labels) == len(set(labels)) == 8


def boxes(figure: Figure) -> list:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    return [[text_box(text, renderer) for text in axes.texts if isinstance(text, Annotation)] for axes in figure.axes]


@pytest.mark.parametrize("name", ["figure2-left", "figure3", "figure3-measured"])
def test_no_label_covers_another(scales: Table, name: str) -> None:
    drawn = pictures(figure2_left(), "cpu") | pictures(scales, "cpu")
    for labels in boxes(drawn[name]):
        assert len(labels) >= 13
        for first, second in itertools.combinations(labels, 2):
            assert overlap(first, second) == 0


def test_labels_keep_off_one_another_in_a_crowd() -> None:
    figure = Figure(figsize=(5, 4), dpi=100)
    axes = figure.add_subplot(xlim=(0, 10), ylim=(0, 10))
    points = [(5 + 0.15 * (i % 3), 5 + 0.2 * (i // 3)) for i in range(6)]
    place_labels(axes, [Label(x, y, f"model {i}", "black") for i, (x, y) in enumerate(points)])
    (labels,) = boxes(figure)
    assert len(labels) == 6
    for first, second in itertools.combinations(labels, 2):
        assert overlap(first, second) == 0


def test_there_is_no_measured_picture_without_measurements() -> None:
    table = figure3(None, rows_of_figure_3(), {})
    assert list(pictures(table, "cpu")) == ["figure3"]


def test_files_of_a_figure(scales: Table, tmp_path: Path) -> None:
    before = {key: value for key, value in matplotlib.rcParams.items() if key != "backend"}
    machine = describe_machine(torch.device("cpu"))
    found = write_table(scales, pictures(scales, "cpu"), machine, tmp_path / "new" / "out")
    assert {key: value for key, value in matplotlib.rcParams.items() if key != "backend"} == before
    names = sorted(Path(file).name for file in found["files"])
    assert names == sorted(path.name for path in (tmp_path / "new" / "out").iterdir())
    assert names == ["figure3-measured.png", "figure3-measured.svg", "figure3.csv", "figure3.json", "figure3.png",
                     "figure3.svg"]  # fmt: skip
    with Image.open(tmp_path / "new" / "out" / "figure3.png") as image:
        assert len(image.convert("RGB").resize((200, 100)).getcolors(20_000) or []) > 10
    svg = (tmp_path / "new" / "out" / "figure3.svg").read_text(encoding="utf-8")
    ElementTree.fromstring(svg)
    for row in scales.rows:
        assert f">{row['label']}<" in svg
    write_table(scales, pictures(scales, "cpu"), machine, tmp_path / "again")
    assert (tmp_path / "again" / "figure3.svg").read_text(encoding="utf-8") == svg


def test_a_folder_that_cannot_be_one_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    check_folder(tmp_path / "a" / "b")
    for out in (tmp_path / "file", tmp_path / "file" / "b"):
        with pytest.raises(UserError, match=r"--out .*: .*file is a file, so name a folder"):
            check_folder(out)
