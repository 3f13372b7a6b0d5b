"""Results of the environment check: one line each, with a fix if there is a problem."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from m3i_scale.errors import UserError
from m3i_scale.text import listed

_LISTED = 8
NOT_JUDGED = "not judged"
"""Start of the value of a check that lacks data. It is ok, with a dash in tables and the reason after a colon."""


@dataclass(frozen=True)
class Finding:
    """The result of one check on one host, or on all together."""

    check: str
    """Stable name; docs/guides/check-nodes.md lists them."""
    host: str
    """A host, or `all` for the group."""
    ok: bool
    value: str
    """The observation, or `NOT_JUDGED` and the reason."""
    why: str | None = None
    """The consequence of a problem."""
    fix: str | None = None
    warning: bool = False
    """Unusual, but does not prevent the run: `ok` is true."""

    def to_json(self) -> dict[str, Any]:
        """Return the finding for JSON, always with the same keys."""
        return asdict(self)


def finding(
    check: str, host: str, value: str, *, error: str | None = None, warning: str | None = None, fix: str | None = None
) -> Finding:
    """Return a finding; it is ok if there is no error.

    Args:
        check: stable name.
        host: a host, or `all`.
        value: the observation.
        error: why the run would fail, or differ from its configuration.
        warning: why the result is unusual; an error takes precedence.
        fix: how to fix either.
    """
    why = error or warning
    return Finding(check, host, not error, value, why, fix if why else None, warning=bool(warning and not error))


Answers = Mapping[str, Mapping[str, Any]]
"""By host, the master node first."""


@dataclass(frozen=True)
class HostReport:
    """The answer of a host, with the answers of the master node and of all hosts."""

    name: str
    answer: Mapping[str, Any]
    master: Mapping[str, Any]
    answers: Answers


Results = Iterator[tuple[str, dict[str, str | None]]]
"""Values, with `error`, `warning` and `fix` as arguments of `finding`."""
Check = Callable[[HostReport], Results]


def compare_hosts(answers: Answers, checks: Mapping[str, Check]) -> Iterator[Finding]:
    """Run checks by name for all hosts; yield their findings."""
    master = next(iter(answers.values()))
    for name, check in checks.items():
        for host, answer in answers.items():
            for value, arguments in check(HostReport(host, answer, master, answers)):
                yield finding(name, host, value, **arguments)


def errors_in(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings that are not ok."""
    return [item for item in findings if not item.ok]


def not_ready(errors: list[Finding]) -> UserError:
    """Combine errors into one: the first is the message, the others are listed with the location."""
    first, *rest = errors
    others = [
        f"{item.check} on {item.host}: {item.value}" + (f" ({item.why})" if item.why and item.why != first.why else "")
        for item in rest
    ]
    return UserError(
        f"{first.check}: {first.value}",
        where=listed([first.host, *others], 1 + _LISTED, "; "),
        why=first.why,
        fix="; ".join(dict.fromkeys(item.fix for item in errors[:_LISTED] if item.fix)),
    )
