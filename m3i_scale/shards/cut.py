"""Rules for assigning samples to splits and cutting splits into shards."""

from __future__ import annotations

import math
from dataclasses import dataclass

from m3i_scale.errors import ConfigError, DataError

_SIZES = ("samples_per_shard", "max_mb", "multiple_of")


@dataclass(frozen=True)
class ShardOptions:
    """Options for cutting records into shards."""

    samples_per_shard: int = 10_000
    """Maximum number of samples per shard."""
    max_mb: float = 500.0
    """Approximate maximum size of a shard in megabytes (10⁶ bytes)."""
    multiple_of: int = 8
    """The number of shards per split is rounded up to a multiple of this, so that few shards are read by several
    streams (8 by default). A split with fewer samples gets one shard per sample."""
    vocabulary: int = 8_192
    """Vocabulary size of the tokenizer trained on the captions; 0 trains none."""
    skip_bad: bool = False
    """Skip and list unusable samples instead of raising an error."""
    workers: int = 1
    """Number of processes that read and encode images."""
    value_range: tuple[float, float] | None = None
    """Intensity window of images with more than 8 bits; all images must then have more than 8 bits."""
    shards: int | None = None
    """Exact number of shards per split; replaces the size limits."""
    keep_order: bool = False
    """Fill shards in input order instead of by a hash of the key."""

    def check(self) -> None:
        """Validate the values and their combination."""
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
        """Return the number of shards for a split of `samples` samples and `size` bytes."""
        if self.shards is None:
            count = max(math.ceil(samples / self.samples_per_shard), math.ceil(size / 1e6 / self.max_mb))
            return min(samples, math.ceil(count / self.multiple_of) * self.multiple_of)
        if self.shards > samples:
            raise DataError(f"{samples} samples cannot fill {self.shards} shards", fix="ask for fewer --shards")
        return self.shards


def parse_range(text: str) -> tuple[float, float]:
    """Parse `0,4095` as an intensity window."""
    low, comma, high = text.partition(",")
    try:
        value_range = float(low), float(high)
    except ValueError:
        value_range = (math.nan, math.nan)
    if not comma or not -math.inf < value_range[0] < value_range[1] < math.inf:
        raise ConfigError(f"'{text}' is no range of values", fix="two numbers, the smaller first: --value-range 0,4095")
    return value_range


def parse_splits(text: str) -> dict[str, float]:
    """Parse `train=0.95,val=0.05` as fractions that sum to one."""
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
