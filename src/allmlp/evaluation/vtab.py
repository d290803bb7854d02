"""The score of the Visual Task Adaptation Benchmark (Zhai et al. 2019): means over groups of tasks, and over all 19."""

import difflib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from allmlp.config.vtab import GROUPS, TASKS
from allmlp.errors import UserError

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean of tasks' top-1 accuracies, each task counting alike."""

    top1: float
    std: float | None  # over seeds (n − 1), of the mean that each seed has; None for a single seed
    tasks: int  # how many there are
    of: int  # how many the benchmark has

    @property
    def complete(self) -> bool:
        return self.tasks == self.of

    def to_json_object(self) -> dict[str, Any]:
        return {
            "top1": self.top1,
            "std": self.std,
            "tasks": self.tasks,
            "of": self.of,
            "complete": self.complete,
        }


def vtab_means(top1s: Mapping[str, Sequence[float]], *, allow_missing: bool = False) -> dict[str, Mean]:
    """The means of the groups and, under "all", of all tasks; the latter is the benchmark's score.

    Args:
        top1s: task → top-1 accuracy of each seed, between 0 and 1.
        allow_missing: accept fewer than the 19 tasks; the means that lack any are then not ``complete``, and a group
            without any has none.

    Raises:
        UserError: an unknown task, a missing one, different numbers of seeds, or an accuracy that is none.
    """
    check_names(top1s)
    if not allow_missing and (missing := [task for task in TASKS if task not in top1s]):
        raise UserError(
            f"no accuracy of {len(missing)} of VTAB's {len(TASKS)} tasks ({', '.join(missing)}): its score is the mean "
            "of all; run them too"
        )
    counts = {len(accuracies) for accuracies in top1s.values()}
    if len(counts) != 1 or 0 in counts:
        numbers = ", ".join(f"{task} {len(accuracies)}" for task, accuracies in top1s.items())
        raise UserError(f"the tasks have different numbers of seeds, or none ({numbers}): run all with the same seeds")
    for task, accuracies in top1s.items():
        if wrong := [value for value in accuracies if not 0 <= value <= 1]:
            raise UserError(f"top-1 accuracy {wrong[0]} of {task}: must be between 0 and 1")
    members = {group: [task for task, of in TASKS.items() if of.group == group] for group in GROUPS}
    means = {}
    for group, tasks in (*members.items(), (ALL, list(TASKS))):
        if there := [top1s[task] for task in tasks if task in top1s]:
            of_seeds = [statistics.fmean(accuracies) for accuracies in zip(*there, strict=True)]
            means[group] = Mean(
                top1=statistics.fmean(of_seeds),
                std=statistics.stdev(of_seeds) if len(of_seeds) > 1 else None,
                tasks=len(there),
                of=len(tasks),
            )
    return means


def check_names(tasks: Iterable[str]) -> None:
    for task in tasks:
        if task not in TASKS:
            near = difflib.get_close_matches(task, TASKS, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"VTAB has no task {task!r}: {hint}there are {', '.join(TASKS)}")
