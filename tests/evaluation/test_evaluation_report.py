"""The page of an evaluation shows the numbers of its results, and names as text."""

import re
from pathlib import Path

from made_results import classified

from allmlp.evaluation.comparison import compare_all
from allmlp.evaluation.pages.evaluation_report import Evaluated, write_evaluation_report

ATTACK = "<script>alert(1)</script>"
LABELS = [0] * 6 + [1] * 3 + [2]
A = classified(LABELS, [0] * 6 + [1, 1, 0, 2], [0.8] * 10, classes=(ATTACK, "b", "c"))
B = classified(LABELS, [0] * 10, [0.6] * 10, classes=(ATTACK, "b", "c"))


def text_of(path: Path, *results) -> str:
    named = [Evaluated(name, result) for name, result in zip(("<one>", "two"), results, strict=False)]
    write_evaluation_report(path, named, compare_all(list(results)), "test split of somewhere")
    page = path.read_text("utf-8")
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    return " ".join(re.sub(r"<[^>]+>", " ", page[page.index("<body>") :]).split()).replace("\u00a0", " ")


def test_one_model(tmp_path: Path) -> None:
    text = text_of(tmp_path / "page.html", A)
    assert "90.00 % 95 % interval" in text  # top-1
    assert "88.89 %" in text  # (1 + 2/3 + 1) / 3
    assert "60.0 % top-1 of always answering" in text
    assert "10.0 % between probability and accuracy" in text
    assert "not certainly better than always answering" in text  # p = 2 / 2³
    assert "Differences" not in text
    assert text.count("✗ wrong") == 1


def test_two_models(tmp_path: Path) -> None:
    text = text_of(tmp_path / "page.html", A, B)
    assert "2 models on the same images" in text
    assert "+30.00 %" in text
    assert "3 0 0.25" in text  # only the first, only the second, McNemar's p
    assert "two is no better than always answering" in text
    assert text.count("Reliability") == 0  # the diagrams' titles are their labels, not text
    assert (tmp_path / "page.html").read_text("utf-8").count("Reliability diagram") == 2
