"""The result of a finished run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from allmlp.config.recipe import Recipe
from allmlp.data.dataset import DatasetSplits
from allmlp.factory import Model


class Majority(Protocol):
    """Always answering the commonest class of a split."""

    @property
    def name(self) -> str: ...
    @property
    def top1(self) -> float: ...
    @property
    def verdict(self) -> str | None:
        """What to say of a model that is no better; None for one that is."""
        ...


class Result(Protocol):
    """The evaluation of a model on one split."""

    @property
    def top1(self) -> float: ...
    @property
    def loss(self) -> float: ...
    @property
    def majority(self) -> Majority: ...
    @property
    def unreadable(self) -> dict[str, str]:
        """Name of each image that could not be read → the reason."""
        ...


R = TypeVar("R", bound=Result)


@dataclass(frozen=True, kw_only=True)
class RunResult(Generic[R]):
    """A finished run: its folder, its summary, the model, and the evaluation of each held-out split."""

    folder: Path
    recipe: Recipe
    summary: dict[str, Any]  # as in summary.json
    metrics: list[dict[str, float]]  # the records of metrics.jsonl
    model: Model
    data: DatasetSplits
    results: dict[str, R]  # "val" and "test", where the data has such a split
