"""What must leave the machine with no model and stand in no log: logins, signatures in addresses, access tokens."""

from __future__ import annotations

import re
from typing import Any

_LOGIN = re.compile(r"://(?:[^\s/]*|[^\s/:]+:(?!\d+/)[^\s@]*)@")
_QUERY = re.compile(r"(\w+://[^\s?'\"<>]+)\?[^\s'\"<>)]*")
_NAMED_SECRET = re.compile(
    r"((?:signature|credential|token|secret|password|api_?key|access_?key(?:_?id)?|\bsig)['\"]?\s*[=:]\s*['\"]?)[^\s&'\",;)]+",
    re.IGNORECASE,
)
_HEADER_SECRET = re.compile(r"\b((?:Bearer|Basic)\s+)[\w.~+/=-]+", re.IGNORECASE)
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{8,}|ya29\.[\w-]+|(?:AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{16,})"
)
"""Tokens that are known by their beginnings: of the Hugging Face Hub, Google, AWS, GitHub and OpenAI."""


def without_secrets(text: str) -> str:
    """The text of somebody else's message, with logins and queries of addresses, signatures and tokens cut out."""
    if text.startswith("pipe:"):
        return "pipe:…"
    text = _QUERY.sub(r"\1?…", _LOGIN.sub("://…@", text))
    return _TOKEN.sub("…", _NAMED_SECRET.sub(r"\1…", _HEADER_SECRET.sub(r"\1…", text)))


def shown(text: str) -> str:
    """Return what a user wrote, fit for logs: `without_secrets`, and without commands of `pipe:`."""
    return re.sub(r"\bpipe:.*", "pipe:…", without_secrets(text), flags=re.DOTALL)


def masked(value: Any) -> Any:
    """A JSON value with every login, query and access token in its texts, keys included, replaced by `…`."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {masked(key): masked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item) for item in value]
    return value
