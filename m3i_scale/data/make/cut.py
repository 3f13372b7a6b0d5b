"""Samples are dealt to splits here, and splits cut into shards."""

from __future__ import annotations

import math
from dataclasses import dataclass

from m3i_scale.errors import ConfigError, DataError

_SIZES = ("samples_per_shard", "max_mb", "multiple_of")


@dataclass(frozen=True)
class ShardOptions:
    """Says how records are cut into shards."""

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
    """Leave out (and list) samples that cannot be used, instead of stopping."""
    workers: int = 1
    """Processes that read and encode images."""
    value_range: tuple[float, float] | None = None
    """Grey values of images of more than eight bits that become black and white; then all images have to be such."""
    shards: int | None = None
    """Exactly so many shards a split, instead of what the sizes say."""
    keep_order: bool = False
    """Fill shards in order of the input; else by a hash of the key."""

    def check(self) -> None:
        """Refuse values that make no sense, or one that the other makes pointless."""
        if min(self.samples_per_shard, self.multiple_of, self.workers) < 1 or self.max_mb <= 0:
            raise ConfigError("samples_per_shard, max_mb, multiple_of and workers must be positive")
        if self.shards is None:
            return
        if self.shards < 1:
            raise ConfigError("--shards must be positive")
        default = ShardOptions()
        if any(getattr(self, name) != getattr(default, name) for name in _SIZES):
            raise ConfigError(
                "--shards says how many shards there are; --samples-per-shard, --max-mb and --multiple-of then do "
                "nothing",
                fix="give one or the other",
            )

    def count(self, samples: int, size: int) -> int:
        """Return the number of shards of a split of so many samples and bytes."""
        if self.shards is None:
            count = max(math.ceil(samples / self.samples_per_shard), math.ceil(size / 1e6 / self.max_mb))
            return min(samples, math.ceil(count / self.multiple_of) * self.multiple_of)
        if self.shards > samples:
            raise DataError(f"{samples} samples cannot fill {self.shards} shards", fix="ask for fewer --shards")
        return self.shards


def parse_range(text: str) -> tuple[float, float]:
    """Read `0,4095` as the grey values that become black and white."""
    low, comma, high = text.partition(",")
    try:
        value_range = float(low), float(high)
    except ValueError:
        value_range = (math.nan, math.nan)
    if not comma or not -math.inf < value_range[0] < value_range[1] < math.inf:
        raise ConfigError(f"'{text}' is no range of values", fix="two numbers, the smaller first: --value-range 0,4095")
    return value_range


def parse_splits(text: str) -> dict[str, float]:
    """Read `train=0.95,val=0.05` as shares that add up to one."""
    shares = {}
    for part in text.split(","):
        split, equals, share = part.partition("=")
        try:
            shares[split.strip()] = float(share)
        except ValueError:
            equals = ""
        if not equals or not split.strip().replace("_", "").replace("-", "").isalnum():
            raise ConfigError(f"'{part}' is no split", fix="write e.g. --split train=0.95,val=0.05")
    if min(shares.values()) < 0 or not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
        raise ConfigError(f"the shares of the splits add up to {sum(shares.values()):g}", fix="make them add up to 1")
    return shares
