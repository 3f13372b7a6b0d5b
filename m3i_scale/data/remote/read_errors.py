"""Errors and retries of reads: `ReadError` for a failed attempt, `BadShardError` for a shard that is given up."""

from __future__ import annotations

import asyncio
import email.utils
import errno
import functools
import sys
import time
from collections.abc import Callable, Mapping
from http.client import IncompleteRead
from typing import Any, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_combine, wait_random_exponential

from m3i_scale.data.remote.access import Access, Address
from m3i_scale.errors import DataError, UserError
from m3i_scale.text import without_secrets

Result = TypeVar("Result")

BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
MAX_PAUSE_S = 300.0
"""Limit for the pause that a server requests."""
SHARD = "shard: "
"""Prefix of the reason of samples that are lost with their shard."""
NO_RANGES = "no range requests"
_DETAIL_LETTERS = 200
_FIXES = {
    "access refused": "set the credentials of the service (docs/guides/mix-datasets.md)",
    "answer too long": "the server must send exactly the requested range",
    "replaced": "restore the indexed version; to use the new one, start a new run, which indexes it",
}
_FIXES_AT_START = _FIXES | {
    "not found": "check the address",
    NO_RANGES: "copy the shards to a server that supports range requests, or to a local folder",
}
_LIBRARY_ERRORS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("gcsfs.retry", "HttpError"),
    ("httpx", "HTTPError"),
)
"""Errors besides OSError that file systems raise; their libraries are not imported here."""


class ReadError(Exception):
    """Raised when one attempt fails.

    Args:
        reason: short text, the same for all errors of a kind.
        detail: details of this case.
        lasting: the error is permanent, so no retry.
        pause_s: seconds to wait, as requested by the server.
    """

    def __init__(self, reason: str, detail: str = "", *, lasting: bool = False, pause_s: float = 0.0) -> None:
        self.reason, self.detail, self.lasting, self.pause_s = reason, detail, lasting, pause_s
        super().__init__(reason, detail)


class BadShardError(DataError):
    """Raised if a shard cannot be used after all attempts; `data.bad_shards` selects the reaction."""

    reason = "cannot be read"
    """Short text, the same for all errors of a kind."""


def bad_shard(place: Address, error: ReadError, *, at_start: bool = False) -> BadShardError:
    """Return the error for a shard that is given up because of `error`.

    `at_start`: before the first step, when every shard must be readable regardless of data.bad_shards.
    """
    fix = _FIXES.get(error.reason, "repair it, or skip it with data.bad_shards=quarantine")
    bad = BadShardError(
        f"cannot read the shard: {error.reason}",
        where=str(place),
        why=error.detail or None,
        fix=start_fix(error) if at_start else fix,
    )
    bad.reason = error.reason
    return bad


def start_fix(error: Exception) -> str | None:
    """Return a suggested fix for an error before the first step, or for an error of `read_file`; None if no server
    caused it."""
    cause = error if isinstance(error, ReadError) else error.__cause__
    if not isinstance(cause, ReadError):
        return None
    waiting = "check the server and the address; for a slow server, raise data.start_timeout_s"
    return _FIXES_AT_START.get(cause.reason, waiting)


def to_read_error(error: Exception, timeout_s: float) -> Exception:
    """Convert an error of a file system to a `ReadError`; return other errors, such as bugs, unchanged."""
    if isinstance(error, ReadError | UserError) or not isinstance(error, _library_errors()):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return error  # not an error of the shard
    cause: BaseException = error
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, _library_errors()):
        cause = error.__cause__  # fsspec raises this for any file that it cannot stat
    name = type(cause).__name__
    # Checked before the status: aiohttp assigns a status to truncated bodies.
    cut_off = isinstance(cause, EOFError | IncompleteRead) or "Payload" in name or "Incomplete" in name
    status, headers = (None, {}) if cut_off else _answer(cause)
    detail = without_secrets(f"{name if status is None else f'HTTP {status}'}: {cause}")[:_DETAIL_LETTERS]
    if status is not None:
        return ReadError(_reason_of_status(status), detail, pause_s=_pause_s(headers))
    if isinstance(cause, asyncio.TimeoutError | TimeoutError):
        return ReadError("stalled or slow", f"no complete response within {timeout_s:g} s")
    by_class = {FileNotFoundError: "not found", PermissionError: "access refused"}
    reason = next((reason for kind, reason in by_class.items() if isinstance(cause, kind)), "connection lost")
    return ReadError("cut off" if cut_off else reason, detail)


def _library_errors() -> tuple[type[BaseException], ...]:
    loaded = [getattr(sys.modules[module], name) for module, name in _LIBRARY_ERRORS if module in sys.modules]
    return (OSError, EOFError, IncompleteRead, asyncio.TimeoutError, *loaded)


def _answer(error: BaseException | None) -> tuple[int | None, Mapping[str, Any]]:
    """Return status and headers of the HTTP response that caused an error."""
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
        if type(error) is OSError and str(error).startswith("Forbidden: "):  # gcsfs reports a 403 only as text
            status = 403
        if isinstance(status, int) and status >= 400:
            return status, headers or {}
        error = error.__cause__
    return None, {}


def _pause_s(headers: Mapping[str, Any]) -> float:
    """Return the `Retry-After` pause in seconds, given as a number or a date; 0 if absent."""
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


def retried(attempt: Callable[[], Result], access: Access, lasting: tuple[type[Exception], ...] = ()) -> Result:
    """Call `attempt` until it succeeds, with exponential backoff and full jitter between attempts.

    It is repeated after every `ReadError` and every error that maps to one, except `lasting` errors. The `ReadError`
    of the last attempt is raised.
    """

    def once() -> Result:
        try:
            return attempt()
        except Exception as error:
            read_error = to_read_error(error, access.timeout_s)
            if isinstance(read_error, ReadError):
                read_error.lasting |= isinstance(error, lasting)
            if read_error is error:
                raise
            raise read_error from error

    # Random over the full interval ("full jitter"), so that a thousand readers do not retry at the same moment.
    retrying = Retrying(
        stop=functools.partial(_gives_up, access),
        wait=wait_combine(_pause_asked_for, wait_random_exponential(multiplier=BACKOFF_S, max=MAX_BACKOFF_S)),
        retry=retry_if_exception(lambda error: isinstance(error, ReadError) and not error.lasting),
        reraise=True,
    )
    return retrying(once)


def _pause_asked_for(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return min(MAX_PAUSE_S, error.pause_s) if isinstance(error, ReadError) else 0.0


def _gives_up(access: Access, state: RetryCallState) -> bool:
    if state.attempt_number >= access.attempts:
        return True
    waited_s = (state.seconds_since_start or 0.0) + state.upcoming_sleep
    return not _pause_asked_for(state) and waited_s > access.total_timeout_s
