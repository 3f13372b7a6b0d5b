"""Human-readable sizes, durations and differences; removal of secrets and terminal escapes from text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
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
"""Tokens with a known prefix: Hugging Face Hub, Google, AWS, GitHub and OpenAI."""
HIDDEN = "(hidden)"
"""Placeholder for a value with a secret name."""
_SECRET_NAME = re.compile(
    r"TOKEN(?!IZER)|SECRET|KEY|PASSWORD|PASSWD|CREDENTIAL|(?:^|_)AUTH(?!_SOCK)(?:_|$)|^AWS_", re.IGNORECASE
)
_COUNTED = {"tokens", "max_tokens"}
"""Settings that are not secret despite their names."""


def is_secret(name: str) -> bool:
    """Return whether a variable or setting has a secret name: *TOKEN*, *SECRET*, *KEY*, *PASSWORD*, AWS_* and
    similar."""
    return name not in _COUNTED and _SECRET_NAME.search(name) is not None


def without_secrets(text: str) -> str:
    """Replace logins, URL queries, signatures and access tokens in untrusted text by `…`."""
    if text.startswith("pipe:"):  # shell command in a config file of an earlier version
        return "pipe:…"
    text = _QUERY.sub(r"\1?…", _LOGIN.sub("://…@", text))
    for pattern in (_HEADER_SECRET, _AUTHORIZATION, _NAMED_SECRET, _OPTION_SECRET):
        text = pattern.sub(r"\1…", text)
    return _TOKEN.sub("…", text)


def redact_text(text: str) -> str:
    """Redact user input for logs: `without_secrets`, and all text after `pipe:`, which is no longer supported."""
    return re.sub(r"\bpipe:.*", "pipe:…", without_secrets(text), flags=re.DOTALL)


def printable(text: str, *, lines: bool = False) -> str:
    """Return untrusted text with terminal control characters and invalid Unicode escaped; `lines` keeps line breaks and
    tabs."""
    safe = text.encode("utf-8", "backslashreplace").decode("utf-8")
    if safe.isprintable():
        return safe
    kept = "\n\t" if lines else ""
    return "".join(
        letter if letter.isprintable() or letter in kept else letter.encode("unicode_escape").decode()
        for letter in safe
    )


def yaml_string(text: str) -> str:
    """Quote a string, such as a path, for a YAML file or an override. JSON would escape an emoji in a way that YAML
    does not accept."""
    import yaml  # not needed for --help

    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=float("inf")).rstrip("\n")


def redact(value: Any, *, names: bool = False) -> Any:
    """Return a JSON value with every login, query and access token in its strings and keys replaced by `…`. `names`
    also redacts values with a secret name, except sections; for logs, because it may redact more than secrets."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {
            redact(key): HIDDEN
            if names and not isinstance(item, dict) and is_secret(str(key))
            else redact(item, names=names)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item, names=names) for item in value]
    return value


def listed(items: Sequence[object], most: int, between: str = ", ") -> str:
    """Join the first `most` items, and the number of remaining items."""
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return between.join([*map(str, items[:most]), *more])


def filled(parts: Iterable[str], width: int) -> list[str]:
    """Pack parts into lines of at most `width` characters; a longer part is not split."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(part)
    return lines


def wrapped_choices(text: str, width: int) -> list[str]:
    """Break `a|b|c` after its bars into lines of at most `width` characters; a longer choice is not split."""
    lines = [""]
    for part in re.findall(r"[^|]+\|?", text):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return lines


def table_lines(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Format a table as lines of text with aligned columns, names first."""
    cells = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]


GIB = 2**30


def size_text(count: float) -> str:
    """Format a number of bytes in a suitable unit: `1.50 GiB`."""
    for unit, factor in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} bytes"


def duration_text(seconds: float) -> str:
    """Format a duration in a suitable unit: `36 hours`."""
    for unit, factor in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * factor:
            value = seconds / factor
            return f"{value:,.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
    return f"{seconds:.3g} seconds"


def short(value: Any, letters: int = 100) -> str:
    """Return a JSON value, truncated to about `letters` characters."""
    text = _json_text(value)
    return text if len(text) <= letters else text[:letters] + " …"


def _json_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def differences(key: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, old value, new value) for every difference of JSON values, recursively for dicts and lists of equal
    length. `key` is the prefix of the keys."""
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


def short_differences(key: str, before: Any, now: Any) -> Iterator[tuple[str, str, str]]:
    """Yield `differences` as `short` texts, or in full if the short texts are equal."""
    for name, was, present in differences(key, before, now):
        texts = short(was), short(present)
        yield (name, *texts) if texts[0] != texts[1] else (name, _json_text(was), _json_text(present))


def format_differences(key: str, before: Any, now: Any) -> list[str]:
    """Format differences as `optim.lr was 0.001, is 0.002`, one line per field."""
    return [f"{name} was {was}, is {present}" for name, was, present in short_differences(key, before, now)]


def known_part(before: Any, now: Any) -> Any:
    """Drop the fields that the older description lacks: a newer version of a package may describe the same thing with
    additional fields."""
    if isinstance(before, dict) and isinstance(now, dict):
        return {key: known_part(before[key], value) for key, value in now.items() if key in before}
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [known_part(one, other) for one, other in zip(before, now, strict=True)]
    return now


def estimates(measures: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield (name, estimate, baselines) for every estimate in an evaluation's `measures`, at any depth. An estimate has
    `value`, `low` and `high`; the baselines are `chance` and `majority`, if known."""
    for key, value in measures.items() if isinstance(measures, dict) else ():
        if not isinstance(value, dict):
            continue
        here = (*path, str(key))
        if {"value", "low", "high"} <= value.keys():
            has_majority = "majority" in value  # then the chance level of the other metrics does not apply to this one
            chance = value.get("chance", None if has_majority else measures.get("chance"))
            guesses = {"chance": chance, "majority": value.get("majority", measures.get("majority"))}
            yield (
                " ".join(here).replace("_", " "),
                value,
                {name: guess for name, guess in guesses.items() if guess is not None},
            )
        else:
            yield from estimates(value, here)
