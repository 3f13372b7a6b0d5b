"""Options for creating shards, and for the `m3i-scale shards` commands that share them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.progress import DownloadColumn, MofNCompleteColumn, Progress, ProgressColumn, TimeRemainingColumn

from m3i_scale.errors import ConfigError, DataError, did_you_mean
from m3i_scale.options import Command, Parts, expanded, writes_to
from m3i_scale.output import print_json, print_line
from m3i_scale.shards.process_pool import DEFAULT_WORKERS

ProgressCallback = Callable[[int, int], None]
"""Called with (completed samples, total samples)."""
Shards = Annotated[str, typer.Argument(help="Folder of shards, brace pattern, or one .tar file.")]
Output = Annotated[Path, typer.Option(callback=writes_to, help="New folder for the shards.")]
Name = Annotated[str, typer.Option(help="Prefix of the shard files.")]
PerShard = Annotated[int, typer.Option(metavar="N", help="Maximum number of samples per shard.")]
Workers = Annotated[int, typer.Option(min=1, metavar="N", help="Number of processes.")]
LabelsFile = Annotated[
    Path | None,
    typer.Option("--labels", help="Class names: JSON list, or one per line. Default: from the input."),
]

_LIMITS = ("samples_per_shard", "max_mb", "multiple_of")


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
    max_skipped: float = 1.0
    """Fraction of skipped samples above which an error is raised."""
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
            raise ConfigError(
                "--samples-per-shard, --max-mb, --multiple-of and --workers must be > 0",
                fix="leave them out to use the defaults",
            )
        if self.shards is None:
            return
        if self.shards < 1:
            raise ConfigError(f"--shards must be > 0, got {self.shards}", fix="use --shards 1 or more")
        default = ShardOptions()
        if any(getattr(self, name) != getattr(default, name) for name in _LIMITS):
            raise ConfigError(
                "--shards cannot be combined with --samples-per-shard, --max-mb or --multiple-of",
                fix="use one or the other",
            )

    def count(self, samples: int, size: int) -> int:
        """Return the number of shards for a split of `samples` samples and `size` bytes."""
        if self.shards is None:
            count = max(math.ceil(samples / self.samples_per_shard), math.ceil(size / 1e6 / self.max_mb))
            return min(samples, math.ceil(count / self.multiple_of) * self.multiple_of)
        if self.shards > samples:
            raise DataError(
                f"--shards must be at most the number of samples, {samples}, got {self.shards}",
                fix=f"use --shards {samples} or less",
            )
        return self.shards


def parse_range(text: str) -> tuple[float, float]:
    """Parse `0,4095` as an intensity window."""
    low, comma, high = text.partition(",")
    try:
        value_range = float(low), float(high)
    except ValueError:
        value_range = (math.nan, math.nan)
    if not comma or not -math.inf < value_range[0] < value_range[1] < math.inf:
        raise ConfigError(
            f"--value-range must be two numbers, the smaller first, got '{text}'", fix="use e.g. --value-range 0,4095"
        )
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
            raise ConfigError(
                f"a split must be NAME=FRACTION, got '{part}'", fix="use e.g. --split train=0.95,val=0.05"
            )
    if min(shares.values()) < 0 or not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
        raise ConfigError(
            f"the fractions of the splits must add up to 1, got {sum(shares.values()):g}",
            fix="use e.g. --split train=0.95,val=0.05",
        )
    return shares


DEFAULTS = ShardOptions()
SIZE_OPTIONS: Parts = {
    "samples_per_shard": (PerShard, DEFAULTS.samples_per_shard),
    "max_mb": (
        Annotated[float, typer.Option(metavar="MB", help="Approximate maximum size of a shard.")],
        DEFAULTS.max_mb,
    ),
    "multiple_of": (
        Annotated[int, typer.Option(metavar="N", help="Round the number of shards up to a multiple of N.")],
        DEFAULTS.multiple_of,
    ),
    "workers": (Workers, DEFAULT_WORKERS),
}
_CUT: Parts = {
    "shard_count": (
        Annotated[int | None, typer.Option("--shards", min=1, metavar="N", help="Exact number of shards per split.")],
        None,
    ),
    **SIZE_OPTIONS,
    "keep_order": (
        Annotated[
            bool, typer.Option("--keep-order", help="Keep the input order. Default: order by a hash of the key.")
        ],
        False,
    ),
}


def takes_sizes(command: Command) -> Command:
    """Replace the parameter `options` of a command by the options for resharding."""
    return expanded(command, "options", _CUT, _cut)


def _cut(shard_count: int | None, **sizes: Any) -> ShardOptions:
    return ShardOptions(shards=shard_count, **sizes)


@contextmanager
def sample_bar(quiet: bool) -> Iterator[ProgressCallback]:
    """Show a progress bar over samples; hidden if standard output is a JSON document."""
    with _bar(MofNCompleteColumn(), quiet) as bar:
        task = bar.add_task("samples", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def progress_bar(shards: Sequence[str], quiet: bool, times: int = 1) -> Iterator[Callable[[int], None]]:
    """Show a progress bar over the bytes of all shards, multiplied by the number of reads; hidden if `quiet`."""
    from m3i_scale.shards.existing_shards import local_shards

    total = 0
    for path in (path for source in shards for path in local_shards(source)):
        with suppress(OSError):  # the reader of the file reports the error
            total += times * path.stat().st_size
    with _bar(DownloadColumn(), quiet) as bar:
        task = bar.add_task("shards", total=total)
        yield lambda size: bar.advance(task, size)


def _bar(amount: ProgressColumn, quiet: bool) -> Progress:
    columns = (*Progress.get_default_columns()[:2], amount, TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet)


def print_summary(summary: dict[str, Any], as_json: bool, lines: Iterable[str]) -> None:
    """Print one JSON document, or lines of text."""
    if as_json:
        print_json(summary)
    else:
        print_line("\n".join(lines))


def choice(option: str, value: str, kind: Any) -> Any:
    """Return the value of an option; raise an error if the `Literal` does not contain it."""
    if value not in get_args(kind):
        raise ConfigError(f"no such value: {option} {value}", fix=did_you_mean(value, get_args(kind)))
    return value
