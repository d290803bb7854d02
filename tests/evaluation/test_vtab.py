"""VTAB's means against values worked out by hand."""

import math
from typing import Any

import pytest

from allmlp.config.vtab import TASKS
from allmlp.errors import UserError
from allmlp.evaluation.vtab import vtab_means

GROUPS = {
    "natural": ["caltech101", "cifar100", "dtd", "flowers102", "pets", "svhn", "sun397"],
    "specialized": ["pcam", "eurosat", "resisc45", "retinopathy"],
    "structured": [
        "clevr-count", "clevr-distance", "dmlab", "kitti-distance",
        "dsprites-location", "dsprites-orientation", "smallnorb-azimuth", "smallnorb-elevation",
    ],
}  # fmt: skip
HUNDREDTHS = {  # of top-1, in the order above
    "natural": [90, 60, 70, 99, 91, 85, 51],  # 546: a mean of 78
    "specialized": [80, 95, 85, 72],  # 332: 83
    "structured": [50, 60, 40, 80, 70, 55, 15, 30],  # 400: 50
}  # 1278 / 19 = 67.2632


def accuracies(seeds: tuple[int, ...] = (0,)) -> dict[str, list[float]]:
    """Of each seed: that of HUNDREDTHS and as many hundredths less."""
    return {
        task: [(value - less) / 100 for less in seeds]
        for group, tasks in GROUPS.items()
        for task, value in zip(tasks, HUNDREDTHS[group], strict=True)
    }


def test_the_groups_are_the_benchmarks() -> None:
    assert {name: [task for task, of in TASKS.items() if of.group == name] for name in GROUPS} == GROUPS
    assert len(TASKS) == 19


def test_means_by_hand() -> None:
    means = vtab_means(accuracies())
    expected = {"natural": 0.78, "specialized": 0.83, "structured": 0.50, "all": 12.78 / 19}
    assert {name: mean.top1 for name, mean in means.items()} == pytest.approx(expected, rel=1e-12)
    assert {name: (mean.tasks, mean.of) for name, mean in means.items()} == {
        "natural": (7, 7), "specialized": (4, 4), "structured": (8, 8), "all": (19, 19),
    }  # fmt: skip
    assert all(mean.complete and mean.std is None for mean in means.values())
    assert means["all"].top1 != pytest.approx((0.78 + 0.83 + 0.50) / 3)  # every task counts alike, not every group


def test_seeds() -> None:
    """Seeds that lie 0, 1 and 5 hundredths lower: their mean is 2, their variance (4 + 1 + 9) / 2."""
    means = vtab_means(accuracies((0, 1, 5)))
    assert means["all"].top1 == pytest.approx(12.78 / 19 - 0.02)
    assert means["all"].std == pytest.approx(math.sqrt(7) / 100)
    opposed = accuracies((0, 0)) | {"pcam": [0.70, 0.90], "eurosat": [0.99, 0.91]}
    assert vtab_means(opposed)["specialized"].std == pytest.approx(0.12 / 4 / math.sqrt(2))  # of the mean, not of tasks


def test_fewer_tasks_are_marked() -> None:
    some = {task: values for task, values in accuracies().items() if task in ("dtd", "pets", "dmlab")}
    means = vtab_means(some, allow_missing=True)
    assert means.keys() == {"natural", "structured", "all"}
    assert means["all"].to_json_object() == {
        "top1": pytest.approx((0.70 + 0.91 + 0.40) / 3), "std": None, "tasks": 3, "of": 19, "complete": False,
    }  # fmt: skip
    assert (means["natural"].top1, means["natural"].tasks, means["natural"].of) == (pytest.approx(0.805), 2, 7)
    assert not any(mean.complete for mean in means.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtd": None}, r"no accuracy of 1 of VTAB's 19 tasks \(dtd\)"),
        ({"dtd": None, "pets": None}, r"no accuracy of 2 of VTAB's 19 tasks \(dtd, pets\)"),
        ({"svnh": [0.5]}, r"VTAB has no task 'svnh': did you mean svhn\? there are caltech101, "),
        ({"dtd": [0.5, 0.6]}, "different numbers of seeds, or none .*dtd 2"),
        ({"dtd": []}, "different numbers of seeds, or none .*dtd 0"),
        ({"dtd": [float("nan")]}, "top-1 accuracy nan of dtd: must be between 0 and 1"),
        ({"dtd": [70.0]}, r"top-1 accuracy 70\.0 of dtd: must be between 0 and 1"),
    ],
)
def test_what_is_no_result(change: dict[str, Any], said: str) -> None:
    top1s = {task: values for task, values in (accuracies() | change).items() if values is not None}
    with pytest.raises(UserError, match=said):
        vtab_means(top1s)


def test_no_tasks_have_no_mean() -> None:
    with pytest.raises(UserError, match="none"):
        vtab_means({}, allow_missing=True)
