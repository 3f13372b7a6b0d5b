"""Sets of options that several commands of `m3i-scale shards` take, defined once."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from m3i_scale.data.cut import Cut, ShardOptions
from m3i_scale.data.options import DEFAULTS, MaxMb, MultipleOf, PerShard, SkipBad, Vocabulary, Workers
from m3i_scale.data.tools.parallel import DEFAULT_WORKERS
from m3i_scale.options import Command, Parts, expanded

_SIZES: Parts = {
    "samples_per_shard": (PerShard, DEFAULTS.samples_per_shard),
    "max_mb": (MaxMb, DEFAULTS.max_mb),
    "multiple_of": (MultipleOf, DEFAULTS.multiple_of),
}
_WORKERS: Parts = {"workers": (Workers, DEFAULT_WORKERS)}
_MAKE: Parts = {
    **_SIZES,
    "vocabulary": (Vocabulary, DEFAULTS.vocabulary),
    "skip_bad": (SkipBad, DEFAULTS.skip_bad),
    **_WORKERS,
}
_CUT: Parts = {
    "shard_count": (
        Annotated[int | None, typer.Option("--shards", min=1, help="Exactly so many shards, of every split.")],
        None,
    ),
    **_SIZES,
    "keep_order": (
        Annotated[
            bool, typer.Option("--keep-order", help="Fill shards in order of the input, not by a hash of the key.")
        ],
        False,
    ),
    **_WORKERS,
}


def takes_shard_options(command: Command) -> Command:
    """Options of everything that makes shards, in place of the parameter `options`."""
    return expanded(command, "options", _MAKE, ShardOptions)


def takes_cut(command: Command) -> Command:
    """Options of everything that cuts shards anew, in place of the parameter `cut`."""
    return expanded(command, "cut", _CUT, _cut)


def _cut(shard_count: int | None, keep_order: bool, **sizes: Any) -> Cut:
    return Cut(ShardOptions(**sizes), shard_count, keep_order)
