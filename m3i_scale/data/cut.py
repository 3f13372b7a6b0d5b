"""Into how many shards samples are cut."""

from __future__ import annotations

import math
from dataclasses import dataclass

from m3i_scale.errors import ConfigError, DataError


@dataclass(frozen=True)
class ShardOptions:
    """How records are cut into shards."""

    samples_per_shard: int = 10_000
    """At most so many samples a shard."""
    max_mb: float = 500.0
    """About so many megabytes (10⁶ bytes) a shard at most."""
    multiple_of: int = 8
    """The number of shards of a split is rounded up to a multiple of this, so that streams (8 by default) hardly share
    shards, which each of them would read or fetch; a split with fewer samples gets one shard a sample."""
    vocabulary: int = 8_192
    """Size of the tokenizer trained on the captions; 0 trains none."""
    skip_bad: bool = False
    """Leave out (and count) samples that cannot be used, instead of stopping."""
    workers: int = 1
    """Processes that read and encode images."""


@dataclass(frozen=True)
class Cut:
    """How samples are cut into shards."""

    options: ShardOptions
    shards: int | None = None
    """Exactly so many shards a split, instead of what the options say."""
    keep_order: bool = False
    """Fill shards in order of the input; else by a hash of the key, as `make` does."""

    def count(self, samples: int, size: int) -> int:
        """Number of shards of a split.

        Raises:
            DataError: more shards than samples.
        """
        if self.shards is None:
            return shard_count(samples, size, self.options)
        if self.shards > samples:
            raise DataError(f"{samples} samples cannot fill {self.shards} shards", fix="ask for fewer --shards")
        return self.shards


def check_options(options: ShardOptions) -> None:
    """All of them must be positive.

    Raises:
        ConfigError: they are not.
    """
    if min(options.samples_per_shard, options.multiple_of, options.workers) < 1 or options.max_mb <= 0:
        raise ConfigError("samples_per_shard, max_mb, multiple_of and workers must be positive")


def shard_count(samples: int, size: int, options: ShardOptions) -> int:
    """How many shards a split of so many samples and bytes gets."""
    wanted = max(math.ceil(samples / options.samples_per_shard), math.ceil(size / 1e6 / options.max_mb))
    return min(samples, math.ceil(wanted / options.multiple_of) * options.multiple_of)
