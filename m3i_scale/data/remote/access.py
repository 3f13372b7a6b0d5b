"""Addresses of shards (a local path or a URL for fsspec), and the settings for reading them.

URLs and their display names contain no credentials.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from m3i_scale.config import DataConfig, DatasetConfig
from m3i_scale.data.remote.cache import ShardCache
from m3i_scale.defaults import MAX_SAMPLE_BYTES
from m3i_scale.errors import DataError
from m3i_scale.text import GIB, without_secrets

SCHEMES = ("http", "https", "s3", "gs", "hf")
"""Schemes of remote addresses. `file://` is a local path."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(?:://|:(?=[^\\/]))")


@dataclass(frozen=True, order=True)
class Url:
    """A remote address with the parts of pathlib's interface that shards need. `str` is safe for logs and state."""

    address: str
    """Address for fsspec."""

    @property
    def scheme(self) -> str:
        """Return the scheme: http, https, s3, gs or hf."""
        return self.address.partition(":")[0]

    @property
    def name(self) -> str:
        """Return the last path component."""
        return self.address.rstrip("/").rpartition("/")[2]

    @property
    def stem(self) -> str:
        """Return the name without its last suffix."""
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        """Return the last suffix of the name."""
        return Path(self.name).suffix

    @property
    def parent(self) -> Url:
        """Return the parent folder; for the root of a server, the root."""
        above = self.address.rstrip("/").rpartition("/")[0]
        return self if above.endswith(("/", ":")) else Url(above)

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.address.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.address


Address = Path | Url


def is_remote(shards: str) -> bool:
    """Return whether the `path` of a dataset is a remote address, not a local path."""
    scheme = _SCHEME.match(shards)
    return scheme is not None and scheme[1].lower() != "file"


def to_address(text: str, where: str = "shards") -> Address:
    """Parse a local path or a remote address."""
    if not is_remote(text):
        return Path(text.removeprefix("file://"))
    scheme = text.partition(":")[0]
    if scheme not in SCHEMES:
        what, fix = f"shards cannot be read from '{scheme}:'", f"a path, or one of {', '.join(SCHEMES)}"
    elif not text.startswith(f"{scheme}://"):
        what, fix = "not an address", f"{scheme}://…"
    elif scheme != "hf" and _has_login(text):
        what = "the address contains a user name or password, which config files and checkpoints would store"
        fix = "use ~/.netrc or the environment"
    elif "?" in text:
        what = "the address contains a query, which config files and checkpoints would store with any signature in it"
        fix = "remove the query; s3, gs and hf take their credentials from the environment"
    else:
        return Url(text)
    raise DataError(what, where=f"{where}: {without_secrets(text)}", fix=fix)


def _has_login(text: str) -> bool:
    # A password with a slash ends the parsed host early, which leaves a port that is not a number.
    host = urlsplit(text).netloc
    port = host.rpartition("]")[2].partition(":")[2]  # IPv6 addresses are in brackets
    return "@" in host or (bool(port) and not port.isdecimal())


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
