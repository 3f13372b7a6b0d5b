"""Results of the environment check: one line each, with a fix if there is a problem."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from m3i_scale.errors import UserError
from m3i_scale.text import listed

_LISTED = 8


@dataclass(frozen=True)
class Finding:
    """The result of one check on one host, or between two."""

    check: str
    """Its stable name: docs/doctor.md lists them."""
    host: str
    """A host, `a ↔ b` for a pair, `all` for the group."""
    ok: bool
    value: str
    """The observation."""
    why: str | None = None
    """The consequence of a problem."""
    fix: str | None = None
    warning: bool = False
    """An unusual result that does not prevent the run: `ok` is true."""

    def to_json(self) -> dict[str, Any]:
        """Return the finding for JSON, with the same keys every time."""
        return asdict(self)


def finding(
    check: str, host: str, value: str, *, fault: str | None = None, warning: str | None = None, fix: str | None = None
) -> Finding:
    """Return a finding; it is ok if there is no fault.

    Args:
        check: its name.
        host: a host, a pair, or `all`.
        value: the observation.
        fault: why the run would fail, or differ from its configuration.
        warning: why the result is unusual; a fault takes precedence.
        fix: how to fix either.
    """
    why = fault or warning
    return Finding(check, host, not fault, value, why, fix if why else None, warning=bool(warning and not fault))


def faults_of(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings that are not ok."""
    return [item for item in findings if not item.ok]


class HostsNotReadyError(UserError):
    """Some hosts cannot run this; the error has all findings, not only the first."""


def not_ready(faults: list[Finding]) -> HostsNotReadyError:
    """Combine all faults into one error: the first is the message, the others are listed with the location."""
    first, *rest = faults
    others = [
        f"{item.check} on {item.host}: {item.value}" + (f" ({item.why})" if item.why and item.why != first.why else "")
        for item in rest
    ]
    return HostsNotReadyError(
        f"{first.check}: {first.value}",
        where=listed([first.host, *others], 1 + _LISTED, "; "),
        why=first.why,
        fix="; ".join(dict.fromkeys(item.fix for item in faults[:_LISTED] if item.fix)),
    )
