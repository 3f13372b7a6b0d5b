"""Features of all images of a folder or of shards, extracted on all visible devices."""

from __future__ import annotations

import itertools
import queue
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from m3i_scale.backbones.sources import pretrained_folder
from m3i_scale.data.remote.access import is_remote
from m3i_scale.engine.device import has_fast_bf16
from m3i_scale.errors import ConfigError, DataError, UserError, did_you_mean
from m3i_scale.evaluation.decoding import DecodedSample, Decoder, Sample, decode_file, mapped_ahead
from m3i_scale.evaluation.feature_files import WRITERS, FeatureBlock, check_features_file, joined
from m3i_scale.evaluation.features import Pool, VisionModel, load_vision
from m3i_scale.evaluation.samples import AHEAD, decode_samples, open_table
from m3i_scale.files import replacing
from m3i_scale.rank_variables import usable_cores
from m3i_scale.shards.image_folders import holds_shards, imagefolder_input

Dtype = Literal["auto", "float32", "bfloat16"]
BATCH_SIZE = 64
LISTED = 100
"""Maximum number of skipped images that are listed by name."""
Decoded = AbstractContextManager[Iterator[DecodedSample]]


@dataclass
class _Skipped:
    """Images without features."""

    reasons: Counter[str] = field(default_factory=Counter)
    samples: list[dict[str, str]] = field(default_factory=list)
    """The first `LISTED` of them."""

    def add(self, decoded: DecodedSample) -> None:
        self.reasons[decoded.reason] += 1
        if len(self.samples) < LISTED:
            self.samples.append({"key": _unicode(decoded.key), "reason": decoded.reason})


def embed(
    model: Path | str,
    data: str,
    output: Path | None = None,
    *,
    pool: Pool = "mean",
    batch_size: int = BATCH_SIZE,
    num_workers: int | None = None,
    dtype: Dtype = "auto",
    devices: Sequence[torch.device] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> dict[str, Any]:
    """Extract the features of all images, in the order of the files or of the shards.

    Args:
        model: a folder from `m3i-scale export`, any folder with a vision model of `transformers`, or a Hub id.
        data: a folder of images, which is searched recursively, or shards: a folder, a brace pattern or one .tar.
        output: file to write, .parquet or .npz, replaced if it exists; None: return the arrays of `joined` as `arrays`.
        pool: mean of the patch tokens, class token, or both concatenated.
        batch_size: images per forward pass.
        num_workers: threads that decode images; default: one per usable core.
        dtype: auto: bfloat16 autocast on GPUs that support it, otherwise float32.
        devices: one replica of the model for each; default: all visible GPUs, or the CPU. Features do not depend on
            their number.
        progress: callback for the number of images so far.

    Returns:
        A document: the metadata of the output, numbers of images and of skipped images with reasons, and `arrays` if
        there is no output.
    """
    if pool not in get_args(Pool):
        raise ConfigError(f"no pool '{pool}'", where="--pool", fix=did_you_mean(pool, get_args(Pool)))
    if batch_size < 1 or (num_workers is not None and num_workers < 0):
        raise ConfigError(
            f"the batch size must be 1 or more and the number of workers 0 or more, got {batch_size} and {num_workers}",
            where="embed",
            fix=f"batch_size={BATCH_SIZE}, num_workers=None",
        )
    if output is not None:
        check_features_file(output)
    devices = visible_devices() if devices is None else devices
    compute = _compute_dtype(dtype)
    classes, decode = _open_images(data)
    folder = pretrained_folder(str(model), "embed")
    replicas = [load_vision(folder, pool, device) for device in devices]
    size, skipped, count, width = replicas[0].size, _Skipped(), 0, 0
    metadata = {
        "model": str(model),
        "pool": pool,
        "layer": "last",
        "image_size": size,
        "dtype": str(compute).removeprefix("torch."),
        "classes": classes,
    }

    def counted(blocks: Iterator[FeatureBlock]) -> Iterator[FeatureBlock]:
        nonlocal count, width
        for block in blocks:
            count, width = count + len(block.keys), block.features_BD.shape[1]
            if progress is not None:
                progress("embedding", count)
            yield block
        if not count:
            raise DataError(
                "no image can be used",
                where=data,
                why=_reasons(skipped),
                fix="check one of the images with an image viewer",
            )

    threads = usable_cores() if num_workers is None else num_workers
    with decode(size, threads) as decoded, _encoded(decoded, replicas, batch_size, compute, skipped) as blocks:
        if output is None:
            written: dict[str, Any] = {"arrays": joined(counted(blocks))}
        else:
            _write(output, counted(blocks), metadata)
            written = {"output": str(output)}
    return {
        **written,
        **metadata,
        "feature_width": width,
        "devices": [str(device) for device in devices],
        "images": count,
        "skipped": {
            "count": sum(skipped.reasons.values()),
            "reasons": dict(skipped.reasons),
            "samples": skipped.samples,
        },
    }


def _write(output: Path, blocks: Iterator[FeatureBlock], metadata: dict[str, Any]) -> None:
    try:
        with replacing(output) as file:
            WRITERS[output.suffix](file, blocks, metadata)
    except OSError as error:
        if error.filename != str(output):  # of the data
            raise
        raise ConfigError(
            f"the features cannot be written: {error.strerror}",
            where=str(output),
            fix="free some space, or use another --output",
        ) from None


def visible_devices() -> list[torch.device]:
    """Return all visible GPUs, or the CPU."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return [torch.device("cpu")]
    return [torch.device(accelerator.device_name(number)) for number in range(accelerator.device_count())]


def _compute_dtype(dtype: str) -> torch.dtype:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if dtype not in get_args(Dtype):
        raise ConfigError(f"no dtype '{dtype}'", where="--dtype", fix=did_you_mean(dtype, get_args(Dtype)))
    if dtype == "bfloat16" and not accelerator.is_bf16_supported():
        raise ConfigError("this device does not compute in bfloat16", where="--dtype", fix="--dtype float32")
    if dtype == "auto":
        return torch.bfloat16 if accelerator.device_name() != "cpu" and has_fast_bf16() else torch.float32
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def _open_images(data: str) -> tuple[list[str], Callable[[int, int], Decoded]]:
    """Return the class names, and a function of image size and number of threads that decodes all images."""
    folder = Path(data.removeprefix("file://"))
    if is_remote(data) or not folder.is_dir() or holds_shards(folder):
        table = open_table(data, "--data")
        return table.classes, lambda size, threads: decode_samples(
            table, Decoder(size, len(table.classes) or None), threads=threads
        )
    try:
        listed = imagefolder_input(folder, captions="none")
    except DataError as error:
        if "--layout" in (error.fix or ""):  # an option of `shards make`
            error.fix = f"embed one folder at a time, e.g. --data {folder}/train"
        raise
    files = sorted((record.meta["path"], -1 if record.label is None else record.label) for record in listed.records())

    def decode(size: int, threads: int) -> Decoded:
        return mapped_ahead(lambda file: decode_file(folder / file[0], *file, size), files, threads, AHEAD)

    return listed.labels, decode


def _encoded(
    decoded: Iterator[DecodedSample],
    replicas: list[VisionModel],
    batch_size: int,
    dtype: torch.dtype,
    skipped: _Skipped,
) -> AbstractContextManager[Iterator[FeatureBlock]]:
    """Return an iterator over the features of all batches, in order. A thread for each replica takes the next batch."""
    free: queue.SimpleQueue[VisionModel] = queue.SimpleQueue()
    for replica in replicas:
        free.put(replica)

    def encode(batch: list[Sample]) -> FeatureBlock:
        replica = free.get()  # never waits: there are as many threads as replicas
        try:
            features_BD = _features(replica, batch, dtype)
        finally:
            free.put(replica)
        return FeatureBlock([_unicode(sample.key) for sample in batch], [sample.label for sample in batch], features_BD)

    # Of every replica, one batch computes and one waits.
    return mapped_ahead(encode, _batches(decoded, batch_size, skipped), len(replicas), 2 * len(replicas) - 1)


def _batches(decoded: Iterator[DecodedSample], batch_size: int, skipped: _Skipped) -> Iterator[list[Sample]]:
    def usable() -> Iterator[Sample]:
        for one in decoded:
            if one.sample is None:
                skipped.add(one)
            else:
                yield one.sample

    samples = usable()
    while batch := list(itertools.islice(samples, batch_size)):
        yield batch


def _features(vision: VisionModel, batch: list[Sample], dtype: torch.dtype) -> NDArray[np.float32]:
    """Return the features of a batch: (B, D). All settings of the computation are those of this thread."""
    from deepspeed.accelerator import get_accelerator

    device = vision.device
    if device.index is not None:
        get_accelerator().set_device(device.index)
    half = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    images_BCHW = torch.from_numpy(np.stack([sample.pixels for sample in batch]))
    try:
        with torch.inference_mode(), half:
            features_BD: NDArray[np.float32] = vision.encode(images_BCHW)[0].float().cpu().numpy()
    except torch.OutOfMemoryError:
        raise UserError(
            f"out of memory of {device} with {len(batch)} images in one forward pass",
            where=f"--batch-size {len(batch)}",
            fix=f"--batch-size {max(len(batch) // 2, 1)}",
        ) from None
    return features_BD


def _reasons(skipped: _Skipped) -> str:
    return "; ".join(f"{count} × {reason}" for reason, count in skipped.reasons.items()) or "there are no images"


def _unicode(key: str) -> str:
    """Return a key that files can store: names of files may be invalid Unicode."""
    return key.encode(errors="backslashreplace").decode()
