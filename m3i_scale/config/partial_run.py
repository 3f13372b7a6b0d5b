"""Read what is valid of a run file with errors, so that one look finds all else that is wrong with it."""

from __future__ import annotations

import copy
from typing import Any

from pydantic import ValidationError

from m3i_scale.config import RunConfig


def sections_that_hold(values: dict[str, Any]) -> tuple[RunConfig | None, frozenset[str]]:
    """Return what can be looked at of a run file with faults: its sound sections, the others as by default.

    Returns:
        The run, None where not even that holds together; and the names of the sections that are at fault.
    """
    try:
        return RunConfig.model_validate(values), frozenset()
    except ValidationError as error:
        broken = frozenset(str(fault["loc"][0]) for fault in error.errors() if fault["loc"])
    without = broken | ({"phases"} if "optim" in broken else set())  # they share out its steps
    sound = {key: value for key, value in values.items() if key not in without}
    try:
        return RunConfig.model_validate({"recipe": {}, **sound}), broken
    except ValidationError:  # sections that do not fit to each other
        return None, broken


def fields_that_hold(values: dict[str, Any]) -> tuple[RunConfig | None, frozenset[str]]:
    """Return a run file with defaults in place of the values that have errors.

    Returns:
        The run, None if a value that is required has an error; and the dotted keys of values with errors.
    """
    values, faulty = copy.deepcopy(values), set[str]()
    while True:  # each turn removes a key
        try:
            return RunConfig.model_validate(values), frozenset(faulty)
        except ValidationError as error:
            removed = {key for fault in error.errors() if (key := _remove(values, fault["loc"])) is not None}
        if not removed:
            return None, frozenset(faulty)
        faulty |= removed


def _remove(values: dict[str, Any], place: tuple[int | str, ...]) -> str | None:
    """Remove the value at a place, or the innermost one around it that is in a mapping; return its dotted key."""
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
