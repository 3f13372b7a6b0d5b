"""Errors of reading a shard: one says that an attempt failed, another that the shard is given up."""

from __future__ import annotations

import asyncio
import email.utils
import errno
import sys
import time
from collections.abc import Mapping
from http.client import IncompleteRead
from typing import Any

from m3i_scale.data.remote.address import Address
from m3i_scale.errors import DataError, UserError
from m3i_scale.text import without_secrets

SHARD = "shard: "
"""The reasons of samples that are lost with their shard begin so."""
NO_RANGES = "no range requests"
_DETAIL_LETTERS = 200
_FIXES = {
    "access refused": "credentials are found by the usual chains of the service (docs/data.md)",
    "answer too long": "the server does not send what was asked for",
}
_FIXES_OF_A_RUN = _FIXES | {
    "replaced": "bring the indexed version back; if the new one is meant, start a new run, which indexes it",
}
_FIXES_AT_START = _FIXES | {
    "not found": "check the address, and that the file is there",
    NO_RANGES: "copy the shards to a server that answers range requests, or to a local folder",
}
_LIBRARY_ERRORS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("gcsfs.retry", "HttpError"),
    ("httpx", "HTTPError"),
)
"""What file systems raise beside OSError; none of them is imported unless it is in use."""


class FaultError(Exception):
    """Raised when one attempt fails.

    Args:
        reason: a few words, the same for all faults of a kind.
        detail: the case.
        lasting: another attempt would end the same.
        pause_s: seconds that the server wants to be left alone.
    """

    def __init__(self, reason: str, detail: str = "", *, lasting: bool = False, pause_s: float = 0.0) -> None:
        self.reason, self.detail, self.lasting, self.pause_s = reason, detail, lasting, pause_s
        super().__init__(reason, detail)


class RemoteReadError(OSError):
    """Raised for a small file beside remote shards that cannot be read, after all attempts."""

    def __init__(self, fault: FaultError) -> None:
        self.fault = fault
        super().__init__(f"{fault.reason}: {fault.detail}")


class BadShardError(DataError):
    """Raised for a shard that cannot be used, after all attempts; `data.bad_shards` says what follows."""

    reason = "cannot be read"
    """A few words, the same for all faults of a kind."""


def bad_shard(place: Address, fault: FaultError, *, at_start: bool = False) -> BadShardError:
    """Return the error that says that a shard is given up.

    Args:
        place: of the shard.
        fault: why it is.
        at_start: before the first step, when every shard must be there whatever data.bad_shards says.
    """
    mended = _FIXES_OF_A_RUN.get(fault.reason, "mend it, or go on without it: data.bad_shards=quarantine")
    error = BadShardError(
        f"cannot read the shard: {fault.reason}",
        where=str(place),
        why=fault.detail or None,
        fix=start_fix(fault) if at_start else mended,
    )
    error.reason = fault.reason
    return error


def start_fix(error: Exception) -> str | None:
    """Return how to mend what fails before the first step; None for errors that no server is behind."""
    fault = error.fault if isinstance(error, RemoteReadError) else error
    if not isinstance(fault, FaultError):
        return None
    waiting = "see that the server runs and that the address is right; one that is slow gets data.start_timeout_s"
    return _FIXES_AT_START.get(fault.reason, waiting)


def to_fault(error: Exception, timeout_s: float) -> Exception:
    """Return the fault that an error of a file system stands for; others, as mistakes in the code, are not changed."""
    if isinstance(error, FaultError | UserError) or not isinstance(error, _library_errors()):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return error  # ours, not the shard's
    return _fault_of(error, timeout_s)


def _fault_of(error: BaseException, timeout_s: float) -> FaultError:
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, _library_errors()):
        error = error.__cause__  # fsspec says so of every file that it cannot ask after
    name = type(error).__name__
    # Before the status: aiohttp gives a body that is too short one of its own.
    cut_off = isinstance(error, EOFError | IncompleteRead) or "Payload" in name or "Incomplete" in name
    status, headers = (None, {}) if cut_off else _answer(error)
    detail = without_secrets(f"{name if status is None else f'HTTP {status}'}: {error}")[:_DETAIL_LETTERS]
    if status is not None:
        return FaultError(_reason_of_status(status), detail, pause_s=_pause_s(headers))
    if isinstance(error, asyncio.TimeoutError | TimeoutError):
        return FaultError("stalled or slow", f"no whole answer within {timeout_s:g} s")
    by_class = {FileNotFoundError: "not found", PermissionError: "access refused"}
    reason = next((reason for kind, reason in by_class.items() if isinstance(error, kind)), "connection lost")
    return FaultError("cut off" if cut_off else reason, detail)


def _library_errors() -> tuple[type[BaseException], ...]:
    loaded = [getattr(sys.modules[module], name) for module, name in _LIBRARY_ERRORS if module in sys.modules]
    return (OSError, EOFError, IncompleteRead, asyncio.TimeoutError, *loaded)


def _answer(error: BaseException | None) -> tuple[int | None, Mapping[str, Any]]:
    """Return the status and headers of the HTTP answer that an error, or one that caused it, is about."""
    while error is not None:
        answer = getattr(error, "response", None)
        if isinstance(answer, dict):  # botocore
            status, headers = (
                answer.get("ResponseMetadata", {}).get(name) for name in ("HTTPStatusCode", "HTTPHeaders")
            )
        else:
            holder = error if answer is None else answer  # aiohttp and gcsfs put it on the error itself
            statuses = (getattr(holder, name, None) for name in ("status", "status_code", "code"))
            status = next((value for value in statuses if isinstance(value, int)), None)
            headers = getattr(holder, "headers", None)
        if type(error) is OSError and str(error).startswith("Forbidden: "):  # all that gcsfs says of a 403
            status = 403
        if isinstance(status, int) and status >= 400:
            return status, headers or {}
        error = error.__cause__
    return None, {}


def _pause_s(headers: Mapping[str, Any]) -> float:
    """Return the wait in seconds that `Retry-After` asks for, as a number or a date; 0 where it says nothing."""
    text = next((str(value).strip() for name, value in headers.items() if str(name).lower() == "retry-after"), "")
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


def _reason_of_status(status: int) -> str:
    if status in (404, 410):
        return "not found"
    if status in (401, 403):
        return "access refused"
    if status in (408, 429) or status >= 500:
        return "server error"
    return "refused by the server"
