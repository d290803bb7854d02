"""What a finished run returns: its folder, its summary, the model, and the evaluation of each held-out split."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from allmlp.config.recipe import Recipe
from allmlp.data.dataset import DatasetSplits
from allmlp.model import Mixer


class Result(Protocol):
    """What a run needs to know about an evaluation."""

    @property
    def top1(self) -> float: ...
    @property
    def loss(self) -> float: ...
    @property
    def unreadable(self) -> dict[str, str]: ...


R = TypeVar("R", bound=Result)


@dataclass(frozen=True, kw_only=True)
class RunResult(Generic[R]):
    out: Path
    recipe: Recipe
    summary: dict[str, Any]
    metrics: list[dict[str, float]]
    model: Mixer
    data: DatasetSplits
    results: dict[str, R]  # by split: "val", "test", as far as the data has them
