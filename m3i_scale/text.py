"""What must leave the machine with no model and stand in no log: logins, signatures in addresses, access tokens."""

from __future__ import annotations

import re
from typing import Any

_LOGIN = re.compile(r"://(?:[^\s/]*|[^\s/:]+:(?!\d+/)[^\s@]*)@")
_QUERY = re.compile(r"(\w+://[^\s?'\"<>]+)\?[^\s'\"<>)]*")
_NAMED_SECRET = re.compile(
    r"((?:signature|credential|token|secret|password|api[_-]?key|access_?key(?:_?id)?|\bsig)['\"]?\s*[=:]\s*['\"]?)[^\s&'\",;)]+",
    re.IGNORECASE,
)
_OPTION_SECRET = re.compile(r"(--[\w-]*(?:token|secret|password|api-?key|access-?key)\s+)[^\s'\"]+", re.IGNORECASE)
_HEADER_SECRET = re.compile(r"\b((?:Bearer|Basic)\s+)[\w.~+/=-]+", re.IGNORECASE)
_AUTHORIZATION = re.compile(r"(\bAuthorization['\"]?:\s*['\"]?)[^'\"\n]+", re.IGNORECASE)
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{8,}|ya29\.[\w-]+|(?:AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{16,})"
)
"""Tokens that are known by their beginnings: of the Hugging Face Hub, Google, AWS, GitHub and OpenAI."""
HIDDEN = "(hidden)"
"""Stands for a value that is a secret by its name, wherever a person reads it."""
_SECRET_NAME = re.compile(
    r"TOKEN(?!IZER)|SECRET|KEY|PASSWORD|PASSWD|CREDENTIAL|(?:^|_)AUTH(?!_SOCK)(?:_|$)|^AWS_", re.IGNORECASE
)
_COUNTED = {"tokens", "max_tokens"}
"""Settings of a recipe and of the text tower."""


def is_secret(name: str) -> bool:
    """Return whether a variable or a setting is a secret by its name: *TOKEN*, *SECRET*, *KEY*, *PASSWORD*, AWS_* and
    the like."""
    return name not in _COUNTED and _SECRET_NAME.search(name) is not None


def without_secrets(text: str) -> str:
    """Return a text of somebody else without the logins and queries of addresses, signatures and tokens in it."""
    if text.startswith("pipe:"):
        return "pipe:…"
    text = _QUERY.sub(r"\1?…", _LOGIN.sub("://…@", text))
    for pattern in (_HEADER_SECRET, _AUTHORIZATION, _NAMED_SECRET, _OPTION_SECRET):
        text = pattern.sub(r"\1…", text)
    return _TOKEN.sub("…", text)


def shown(text: str) -> str:
    """Return what a user wrote, fit for logs: `without_secrets`, and without commands of `pipe:`."""
    return re.sub(r"\bpipe:.*", "pipe:…", without_secrets(text), flags=re.DOTALL)


def masked(value: Any, *, names: bool = False) -> Any:
    """Return a JSON value with every login, query and access token in its texts, keys included, replaced by `…`.

    Args:
        value: of JSON types.
        names: hide all of what is a secret by its name as well, but for sections: for logs, as it may hide more than
            secrets.
    """
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {
            masked(key): HIDDEN
            if names and not isinstance(item, dict) and is_secret(str(key))
            else masked(item, names=names)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [masked(item, names=names) for item in value]
    return value
