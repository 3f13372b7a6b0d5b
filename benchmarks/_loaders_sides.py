"""The libraries that are compared: each opens its loader in the way its own documentation does.

Every one gives batches of uint8 images (B, 3, crop, crop) and their numbers, B of them, shuffled, with one transform.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _loaders import Corpus, write_energon, write_files, write_litdata, write_streaming
from PIL import Image
from torch import Tensor

from m3i_scale.config import AugmentConfig, DataConfig, DatasetConfig
from m3i_scale.data.loader import TrainStream
from m3i_scale.data.shards import read_label_sets

BUFFER = 1_000
"""Samples in the shuffle buffer of libraries that have one."""
SEED = 7
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """What a loader is opened for."""

    corpus: Corpus
    batch: int
    crop: int
    decoder: str
    """Of the peers: pillow, or torchvision."""
    workers: int = 0
    state: Any = None
    """From `Opened.state`; None begins at the beginning."""


@dataclass(frozen=True)
class Opened:
    """A loader in use."""

    batches: Iterator[Batch]
    state: Callable[[], Any]
    """Where it is after the batch that it gave last."""
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Side:
    """A library."""

    package: str
    """What must be importable."""
    opens: Callable[[Task], Opened]
    layout: str = "tar"
    writes: Callable[[Corpus], None] | None = None
    """Makes its layout out of the tars."""
    install: str = "python -m pip install -e '.[peers]'"

    def why_missing(self) -> str | None:
        """Why it cannot be measured; None where it can."""
        try:
            found = importlib.util.find_spec(self.package) is not None
        except ModuleNotFoundError:
            found = False
        return None if found else f"no module '{self.package}'; {self.install}"


class Transform:
    """Encoded bytes, or an opened image, to a view: random crop, flip, uint8 (3, crop, crop). Of all peers."""

    def __init__(self, task: Task) -> None:
        self._crop, self._torchvision = task.crop, task.decoder == "torchvision"

    def decode(self, data: bytes) -> Tensor:
        """A view of encoded bytes."""
        if not self._torchvision:
            return self.view(Image.open(io.BytesIO(data)))
        from torchvision.io import ImageReadMode, decode_image

        pixels = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        top, left = self._corner(pixels.shape[1], pixels.shape[2])
        cut = pixels[:, top : top + self._crop, left : left + self._crop]
        return cut.flip(2) if random.random() < 0.5 else cut.contiguous()

    def view(self, image: Image.Image) -> Tensor:
        """A view of an opened image."""
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        top, left = self._corner(rgb.height, rgb.width)
        cut = rgb.crop((left, top, left + self._crop, top + self._crop))
        if random.random() < 0.5:
            cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(cut).transpose(2, 0, 1))

    def _corner(self, height: int, width: int) -> tuple[int, int]:
        return random.randint(0, height - self._crop), random.randint(0, width - self._crop)


def stack(samples: list[tuple[Tensor, int]]) -> Batch:
    """Samples to a batch."""
    return torch.stack([image for image, _ in samples]), torch.tensor([number for _, number in samples])


def forever(loader: Any) -> Iterator[Any]:
    """Pass after pass, until one is empty: what a library gives that forgets the rest of its buffer in a resume."""
    given = True
    while given:
        given = False
        for batch in loader:
            given = True
            yield batch


def counted(batches: Iterator[Batch], before: int) -> tuple[Iterator[Batch], Callable[[], int]]:
    """The same batches, and how many there were, with those before."""
    counter = itertools.count(before + 1)
    seen = [before]

    def count() -> Iterator[Batch]:
        for batch in batches:
            seen[0] = next(counter)
            yield batch

    return count(), lambda: seen[0]


def open_ours(task: Task) -> Opened:
    """This project's stream; the state is taken after every batch, as a run that may be killed needs it."""
    plain = AugmentConfig(color_jitter_p=0, grayscale=0, blur=[0], solarize=[0], crop_ratio=(1, 1), crop_scale=(1, 1))
    with Image.open(io.BytesIO(next(task.corpus.encoded())[1])) as first:
        share = task.crop**2 / (first.width * first.height)
    augment = plain.model_copy(update={"crop_scale": (share, share)})
    sources = {"main": DatasetConfig(path=str(task.corpus.folder / "tar"))}
    stream = TrainStream(
        DataConfig(datasets=sources, num_workers=task.workers, augment=augment),
        sources,
        views=1,
        image_size=task.crop,
        micro_batch_size=task.batch,
        world_size=1,
        rank=0,
        seed=SEED,
        tokenizer=None,
        max_tokens=1,
        label_sets=read_label_sets(sources),
        cache_dir=task.corpus.folder / "cache",
    )
    if task.state is not None:
        stream.load_state_dict(task.state)
    batches = iter(stream)
    last: list[Any] = [None]

    def give() -> Iterator[Batch]:
        for batch in batches:
            last[0] = stream.state_dict()
            yield batch.images_VBCHW[0], batch.labels_B

    return Opened(give(), lambda: last[0], batches.close)


def open_webdataset(task: Task) -> Opened:
    """Shards and a buffer shuffled by seed. It has no state: what was given is read again, and not decoded."""
    import webdataset as wds

    transform, given = Transform(task), task.state or 0
    shuffled = wds.WebDataset(
        [str(path) for path in task.corpus.shards],
        shardshuffle=len(task.corpus.shards),
        detshuffle=True,
        seed=SEED,
        workersplitter=wds.split_by_worker,
    ).compose(wds.filters.detshuffle(BUFFER, seed=SEED))
    if given:
        worker_gave = _Skip(given, task.batch)
        shuffled = shuffled.compose(worker_gave)
    kind = task.corpus.kind
    if task.decoder == "torchvision":
        decoded = shuffled.to_tuple(kind, "cls").map_tuple(transform.decode, int)
    else:
        decoded = shuffled.decode("pilrgb", only=kind).to_tuple(kind, "cls").map_tuple(transform.view, int)
    loader = wds.WebLoader(decoded.batched(task.batch, collation_fn=stack), batch_size=None, num_workers=task.workers)
    return Opened(*counted(forever(loader), given))


class _Skip:
    """Leave out the samples of batches that were given before, by all workers in turn. Once."""

    def __init__(self, batches: int, batch: int) -> None:
        self._batches, self._batch = batches, batch

    def __call__(self, samples: Iterator[Any]) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        mine = (self._batches - worker + workers - 1) // workers
        self._batches = 0
        return itertools.islice(samples, mine * self._batch, None)


def open_datasets(task: Task) -> Opened:
    """Its reader of webdataset shards, streamed, with a buffer; states are its own, which leave the buffer out."""
    import datasets

    transform, kind = Transform(task), task.corpus.kind
    files = [str(path) for path in task.corpus.shards]
    cache = str(task.corpus.folder / "hf")
    data = datasets.load_dataset(
        "webdataset", data_files={"train": files}, split="train", streaming=True, cache_dir=cache
    )
    if task.decoder == "torchvision":
        data = data.cast_column(kind, datasets.Image(decode=False))

    def sample(row: dict[str, Any]) -> tuple[Tensor, int]:
        image = row[kind]
        view = transform.decode(image["bytes"]) if isinstance(image, dict) else transform.view(image)
        return view, int(row["cls"])

    data = data.shuffle(seed=SEED, buffer_size=BUFFER)
    if task.state is not None:
        data.load_state_dict(task.state)
    loader = torch.utils.data.DataLoader(
        data, task.batch, num_workers=task.workers, collate_fn=lambda rows: stack([sample(row) for row in rows])
    )
    return Opened(forever(loader), data.state_dict)


class Files(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Loose files."""

    def __init__(self, task: Task) -> None:
        self._paths = sorted((task.corpus.folder / "files").rglob(f"*.{task.corpus.kind}"))
        self._transform = Transform(task)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        path = self._paths[number]
        return self._transform.decode(path.read_bytes()), int(path.stem)


def open_torchdata(task: Task) -> Opened:
    """Loose files through its stateful loader."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader = StatefulDataLoader(
        Files(task),
        task.batch,
        shuffle=True,
        num_workers=task.workers,
        collate_fn=stack,
        generator=torch.Generator().manual_seed(SEED),
    )
    if task.state is not None:
        loader.load_state_dict(task.state)
    return Opened(forever(loader), loader.state_dict)


def open_streaming(task: Task) -> Opened:
    """mosaicml-streaming from its own format, shuffled in its default way."""
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    transform = Transform(task)

    class Samples(StreamingDataset):
        def __getitem__(self, at: int) -> tuple[Tensor, int]:
            row = super().__getitem__(at)
            return transform.decode(row["image"]), row["number"]

    folder = str(task.corpus.folder / "streaming")
    data = Samples(local=folder, shuffle=True, batch_size=task.batch, shuffle_seed=SEED)
    loader = StreamingDataLoader(data, batch_size=task.batch, num_workers=task.workers, collate_fn=stack)
    if task.state is not None:
        loader.load_state_dict(task.state)
    return Opened(forever(loader), loader.state_dict)


def open_litdata(task: Task) -> Opened:
    """Litdata from its own chunks."""
    from litdata import StreamingDataLoader, StreamingDataset

    transform = Transform(task)
    data = StreamingDataset(
        str(task.corpus.folder / "litdata"),
        shuffle=True,
        seed=SEED,
        transform=lambda row: (transform.decode(row["image"]), row["number"]),
    )
    loader = StreamingDataLoader(data, batch_size=task.batch, num_workers=task.workers, collate_fn=stack)
    if task.state is not None:
        loader.load_state_dict(task.state)
    return Opened(forever(loader), loader.state_dict)


def open_energon(task: Task) -> Opened:
    """Megatron-Energon over its own index; see `_loaders_energon`, which needs it at import."""
    from _loaders_energon import opened

    batches, state = opened(task, SEED, BUFFER)
    return Opened(batches, state)


_UNPINNED = (
    "python -m pip install --no-deps mosaicml-streaming && python -m pip install brotli python-snappy xxhash zstd "
    "catalog (it asks for older numpy and transformers, and works without)"
)
OURS = "m3i_scale"
SIDES = {
    OURS: Side("m3i_scale", open_ours),
    "webdataset": Side("webdataset", open_webdataset),
    "energon": Side("megatron.energon", open_energon, "energon", write_energon),
    "streaming": Side("streaming", open_streaming, "streaming", write_streaming, _UNPINNED),
    "datasets": Side("datasets", open_datasets),
    "torchdata": Side("torchdata", open_torchdata, "files", write_files),
    "litdata": Side("litdata", open_litdata, "litdata", write_litdata),
}


def prepare(corpus: Corpus, names: list[str]) -> None:
    """Make the layouts that these sides read."""
    for name in names:
        side = SIDES[name]
        if side.writes is not None and not (corpus.folder / side.layout).exists():
            side.writes(corpus)


def task_of(values: dict[str, Any]) -> Task:
    """A task out of JSON types."""
    corpus = Corpus(Path(values["folder"]), values["samples"], values["kind"])
    return Task(corpus, values["batch"], values["crop"], values["decoder"])
