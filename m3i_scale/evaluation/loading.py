"""Batches of decoded samples for an evaluation, from worker processes and in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from m3i_scale.data.augment import CenterCrop
from m3i_scale.data.workers import START_METHOD, DeathWatch
from m3i_scale.errors import LostWorkerError, UserError
from m3i_scale.evaluation.decoding import DecodedSample, Decoder, decode_file
from m3i_scale.evaluation.encoding import Compute
from m3i_scale.evaluation.samples import SampleReader, Table

PREFETCH_BATCHES = 2
"""Batches that every worker decodes ahead."""


@dataclass
class DecodedBatch:
    """Consecutive samples, and their images in one tensor."""

    decoded: list[DecodedSample]
    """Their samples have no `pixels`."""
    images_BCHW: Tensor
    """uint8 images of the usable samples, in their order."""
    error: UserError | None = None
    """Error that ends the reading. It is passed as a value, because an exception of a worker would lose its fields."""


class BatchDataset(Dataset[DecodedBatch]):
    """Dataset of batches. The index of a batch is the range of its sample numbers; `decode` returns one sample."""

    def __init__(self, decode: Callable[[int], DecodedSample]) -> None:
        self._decode = decode

    def __getitem__(self, numbers: range) -> DecodedBatch:
        decoded: list[DecodedSample] = []
        images: list[Tensor] = []
        error: UserError | None = None
        try:
            for number in numbers:
                one = self._decode(number)
                if one.sample is not None:
                    images.append(torch.from_numpy(one.sample.pixels))
                    one.sample.pixels = one.sample.pixels[:, :0]
                decoded.append(one)
        except UserError as caught:
            error = caught
        return DecodedBatch(decoded, torch.stack(images) if images else torch.empty(0, 3, 0, 0), error)


class ShardSamples:
    """Samples of a table's shards, decoded, by their number in dataset order."""

    def __init__(self, table: Table, decoder: Decoder) -> None:
        self._reader, self._decoder = SampleReader(table), decoder

    def __len__(self) -> int:
        return len(self._reader)

    def __call__(self, number: int) -> DecodedSample:
        """Read and decode a sample. Raise DataError if its shard cannot be read."""
        return self._decoder(self._reader.read(self._reader.place(number)))

    def close(self) -> None:
        """Close all shards that this process has read."""
        self._reader.close()


class ImageFiles:
    """Images of a folder, decoded, by their number.

    Args:
        files: path below the folder, and class index (−1 without one), of every image.
        crop: center crop of every image.
    """

    def __init__(self, folder: Path, files: Sequence[tuple[str, int]], crop: CenterCrop) -> None:
        self._folder, self._files, self._crop = folder, files, crop

    def __len__(self) -> int:
        return len(self._files)

    def __call__(self, number: int) -> DecodedSample:
        """Read and decode an image."""
        name, label = self._files[number]
        return decode_file(self._folder / name, name, label, self._crop)

    def close(self) -> None:
        """Do nothing: files are closed after each read."""


@contextmanager
def loaded_batches(samples: ShardSamples | ImageFiles, compute: Compute) -> Iterator[Iterator[DecodedBatch]]:
    """Yield an iterator over the batches of all samples, in order. Workers are forks of this process.

    Args:
        compute: a batch has `batch_size` samples, unusable ones included. `num_workers` 0: this process reads.

    Raises:
        DataError: a shard cannot be read.
        LostWorkerError: a worker was killed.
    """
    count, size = len(samples), compute.batch_size
    batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
    workers = min(compute.num_workers, len(batches)) if len(batches) > 1 else 0  # a fork takes longer than one batch
    watch = DeathWatch()
    loader = DataLoader(
        BatchDataset(samples),
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=START_METHOD if workers else None,
        prefetch_factor=PREFETCH_BATCHES if workers else None,
        generator=torch.Generator(),  # otherwise the loader would advance the generator of the caller
    )
    with watch.starting():
        iterator = iter(loader)
    try:
        yield _received(iterator, watch)
    finally:
        watch.stop(iterator)
        samples.close()


def _received(iterator: Iterator[DecodedBatch], watch: DeathWatch) -> Iterator[DecodedBatch]:
    while True:
        try:
            with watch.waiting():
                batch = next(iterator, None)
        except LostWorkerError as error:
            error.where, error.fix = f"--num-workers {len(watch.workers)}", "lower --num-workers"
            raise
        if batch is None:
            return
        if batch.error is not None:
            raise batch.error
        yield batch
