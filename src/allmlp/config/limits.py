"""The limits of a recipe's fields, in their annotations: ``epochs: Annotated[float, Limits(above=0)] = 300``."""

import functools
import typing
from dataclasses import dataclass
from typing import Any

from allmlp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The numbers that a field accepts: finite ones within the bounds. ``hint`` helps to choose one."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    hint: str = ""

    def allow(self, value: float) -> bool:
        return (
            abs(value) < float("inf")  # false for NaN
            and (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        bounds = {"above": self.above, "at least": self.at_least, "below": self.below, "at most": self.at_most}
        text = " and ".join(f"{name} {bound}" for name, bound in bounds.items() if bound is not None)
        return (text or "a finite number") + (f"; {self.hint}" if self.hint else "")


def check_limits(section: Any) -> None:
    """Checks the fields of a dataclass against the ``Limits`` in their annotations; None passes.

    Raises:
        UserError: names the option, its value and its limits.
    """
    for name, limits in limits_of(type(section)).items():
        value = getattr(section, name)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(map(limits.allow, values)):
            each = "each " if isinstance(value, tuple) else ""
            raise UserError(f"{flag(name)} {' '.join(map(str, values))}: {each}must be {limits}")


@functools.cache
def limits_of(kind: type) -> dict[str, Limits]:
    """The limits of a dataclass, by field; fields without limits are left out."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {
        name: extra
        for name, hint in hints.items()
        for extra in getattr(hint, "__metadata__", ())
        if isinstance(extra, Limits)
    }


def flag(name: str) -> str:
    """The command line's option for a field: ``--learning-rate`` for ``learning_rate``."""
    return f"--{name.replace('_', '-')}"
