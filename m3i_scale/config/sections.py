"""What all sections of a run file are."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)  # built when first used: not for --help


SectionT = TypeVar("SectionT", bound=Section)


def plain_values(value: Any) -> Any:
    """What was set of a section that is one already."""
    return value.model_dump(exclude_unset=True) if isinstance(value, Section) else value
