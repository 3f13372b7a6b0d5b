"""Base classes, types and limits shared by all sections of a config file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator

from m3i_scale.errors import ConfigError
from m3i_scale.files import local_path

# Upper limits of sizes are far above any real model, but low enough that a number with three extra zeros fails at once.
MAX_LAYERS = 1_000
"""Layers of a model or a head."""
MAX_VIEWS = 1_000
"""Crops of an image, masks of a crop, or blocks of a mask."""
MAX_HEADS = 1_024
"""Attention heads, or groups of channels."""
MAX_WIDTH = 2**18
"""Channels."""
MAX_SIDE = 2**14
"""Pixels, patches or cells along a side of an image."""
MAX_CANDIDATES = 2**24
"""Prototypes, clusters, queries, regions, or vectors in a queue."""
MAX_BATCH = 2**24
"""Samples in a step or a micro-batch."""
MAX_CAPTION_TOKENS = 2**16
"""Tokens of a caption."""
MAX_STREAMS = 2**20
"""Logical data shards."""
MAX_WORKERS = 1_024
"""Data loader processes per rank."""
MAX_WAIT_S = 1e9
"""Seconds; about 31 years, effectively no limit."""
MAX_ASPECT = 20.0
"""Aspect ratio (longer side / shorter side), or maximum factor by which scale jitter shrinks or enlarges an image."""


class FixableError(ValueError):
    """Raised when a config value violates a validation rule; carries a suggested fix.

    Args:
        what: description of the error.
        fix: `key=value`, or a sentence.
    """

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.fix = fix


class Section(BaseModel):
    """Base class of all sections: immutable, without unknown keys or non-finite numbers."""

    # Build schemas on first use to keep `--help` fast.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject booleans for numbers: YAML reads `yes` and `on` as true, and pydantic reads true as 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        types = set(_types_in(annotation))
        for key, leaf in _leaves(value):
            if isinstance(leaf, bool) and types & {int, float} and bool not in types:
                raise ValueError(f"{leaf} is no number" + (f" ({key})" if key else ""))
        return value


SectionT = TypeVar("SectionT", bound=Section)


def is_stored(info: ValidationInfo) -> bool:
    """Return whether the values belong to a finished training. Its export skips range checks of training options."""
    return bool(info.context and info.context.get("stored"))


def may_import(info: ValidationInfo) -> bool:
    """Return whether user-defined modules may be imported: only those named in the user's config file."""
    return bool(info.context and info.context.get("imports"))


PathT = TypeVar("PathT", str, Path)


def _in_home(path: PathT) -> PathT:
    return type(path)(os.path.expanduser(path))


InHome = AfterValidator(_in_home)
"""Path with `~` expanded to the home directory, which shells do not do after `key=`."""


def _written(place: Any, info: ValidationInfo) -> Any:
    if not isinstance(place, str | Path):
        return place
    if is_stored(info):
        return os.path.expanduser(place)
    try:
        return local_path(place)
    except ConfigError as error:
        raise FixableError(f"{error.what}; {error.why}" if error.why else error.what, error.fix or "") from None


WrittenPath = Annotated[Path, BeforeValidator(_written)]
"""Path to write to; see `local_path`."""


def plain_values(value: Any) -> Any:
    """Return the explicitly set fields of a section; return any other value unchanged."""
    return value.model_dump(exclude_unset=True) if isinstance(value, Section) else value


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    for key, leaf in _leaves(fields):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise ValueError(f"'{key}' is {leaf}, which nothing can be computed with")
    return fields


ModelFields = Annotated[dict[str, Any], AfterValidator(_finite)]
"""Fields of a `transformers` configuration."""


def _types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _types_in(part)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield scalar values in nested lists and mappings with their dotted keys."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield key, value
        return
    for name, part in items:
        yield from _leaves(part, f"{key}.{name}" if key else str(name))
