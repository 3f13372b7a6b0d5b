"""The run file sets limits, attempts and a cache for reading shards; they are checked here, and failures repeated."""

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

from m3i_scale.config import DataConfig, SourceConfig
from m3i_scale.data.remote.address import is_remote, to_address
from m3i_scale.data.remote.cache import ShardCache
from m3i_scale.data.remote.faults import FaultError, to_fault
from m3i_scale.defaults import MAX_SAMPLE_BYTES
from m3i_scale.errors import ConfigError
from m3i_scale.text import GIB

BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
MAX_PAUSE_S = 300.0
"""A server that wants to be left alone for longer is asked after this time all the same."""
_ONLY_REMOTE = ("cache_gib", "cache_dir", "read_timeout_s", "start_timeout_s")

Result = TypeVar("Result")


def default_cache_dir() -> Path:
    """Return the folder where caches lie by convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m3i-scale"


@dataclass(frozen=True)
class Access:
    """Says how shards are read, remote ones above all."""

    attempts: int = 8
    """Attempts of a request, before the shard counts as bad."""
    timeout_s: float = 60.0
    """Limit of one request, from its start to its last byte."""
    cache_dir: Path = field(default_factory=default_cache_dir)
    cache_bytes: int = 50 << 30
    """0: nothing is fetched whole, every sample is read by range."""
    start_timeout_s: float = 20.0
    """Limit of a small request before the first step, all its attempts together."""
    total_timeout_s: float = math.inf
    """Limit of any request, all its attempts together; pauses that the server asked for are not cut short."""
    max_sample_bytes: int = MAX_SAMPLE_BYTES
    """A larger sample is not read, wherever it lies."""

    @property
    def cache(self) -> ShardCache | None:
        """Return the cache of whole shards; None where there is none."""
        return ShardCache(self.cache_dir, self.cache_bytes) if self.cache_bytes else None

    def at_start(self) -> Access:
        """Return the settings of small requests before the first step: somebody waits, and may mend what is wrong."""
        limit = self.start_timeout_s
        return dataclasses.replace(self, timeout_s=min(self.timeout_s, limit), total_timeout_s=limit)


def check_access(data: DataConfig, sources: dict[str, SourceConfig]) -> Access:
    """Check the settings for reading the shards of `sources`, and return them."""
    named = [*sources.items(), *data.sources.items(), *data.validation.items()]
    remote = [(name, source.shards) for name, source in named if is_remote(source.shards)]
    for name, shards in remote:
        to_address(shards, f"source '{name}'")
    if not remote:
        for setting in _ONLY_REMOTE:
            if getattr(data, setting) != DataConfig.model_fields[setting].default:
                raise ConfigError(
                    f"data.{setting} has no effect: all shards are on paths of this host",
                    where=f"data.{setting}",
                    fix="leave it out",
                )
    access = Access(
        attempts=data.read_attempts,
        timeout_s=data.read_timeout_s,
        cache_dir=data.cache_dir or default_cache_dir(),
        cache_bytes=int(data.cache_gib * GIB),
        start_timeout_s=data.start_timeout_s,
        max_sample_bytes=data.max_sample_bytes,
    )
    if access.cache and any(is_remote(source.shards) for source in sources.values()):
        access.cache.check()
    return access


def retried(attempt: Callable[[], Result], access: Access, lasting: tuple[type[Exception], ...] = ()) -> Result:
    """Return the result of an attempt that is repeated while it fails, after random and growing pauses.

    Args:
        attempt: is called again after every `FaultError`, and after every error that stands for one.
        access: how often.
        lasting: errors that another attempt would not mend.

    Raises:
        FaultError: that of the last attempt.
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

    # Random over the whole interval ("full jitter"), or a thousand readers would all come back at the same moments.
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
