"""What goes wrong with a shard: an attempt to read that failed, and a shard that is given up."""

from __future__ import annotations

import asyncio
import email.utils
import errno
import sys
import time
from collections.abc import Iterator
from http.client import IncompleteRead
from typing import Any

from m3i_scale.data.places import Place
from m3i_scale.errors import DataError, UserError
from m3i_scale.text import without_secrets

SHARD = "shard: "
"""The reasons of samples that are lost with their shard begin so."""
_DETAIL_LETTERS = 200
_FIXES = {
    "access refused": "credentials are found by the usual chains of the service (docs/data.md)",
    "replaced": "bring the indexed version back; if the new one is meant, start a new run, which indexes it",
    "no ranges": "set data.cache_gib: what a server sends only whole goes through the cache",
    "answer too long": "the server does not send what was asked for; what a pipe gives may take data.cache_gib at most",
}
_START_FIXES = {
    "not found": "check the address, and that the file is there",
    "access refused": _FIXES["access refused"],
    "no ranges": _FIXES["no ranges"],
    "answer too long": _FIXES["answer too long"],
}
_FOREIGN = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("gcsfs.retry", "HttpError"),
    ("httpx", "HTTPError"),
)
"""What file systems raise beside OSError; none of them is imported unless it is in use."""


class FaultError(Exception):
    """One attempt that failed.

    Args:
        reason: a few words, the same for all faults of a kind.
        detail: the case.
        lasting: another attempt would end the same.
        not_ranged: the server sends whole files only.
        pause_s: seconds that the server wants to be left alone.
    """

    def __init__(
        self, reason: str, detail: str = "", *, lasting: bool = False, not_ranged: bool = False, pause_s: float = 0.0
    ) -> None:
        self.reason, self.detail, self.lasting, self.not_ranged = reason, detail, lasting, not_ranged
        self.pause_s = pause_s
        super().__init__(reason, detail)


class RemoteReadError(OSError):
    """A small file beside remote shards that cannot be read, after all attempts."""

    def __init__(self, fault: FaultError) -> None:
        self.fault = fault
        super().__init__(f"{fault.reason}: {fault.detail}")


class BadShardError(DataError):
    """A shard that cannot be used, after all attempts; stops the run or is set aside, as the policy says."""

    reason = "cannot be read"
    """A few words, the same for all faults of a kind."""


def bad_shard(place: Place, fault: FaultError) -> BadShardError:
    """The shard at `place` is given up because of `fault`."""
    error = BadShardError(
        f"cannot read the shard: {fault.reason}",
        where=str(place),
        why=fault.detail or None,
        fix=_FIXES.get(fault.reason, "mend it, or go on without it: data.bad_shards=quarantine"),
    )
    error.reason = fault.reason
    return error


def start_fix(error: Exception) -> str | None:
    """How to mend what fails before the first step; None of errors that no server is behind."""
    fault = error.fault if isinstance(error, RemoteReadError) else error
    if not isinstance(fault, FaultError):
        return None
    waiting = "see that the server runs and that the address is right; one that is slow gets data.start_timeout_s"
    return _START_FIXES.get(fault.reason, waiting)


def bad_at_start(place: Place, fault: FaultError) -> BadShardError:
    """As `bad_shard`, before the first step: whatever data.bad_shards says, every shard must be there then."""
    error = bad_shard(place, fault)
    error.fix = start_fix(fault)
    return error


def to_fault(error: Exception, timeout_s: float) -> Exception:
    """The fault that an error of a file system stands for; what is a mistake in the code stays what it is."""
    if isinstance(error, FaultError | UserError) or not isinstance(error, _foreign_errors()):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return error  # ours, not the shard's
    return _told(error, timeout_s)


def _told(error: BaseException, timeout_s: float) -> FaultError:
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, _foreign_errors()):
        error = error.__cause__  # fsspec says so of every file that it cannot ask after
    kind = type(error).__name__
    # Before the status: aiohttp gives a body that is too short one of its own.
    cut_off = isinstance(error, EOFError | IncompleteRead) or "Payload" in kind or "Incomplete" in kind
    status = None if cut_off else _status(error)
    named = kind if status is None else f"HTTP {status}"
    detail = without_secrets(f"{named}: {error}")[:_DETAIL_LETTERS]
    if status is not None:
        return FaultError(_reason_of_status(status), detail, pause_s=_pause_s(error))
    if isinstance(error, asyncio.TimeoutError | TimeoutError):
        return FaultError("stalled or slow", f"no whole answer within {timeout_s:g} s")
    by_kind = {FileNotFoundError: "not found", PermissionError: "access refused"}
    reason = next((reason for kind, reason in by_kind.items() if isinstance(error, kind)), "connection lost")
    return FaultError("cut off" if cut_off else reason, detail)


def _foreign_errors() -> tuple[type[BaseException], ...]:
    found = [getattr(sys.modules[module], name) for module, name in _FOREIGN if module in sys.modules]
    return (OSError, EOFError, IncompleteRead, asyncio.TimeoutError, *found)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error tells of, itself or through what caused it."""
    for seen in _causes(error):
        answer = getattr(seen, "response", None)
        for holder, name in ((seen, "status"), (seen, "code"), (answer, "status_code")):
            value = getattr(holder, name, None)
            if isinstance(value, int) and value >= 400:
                return value
        if type(seen) is OSError and str(seen).startswith("Forbidden: "):  # all that gcsfs says of a 403
            return 403
        value = _of_botocore(answer).get("HTTPStatusCode")
        if isinstance(value, int) and value >= 400:
            return value
    return None


def _pause_s(error: BaseException) -> float:
    """What `Retry-After` says, in seconds from now; 0 where nothing is said that can be understood."""
    for seen in _causes(error):
        answer = getattr(seen, "response", None)
        told = (
            getattr(seen, "headers", None),
            getattr(answer, "headers", None),
            _of_botocore(answer).get("HTTPHeaders"),
        )
        for headers in filter(None, told):
            found = {str(name).lower(): str(value) for name, value in headers.items()}.get("retry-after")
            if found is not None:
                return _seconds(found)
    return 0.0


def _seconds(text: str) -> float:
    """A number of seconds, or a date, as HTTP has both."""
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _of_botocore(answer: Any) -> dict[str, Any]:
    return answer.get("ResponseMetadata", {}) if isinstance(answer, dict) else {}


def _reason_of_status(status: int) -> str:
    if status in (404, 410):
        return "not found"
    if status in (401, 403):
        return "access refused"
    if status in (408, 429) or status >= 500:
        return "server error"
    return "refused by the server"
