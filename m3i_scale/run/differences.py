"""Two trees of settings, field by field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

_SHOWN_LETTERS = 100


def differences(key: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """(key, what was, what is) of every field that differs; below dicts, and below lists of the same length.

    Args:
        key: of the whole; "" for none.
        before: JSON values.
        now: JSON values.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                yield from differences(f"{key}.{name}" if key else str(name), before.get(name), now.get(name))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (one, other) in enumerate(zip(before, now, strict=True)):
            if one != other:
                yield from differences(f"{key}.{number}", one, other)
    elif before != now:
        yield key, before, now


def told_differences(key: str, before: Any, now: Any) -> list[str]:
    """`optim.lr was 0.001, and is 0.002`, a line a field."""
    found = differences(key, before, now)
    return [f"{name} was {short(was)}, and is {short(present)}" for name, was, present in found]


def known_part(before: Any, now: Any) -> Any:
    """Drop the fields that the older description does not have: a newer version of a package may describe the same
    thing with more of them."""
    if isinstance(before, dict) and isinstance(now, dict):
        return {key: known_part(before[key], value) for key, value in now.items() if key in before}
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [known_part(one, other) for one, other in zip(before, now, strict=True)]
    return now


def short(value: Any) -> str:
    """A JSON value in at most about a hundred letters."""
    text = json.dumps(value, sort_keys=True)
    return text if len(text) < _SHOWN_LETTERS else text[:_SHOWN_LETTERS] + " …"
