"""What was found: one line each, with what to do where it is not as it should be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from m3i_scale.errors import UserError

_LISTED = 8


@dataclass(frozen=True)
class Finding:
    """One check on one host, or between two."""

    check: str
    """Its stable name: docs/doctor.md lists them."""
    host: str
    """A host, `a ↔ b` for a pair, `all` for the group."""
    ok: bool
    value: str
    """What was found."""
    why: str | None = None
    """What follows from it, where it is not as it should be."""
    fix: str | None = None
    warning: bool = False
    """Worth a look, and no reason to stop: `ok` is true."""

    def to_json(self) -> dict[str, Any]:
        """With the same keys every time."""
        return asdict(self)


def good(check: str, host: str, value: str) -> Finding:
    """As it should be."""
    return Finding(check, host, True, value)


def fault(check: str, host: str, value: str, *, why: str, fix: str) -> Finding:
    """Not as it should be: the run would fail, or be another one than was meant."""
    return Finding(check, host, False, value, why, fix)


def warning(check: str, host: str, value: str, *, why: str, fix: str) -> Finding:
    """Worth a look."""
    return Finding(check, host, True, value, why, fix, warning=True)


def faults_of(findings: Iterable[Finding]) -> list[Finding]:
    """Those that are not ok."""
    return [finding for finding in findings if not finding.ok]


class HostsNotReadyError(UserError):
    """Some host cannot run this as it is. Says all that was found, not only the first."""


def not_ready(found: list[Finding]) -> HostsNotReadyError:
    """All faults as one error; the first says what, the rest stand with where."""
    first, *rest = found
    told = [
        f"{item.check} on {item.host}: {item.value}" + (f" ({item.why})" if item.why and item.why != first.why else "")
        for item in rest[:_LISTED]
    ]
    more = [f"and {len(rest) - _LISTED} more"] if len(rest) > _LISTED else []
    return HostsNotReadyError(
        f"{first.check}: {first.value}",
        where="; ".join([first.host, *told, *more]),
        why=first.why,
        fix="; ".join(dict.fromkeys(item.fix for item in found[:_LISTED] if item.fix)),
    )


def gib(size: float) -> str:
    """Bytes for a person."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} bytes"
