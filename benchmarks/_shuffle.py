"""The order in which loaders hand out samples, as it is observed: ours, webdataset's and Megatron-Energon's.

Every loader is asked for the same number of samples, one global batch after the other; a batch over several ranks is
the parts of all ranks, one behind the other. Keys are stored indices, so nothing but the key of a sample is looked at.
"""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from clumping import closeness, correlation
from numpy.typing import NDArray
from PIL import Image

from m3i_scale.config import DataConfig, DatasetConfig
from m3i_scale.data.loader import TrainStream

Indices = NDArray[np.int64]
IMAGE_SIZE = 8
NAME = "s-{:05d}.tar"


@dataclass(frozen=True)
class Shards:
    """What all loaders read: shards of one class each, classes one behind the other."""

    folder: Path
    count: int
    samples_per_shard: int
    shards_per_class: int

    @property
    def samples(self) -> int:
        """Of all shards."""
        return self.count * self.samples_per_shard

    @property
    def paths(self) -> list[str]:
        """In stored order."""
        return [str(self.folder / NAME.format(shard)) for shard in range(self.count)]


@dataclass(frozen=True)
class Setting:
    """One way to shuffle."""

    loader: str
    """ours, webdataset, energon, or uniform: what draws without replacement give, for comparison."""
    ranks: int
    options: dict[str, int | bool | None]
    held_samples: int
    """Samples that wait in memory to be shuffled, over all ranks; the batch itself not counted."""


def make_shards(folder: Path, count: int, samples_per_shard: int, shards_per_class: int) -> Shards:
    """Keys in ascending order, a picture of a few pixels and a label each."""
    folder.mkdir(parents=True)
    buffer = io.BytesIO()
    Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE)).save(buffer, "PNG")
    classes = -(-count // shards_per_class)
    for shard in range(count):
        with tarfile.open(folder / NAME.format(shard), "w") as tar:
            for index in range(shard * samples_per_shard, (shard + 1) * samples_per_shard):
                label = str(shard // shards_per_class).encode()
                for extension, content in (("png", buffer.getvalue()), ("cls", label)):
                    info = tarfile.TarInfo(f"{index:08d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (folder / "labels.json").write_text(json.dumps([f"class {number}" for number in range(classes)]))
    return Shards(folder, count, samples_per_shard, shards_per_class)


def measured(shards: Shards, setting: Setting, batch_size: int, seed: int, work: Path) -> dict[str, Any]:
    """How far from uniform the batches of a loader are; two passes are read.

    Args:
        shards: what is read.
        setting: by which loader, and how.
        batch_size: over all ranks.
        seed: of the order.
        work: folder that this call may fill.
    """
    each = batch_size // setting.ranks
    read = {"uniform": _uniform, "ours": _ours, "webdataset": _webdataset, "energon": _energon}[setting.loader]
    parts = [read(shards, setting, rank, each, seed, work) for rank in range(setting.ranks)]
    steps = shards.samples // batch_size
    batches = [np.concatenate(part) for part in itertools.islice(zip(*parts, strict=True), 2 * steps)]
    if len(batches) < 2 * steps:
        raise RuntimeError(f"{setting.loader} gave {len(batches)} batches of two passes, {2 * steps} were to come")
    first, sizes = batches[:steps], [shards.samples_per_shard] * shards.count
    classes = np.bincount(np.arange(shards.count) // shards.shards_per_class) * shards.samples_per_shard
    batch = closeness(first, sizes)
    return {
        **asdict(setting),
        "batch": asdict(batch),
        "rank": asdict(closeness([found[:each] for found in first], sizes)),
        "class_clumping": closeness(first, classes.tolist()).clumping,
        "effective_batch": batch_size / max(batch.clumping, 1.0),
        "epoch_correlation": _epoch_correlation(np.concatenate(batches)),
        "seen_in_one_pass": len(np.unique(np.concatenate(first))) / (steps * batch_size),
    }


def _epoch_correlation(order: Indices) -> float:
    """Of the places where samples come first and where they come again, whether or not passes have borders."""
    sorted_places = np.argsort(order, kind="stable")
    ordered = order[sorted_places]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    counts = np.diff(np.concatenate((starts, [len(ordered)])))
    again = starts[counts > 1]
    first, second = sorted_places[again], sorted_places[again + 1]
    return correlation(np.argsort(first), np.argsort(second))


# -------------------------------------------------------------------- loaders: batches of one rank, endlessly


def _uniform(shards: Shards, setting: Setting, rank: int, size: int, seed: int, work: Path) -> Iterator[Indices]:
    random_numbers = np.random.default_rng(seed)
    while True:
        order = random_numbers.permutation(shards.samples)
        yield from order[: len(order) // size * size].reshape(-1, size)


def _ours(shards: Shards, setting: Setting, rank: int, size: int, seed: int, work: Path) -> Iterator[Indices]:
    sources = {"s": DatasetConfig(path=str(shards.folder), labels=False)}
    stream = TrainStream(
        DataConfig(datasets=sources, **setting.options),
        sources,
        views=1,
        image_size=IMAGE_SIZE,
        micro_batch_size=size,
        world_size=setting.ranks,
        rank=rank,
        seed=seed,
        tokenizer=None,
        max_tokens=1,
        label_sets={},
        cache_dir=work,
        augment=False,
    )
    for batch in stream:
        yield np.asarray([int(key.rpartition("/")[2]) for key in batch.keys])


def _webdataset(shards: Shards, setting: Setting, rank: int, size: int, seed: int, work: Path) -> Iterator[Indices]:
    """Every rank reads every n-th shard, in an order of its own; buffers are full before a sample leaves them."""
    import webdataset

    buffer, seed = setting.options["buffer"], seed + 1_000 * rank  # a pass adds one
    own = shards.paths[rank :: setting.ranks]
    data = webdataset.WebDataset(
        own,
        shardshuffle=shards.count,
        detshuffle=setting.options["detshuffle"],
        seed=seed,
        nodesplitter=None,
        workersplitter=None,
    ).compose(webdataset.filters.detshuffle(buffer, initial=buffer, seed=seed))
    while True:  # a pass; what is no whole batch at its end is dropped
        keys = (int(sample["__key__"]) for sample in data)
        while len(batch := list(itertools.islice(keys, size))) == size:
            yield np.asarray(batch)


def _energon(shards: Shards, setting: Setting, rank: int, size: int, seed: int, work: Path) -> Iterator[Indices]:
    """Endless: its buffer reaches over the border of two passes."""
    from megatron import energon

    @energon.stateless
    def with_key(sample: dict[str, Any]) -> Any:
        return energon.TextSample(**energon.basic_sample_keys(sample), text="")

    class Keys(energon.DefaultTaskEncoder):
        decoder = None
        cookers = (energon.Cooker(with_key),)

        def batch(self, samples: list[Any]) -> list[str]:
            return [sample.__key__ for sample in samples]

    _prepare_energon(shards)
    config = energon.WorkerConfig(rank=rank, world_size=setting.ranks, num_workers=0, seed_offset=seed)
    data = energon.get_train_dataset(
        str(shards.folder), worker_config=config, batch_size=size, task_encoder=Keys(), **setting.options
    )
    for keys in energon.get_loader(data, watchdog_timeout_seconds=None):
        yield np.asarray([int(key.rpartition("/")[2]) for key in keys])


def _prepare_energon(shards: Shards) -> None:
    """The index that it wants beside the shards."""
    from megatron.energon.flavors.webdataset import BaseWebdatasetFactory

    beside = shards.folder / ".nv-meta"
    if beside.exists():
        return
    beside.mkdir()
    names = [Path(path).name for path in shards.paths]
    BaseWebdatasetFactory.prepare_dataset(
        shards.folder, names, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=1
    )
    (beside / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")
