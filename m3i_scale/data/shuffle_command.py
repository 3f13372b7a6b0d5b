"""`m3i-scale shards shuffle`, and the same figure as a part of `shards check`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m3i_scale.data.options import AsJson, Shards, ShuffleShards, Streams
from m3i_scale.defaults import SHUFFLE_SHARDS, STREAMS
from m3i_scale.output import print_json

if TYPE_CHECKING:  # importing it takes seconds, which --help has not
    from m3i_scale.data.shuffle import ShuffleQuality


def shuffle(
    shards: Shards,
    batch_size: Annotated[int, typer.Option(min=2, help="Samples of one forward pass, over all ranks.")],
    streams: Streams = STREAMS,
    shuffle_shards: ShuffleShards = SHUFFLE_SHARDS,
    world_size: Annotated[int, typer.Option(min=1, help="Ranks.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the run.")] = 0,
    as_json: AsJson = False,
) -> None:
    """How far batches are from uniform draws, from the order alone: no image is read. 1 is uniform, more is worse."""
    from m3i_scale.data.index import load_index
    from m3i_scale.data.shards import expand_shards
    from m3i_scale.data.shuffle import shuffle_quality

    paths = expand_shards(shards)
    with tempfile.TemporaryDirectory() as cache:
        sizes = [len(index) for index in load_index(paths, Path(cache))]
    found = shuffle_quality(
        sizes,
        streams=streams,
        shuffle_shards=shuffle_shards,
        batch_size=batch_size,
        world_size=world_size,
        seed=seed,
        where=shards,
    )
    if as_json:
        print_json(found.to_json())
    else:
        sys.stdout.write("\n".join(shuffle_lines(found)) + "\n")


def shuffle_lines(found: ShuffleQuality) -> Sequence[str]:
    """The figures as text."""
    lines = [
        f"{found.samples} samples in {found.shards} shards, {found.streams} streams, windows of "
        f"{found.shuffle_shards} shards"
    ]
    parts = [("batch", found.batch_size, found.batch)]
    if found.world_size > 1:
        parts.append(("rank", found.batch_size // found.world_size, found.rank))
    for name, size, part in parts:
        lines.append(
            f"{name} of {size}: clumping {part.clumping:.2f}, stored neighbours meet {part.neighbours:.2f} times as "
            f"often as by chance, {part.own_shard:.1%} of a sample's companions are from its shard"
        )
    worth = f"a batch is worth {found.effective_batch:.0f} samples for what is alike within a shard"
    known = "" if found.label_batch is None else f", and {found.label_batch:.0f} as to its labels"
    lines.append(worth + known)
    lines.append(f"two passes correlate by {found.epoch_correlation:.3f}")
    if found.warning is not None:
        lines += [f"warning: {found.warning}", f"  fix: {found.fix}"]
    return lines
