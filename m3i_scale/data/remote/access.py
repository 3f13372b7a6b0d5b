"""Access settings for shards from the config file (limits, retries, cache), and the retry loop."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_combine, wait_random_exponential

from m3i_scale.config import DataConfig, DatasetConfig
from m3i_scale.data.remote.address import is_remote, to_address
from m3i_scale.data.remote.cache import ShardCache
from m3i_scale.data.remote.faults import FaultError, to_fault
from m3i_scale.defaults import MAX_SAMPLE_BYTES
from m3i_scale.errors import ConfigError
from m3i_scale.text import GIB

BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
MAX_PAUSE_S = 300.0
"""Limit for the pause that a server requests."""
_ONLY_REMOTE = ("cache_gib", "cache_dir", "read_timeout_s", "start_timeout_s")

Result = TypeVar("Result")


def default_cache_dir() -> Path:
    """Return the default cache folder, following the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m3i-scale"


@dataclass(frozen=True)
class Access:
    """Settings for reading shards, mainly remote ones."""

    attempts: int = 8
    """Attempts per request before the shard counts as corrupt."""
    timeout_s: float = 60.0
    """Time limit of one request, until its last byte."""
    cache_dir: Path = field(default_factory=default_cache_dir)
    cache_bytes: int = 50 << 30
    """Size limit of the cache. 0: no full downloads, every sample is read by range request."""
    start_timeout_s: float = 20.0
    """Time limit of a small request before the first step, over all attempts."""
    total_timeout_s: float = math.inf
    """Time limit of any request, over all attempts; pauses that a server requests are not cut short."""
    max_sample_bytes: int = MAX_SAMPLE_BYTES
    """Larger samples are not read, from local or remote shards."""

    @property
    def cache(self) -> ShardCache | None:
        """Return the cache of complete shards, or None if caching is off."""
        return ShardCache(self.cache_dir, self.cache_bytes) if self.cache_bytes else None

    def at_start(self) -> Access:
        """Return shorter timeouts for requests before the first step, so that configuration errors surface quickly."""
        limit = self.start_timeout_s
        return dataclasses.replace(self, timeout_s=min(self.timeout_s, limit), total_timeout_s=limit)


def check_access(data: DataConfig, sources: dict[str, DatasetConfig]) -> Access:
    """Validate and return the access settings for the shards of `sources`."""
    named = [*sources.items(), *data.datasets.items(), *data.validation.items()]
    remote = [(name, source.path) for name, source in named if is_remote(source.path)]
    for name, shards in remote:
        to_address(shards, f"dataset '{name}'")
    if not remote:
        for setting in _ONLY_REMOTE:
            if getattr(data, setting) != DataConfig.model_fields[setting].default:
                raise ConfigError(
                    f"data.{setting} has no effect: all shards are local",
                    where=f"data.{setting}",
                    fix="remove it",
                )
    access = Access(
        attempts=data.max_read_attempts,
        timeout_s=data.read_timeout_s,
        cache_dir=data.cache_dir or default_cache_dir(),
        cache_bytes=int(data.cache_gib * GIB),
        start_timeout_s=data.start_timeout_s,
        max_sample_bytes=data.max_sample_bytes,
    )
    if access.cache and any(is_remote(source.path) for source in sources.values()):
        access.cache.check()
    return access


def retried(attempt: Callable[[], Result], access: Access, lasting: tuple[type[Exception], ...] = ()) -> Result:
    """Call `attempt` until it succeeds, with exponential backoff and full jitter between attempts.

    It is repeated after every `FaultError` and every error that maps to one, except `lasting` errors. The `FaultError`
    of the last attempt is raised.
    """

    def once() -> Result:
        try:
            return attempt()
        except Exception as error:
            fault = to_fault(error, access.timeout_s)
            if isinstance(fault, FaultError):
                fault.lasting |= isinstance(error, lasting)
            if fault is error:
                raise
            raise fault from error

    # Random over the full interval ("full jitter"), so that a thousand readers do not retry at the same moment.
    retrying = Retrying(
        stop=functools.partial(_gives_up, access),
        wait=wait_combine(_pause_asked_for, wait_random_exponential(multiplier=BACKOFF_S, max=MAX_BACKOFF_S)),
        retry=retry_if_exception(lambda error: isinstance(error, FaultError) and not error.lasting),
        reraise=True,
    )
    return retrying(once)


def _pause_asked_for(state: RetryCallState) -> float:
    fault = state.outcome.exception() if state.outcome else None
    return min(MAX_PAUSE_S, fault.pause_s) if isinstance(fault, FaultError) else 0.0


def _gives_up(access: Access, state: RetryCallState) -> bool:
    if state.attempt_number >= access.attempts:
        return True
    waited_s = (state.seconds_since_start or 0.0) + state.upcoming_sleep
    return not _pause_asked_for(state) and waited_s > access.total_timeout_s
