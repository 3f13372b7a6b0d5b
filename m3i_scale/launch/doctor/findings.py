"""Findings are the doctor's results: one line each, with what to do where something is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from m3i_scale.errors import UserError
from m3i_scale.text import listed

_LISTED = 8


@dataclass(frozen=True)
class Finding:
    """Holds the result of one check on one host, or between two."""

    check: str
    """Its stable name: docs/doctor.md lists them."""
    host: str
    """A host, `a ↔ b` for a pair, `all` for the group."""
    ok: bool
    value: str
    """The observation."""
    why: str | None = None
    """What follows from it, where it is not as it should be."""
    fix: str | None = None
    warning: bool = False
    """Worth a look, and no reason to stop: `ok` is true."""

    def to_json(self) -> dict[str, Any]:
        """Return the finding for JSON, with the same keys every time."""
        return asdict(self)


def finding(
    check: str, host: str, value: str, *, fault: str | None = None, warning: str | None = None, fix: str | None = None
) -> Finding:
    """Return a finding; it is ok where neither a fault nor a warning is given.

    Args:
        check: its name.
        host: where.
        value: what was seen.
        fault: why the run would fail, or be another one than was meant.
        warning: why it is worth a look; a fault comes before it.
        fix: what to do about either.
    """
    why = fault or warning
    return Finding(check, host, not fault, value, why, fix if why else None, warning=bool(warning and not fault))


def faults_of(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings that are not ok."""
    return [item for item in findings if not item.ok]


class HostsNotReadyError(UserError):
    """Reports that some host cannot run this as it is, with all findings, not only the first."""


def not_ready(faults: list[Finding]) -> HostsNotReadyError:
    """Return all faults as one error; the first says what, the rest stand with where."""
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
