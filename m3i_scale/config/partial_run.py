"""Parse the valid parts of an invalid config file, so that one check can report all errors."""

from __future__ import annotations

import copy
from typing import Any

from pydantic import ValidationError

from m3i_scale.config import RunConfig


def sections_that_hold(values: dict[str, Any]) -> tuple[RunConfig | None, frozenset[str]]:
    """Return a run with the valid sections of an invalid config and default values for the others, or None if the valid
    sections are inconsistent; and the names of the invalid sections."""
    try:
        return RunConfig.model_validate(values), frozenset()
    except ValidationError as error:
        broken = frozenset(str(fault["loc"][0]) for fault in error.errors() if fault["loc"])
    without = broken | ({"stages"} if "optim" in broken else set())  # the stages divide its steps
    sound = {key: value for key, value in values.items() if key not in without}
    try:
        return RunConfig.model_validate({"recipe": {}, **sound}), broken
    except ValidationError:  # sections that are inconsistent with each other
        return None, broken


def fields_that_hold(values: dict[str, Any]) -> tuple[RunConfig | None, frozenset[str]]:
    """Return a run with default values in place of the values that have errors, or None if a required value has an
    error; and the dotted keys of the values with errors."""
    values, faulty = copy.deepcopy(values), set[str]()
    while True:  # each iteration removes a key
        try:
            return RunConfig.model_validate(values), frozenset(faulty)
        except ValidationError as error:
            removed = {key for fault in error.errors() if (key := _remove(values, fault["loc"])) is not None}
        if not removed:
            return None, frozenset(faulty)
        faulty |= removed


def _remove(values: dict[str, Any], place: tuple[int | str, ...]) -> str | None:
    """Remove the value at a path, or the innermost enclosing value in a mapping; return its dotted key."""
    above, keys = values, list[str]()
    for part in place:
        if not isinstance(above, dict) or part not in above:
            break
        keys.append(str(part))
        parent, above = above, above[part]
    if not keys:
        return None
    del parent[keys[-1]]
    return ".".join(keys)
