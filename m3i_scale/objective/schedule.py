"""Scheduled numbers of a recipe, such as temperatures and loss weights."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field

from m3i_scale.config import Section

Number = TypeVar("Number", bound=float)
AnySection = TypeVar("AnySection", bound=Section)
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


def _is_schedule(value: float | list[tuple[float, float]]) -> float | list[tuple[float, float]]:
    if isinstance(value, list):
        at = [progress for progress, _ in value]
        if len(at) < 2 or at[0] != 0 or at[-1] > 1 or any(later <= earlier for earlier, later in pairwise(at)):
            raise ValueError(
                "a schedule is two or more [share of the training, value], from a share of 0 on, ascending, 1 at most; "
                f"this is at {at}"
            )
    return value


_SCHEDULED = AfterValidator(_is_schedule)

Scheduled = Annotated[Number | list[tuple[float, Number]], _SCHEDULED]
"""A number, or a list of [fraction of the training, value]: linear in between, constant after the last."""


def values_of(scheduled: float | list[tuple[float, float]]) -> list[float]:
    """Return all values of a schedule."""
    return [value for _, value in scheduled] if isinstance(scheduled, list) else [scheduled]


def value_at(scheduled: float | list[tuple[float, float]], progress: float) -> float:
    """Return the value at a fraction of the training, from 0 to 1."""
    if not isinstance(scheduled, list):
        return scheduled
    for (start, first), (end, last) in pairwise(scheduled):
        if progress <= end:
            return first + (last - first) * (progress - start) / (end - start)
    return scheduled[-1][1]


def always_below(lower: float | list[tuple[float, float]], upper: float | list[tuple[float, float]]) -> bool:
    """Return whether one schedule is always below another one."""
    bends = [at for one in (lower, upper) if isinstance(one, list) for at, _ in one]
    return all(value_at(lower, at) < value_at(upper, at) for at in bends or [0.0])


def settled(section: AnySection, progress: float) -> AnySection:
    """Return the section with the schedules in it and in its sections replaced by their values at a fraction of the
    training: a copy, or the section itself if it has no schedule."""
    now: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            now[name] = settled(value, progress)
        elif _SCHEDULED in field.metadata:
            now[name] = value_at(value, progress)
    changed = {name: value for name, value in now.items() if value is not getattr(section, name)}
    return section.model_copy(update=changed) if changed else section


def number(value: float | list[tuple[float, float]]) -> float:
    """Return a number of a settled section. Raise a TypeError if it is still a schedule."""
    if isinstance(value, list):
        raise TypeError("a schedule has no value of its own: compute with `settled(section, progress)`")
    return value
