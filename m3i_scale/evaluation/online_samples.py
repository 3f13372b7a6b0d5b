"""Images of the online evaluation: a fixed subset of two datasets, distributed over the ranks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3i_scale.data.augment import CenterCrop
from m3i_scale.data.index import load_index
from m3i_scale.data.remote.access import check_access
from m3i_scale.data.scan import ShardIndex
from m3i_scale.engine.agree import gather_objects, open_together
from m3i_scale.errors import DataError
from m3i_scale.evaluation.samples import Table, open_table, read_samples
from m3i_scale.objective.ranks import ProcessGroupRanks
from m3i_scale.rank_variables import ranks_on_host, usable_cores
from m3i_scale.run.setup import ResolvedRun

_SEED = 37
"""Seed of the subset, which is the same in every run."""


@dataclass(frozen=True)
class Annotations:
    """Labels and captions of the images of a split, over all ranks, in the order of the features."""

    labels_N: NDArray[np.int64]
    """Class of every image, −1 without one."""
    captions: Sequence[str | None]
    classes: Sequence[str]

    @property
    def labeled(self) -> NDArray[np.int64]:
        """Return the indices of the images with a class."""
        return np.flatnonzero(self.labels_N >= 0).astype(np.int64)

    @property
    def captioned(self) -> NDArray[np.int64]:
        """Return the indices of the images with a caption."""
        return np.asarray([number for number, caption in enumerate(self.captions) if caption], dtype=np.int64)

    @property
    def present(self) -> NDArray[np.int64]:
        """Return the classes that have images."""
        return np.unique(self.labels_N[self.labeled])


@dataclass(frozen=True)
class Split:
    """Images of `evaluation.online.data` or `train_data`."""

    images_NCHW: Tensor
    """This rank's part: uint8, on the CPU."""
    most: int
    """Number of images of the rank with most images."""
    order_N: NDArray[np.int64]
    """Position in the features of all ranks, concatenated, of every image in dataset order."""
    annotations: Annotations
    left_out: Counter[str]
    """Unreadable samples of all ranks, by reason."""


def read_split(resolved: ResolvedRun, ranks: ProcessGroupRanks, key: str, path: str, most: int) -> Split:
    """Read this rank's part of at most `most` images of the shards in `path`, the value of `evaluation.online.<key>`.
    Collective. Raise DataError if no image is readable."""
    run, where, side = resolved.run, f"evaluation.online.{key}", resolved.image_size

    threads = max(usable_cores() // (ranks_on_host(os.environ) or 1), 1)

    def read() -> tuple[Table, list[NDArray[np.uint8]]]:
        table = open_table(path, where, check_access(run.data, run.data.datasets))
        index_dir = run.output_dir / "index"  # the cache of the training data
        table.indices = load_index(table.shards, index_dir, rank=ranks.rank, access=table.access)
        places = subset(table.indices, most)[ranks.rank :: ranks.world_size]
        crop = CenterCrop(side, side)
        pixels = [sample.pixels for sample in read_samples(table, crop, places=places, threads=threads)]
        table.indices = None  # large, and not needed any more
        return table, pixels

    table, pixels = open_together(read)
    parts = gather_objects((table.places, table.labels, table.captions, table.left_out))
    left_out = sum((part[3] for part in parts), Counter[str]())
    places = [place for part in parts for place in part[0]]
    if not places:
        raise DataError(f"no readable image: {count_reasons(left_out)}", where=f"{where}: {path}").raised_everywhere()
    order_N = np.asarray(sorted(range(len(places)), key=places.__getitem__), dtype=np.int64)
    labels = np.asarray([label for part in parts for label in part[1]], dtype=np.int64)
    captions = [caption for part in parts for caption in part[2]]
    annotations = Annotations(labels[order_N], [captions[number] for number in order_N], table.classes)
    images = torch.from_numpy(np.stack(pixels)) if pixels else torch.zeros(0, 3, side, side, dtype=torch.uint8)
    return Split(images, max(len(part[0]) for part in parts), order_N, annotations, left_out)


def subset(indices: Sequence[ShardIndex], most: int) -> list[tuple[int, int]]:
    """Return shard and position in it of at most `most` samples: all, or a random subset, in dataset order."""
    ends = np.cumsum([len(index) for index in indices])
    total = int(ends[-1])
    chosen = np.arange(total)
    if total > most:
        chosen = np.sort(np.random.default_rng(_SEED).choice(total, most, replace=False))
    shards = np.searchsorted(ends, chosen, side="right")
    starts = np.concatenate([[0], ends[:-1]])[shards]
    return list(zip(shards.tolist(), (chosen - starts).tolist(), strict=True))


def count_reasons(left_out: Counter[str]) -> str:
    """Return the number of skipped samples by reason as text."""
    return ", ".join(f"{count} × {reason}" for reason, count in left_out.items()) or "the shards are empty"
