"""Access settings for shards from the config file: limits, retries, cache."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from m3i_scale.config import DataConfig, DatasetConfig
from m3i_scale.data.remote.address import is_remote, to_address
from m3i_scale.data.remote.cache import ShardCache
from m3i_scale.defaults import MAX_SAMPLE_BYTES
from m3i_scale.text import GIB


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
    for name, source in named:
        to_address(source.path, f"dataset '{name}'")
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
