"""What must leave the machine with no model and stand in no log: logins, signatures in addresses, access tokens."""

from __future__ import annotations

from typing import Any

from m3i_scale.data.places import without_secrets


def masked(value: Any) -> Any:
    """A JSON value with every login, query and access token in its texts, keys included, replaced by `…`."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {masked(key): masked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item) for item in value]
    return value
