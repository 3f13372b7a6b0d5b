"""From the run file to how remote shards are read, checked before anything is."""

from __future__ import annotations

import dataclasses

from m3i_scale.config import DataConfig, SourceConfig
from m3i_scale.data.cache import ShardCache
from m3i_scale.data.places import is_remote, to_place
from m3i_scale.data.remote import Access
from m3i_scale.errors import ConfigError

_ONLY_REMOTE = ("cache_gib", "cache_dir", "read_timeout_s", "start_timeout_s")


def check_access(data: DataConfig, sources: dict[str, SourceConfig]) -> Access:
    """How the shards of `sources` are read.

    Raises:
        ConfigError: a setting without effect, or a cache that does not fit on its disk.
        DataError: an address that is not read, or that holds a secret.
    """
    for name, source in {**sources, **data.sources, **data.validation}.items():
        if is_remote(source.shards):
            to_place(source.shards, f"source '{name}'")
    every = [source.shards for source in (*sources.values(), *data.sources.values(), *data.validation.values())]
    access = _access(data)
    if not any(map(is_remote, every)):
        defaults = DataConfig()
        for name in _ONLY_REMOTE:
            if getattr(data, name) != getattr(defaults, name):
                raise ConfigError(
                    f"data.{name} has no effect: all shards are on paths of this host",
                    where=f"data.{name}",
                    fix="leave it out",
                )
    if data.allow_shell and not any(shards.startswith("pipe:") for shards in every):
        raise ConfigError("data.allow_shell has no effect: no source is a pipe", where="data.allow_shell")
    if access.cache_bytes and any(is_remote(source.shards) for source in sources.values()):
        ShardCache(access.cache_dir, access.cache_bytes).check()
    return access


def _access(data: DataConfig) -> Access:
    known = Access(
        attempts=data.read_attempts,
        timeout_s=data.read_timeout_s,
        cache_bytes=int(data.cache_gib * 2**30),
        allow_shell=data.allow_shell,
        start_timeout_s=data.start_timeout_s,
        max_sample_bytes=data.max_sample_bytes,
    )
    return known if data.cache_dir is None else dataclasses.replace(known, cache_dir=data.cache_dir)
