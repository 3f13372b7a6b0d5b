"""Features of all images of a folder or of shards, extracted on all visible devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from m3i_scale.backbones.sources import pretrained_folder
from m3i_scale.data.augment import CenterCrop
from m3i_scale.data.remote.access import is_remote
from m3i_scale.errors import ConfigError, DataError, did_you_mean
from m3i_scale.evaluation.decoding import DecodedSample, Decoder
from m3i_scale.evaluation.encoding import Dtype, compute_of, encoded
from m3i_scale.evaluation.feature_files import WRITERS, FeatureBlock, check_features_file, joined
from m3i_scale.evaluation.features import Pool, VisionModel, load_vision
from m3i_scale.evaluation.loading import DecodedBatch, ImageFiles, ShardSamples, loaded_batches
from m3i_scale.evaluation.samples import open_table
from m3i_scale.files import replacing
from m3i_scale.shards.image_folders import holds_shards, imagefolder_input

LISTED = 100
"""Maximum number of skipped images that are listed by name."""


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
    batch_size: int | None = None,
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
        batch_size: images per forward pass; default: 64, on CPUs 16.
        num_workers: processes that read and decode images; default: one per usable core.
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
    if output is not None:
        check_features_file(output)
    compute = compute_of("auto" if devices is None else devices, dtype, batch_size, num_workers)
    classes, samples_of = _open_images(data)
    folder = pretrained_folder(str(model), "embed")
    replicas = [load_vision(folder, pool, device) for device in compute.devices]
    skipped, count, width = _Skipped(), 0, 0
    metadata = {
        "model": str(model),
        "pool": pool,
        "layer": "last",
        "image_size": replicas[0].size,
        "dtype": compute.dtype_name,
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

    with (
        loaded_batches(samples_of(replicas[0].crop), compute) as batches,
        encoded(_usable(batches, skipped), replicas, compute, _encode) as blocks,
    ):
        if output is None:
            written: dict[str, Any] = {"arrays": joined(counted(blocks))}
        else:
            _write(output, counted(blocks), metadata)
            written = {"output": str(output)}
    return {
        **written,
        **metadata,
        "feature_width": width,
        "devices": [str(device) for device in compute.devices],
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


def _open_images(data: str) -> tuple[list[str], Callable[[CenterCrop], ShardSamples | ImageFiles]]:
    """Return the class names, and a function of the center crop that returns all samples."""
    folder = Path(data.removeprefix("file://"))
    if is_remote(data) or not folder.is_dir() or holds_shards(folder):
        table = open_table(data, "--data")
        return table.classes, lambda crop: ShardSamples(table, Decoder(crop, len(table.classes) or None))
    try:
        listed = imagefolder_input(folder, captions="none")
    except DataError as error:
        if "--layout" in (error.fix or ""):  # an option of `shards make`
            error.fix = f"embed one folder at a time, e.g. --data {folder}/train"
        raise
    files = sorted((record.meta["path"], -1 if record.label is None else record.label) for record in listed.records())

    return listed.labels, lambda crop: ImageFiles(folder, files, crop)


def _usable(batches: Iterator[DecodedBatch], skipped: _Skipped) -> Iterator[tuple[Tensor, tuple[list[str], list[int]]]]:
    """Yield images, keys and labels of the batches, without unusable samples, which are counted."""
    for batch in batches:
        samples = [one.sample for one in batch.decoded if one.sample is not None]
        for decoded in batch.decoded:
            if decoded.sample is None:
                skipped.add(decoded)
        if samples:
            yield batch.images_BCHW, ([_unicode(one.key) for one in samples], [one.label for one in samples])


def _encode(vision: VisionModel, images_BCHW: Tensor, of_images: tuple[list[str], list[int]]) -> FeatureBlock:
    return FeatureBlock(*of_images, vision.encode(images_BCHW)[0].float().cpu().numpy())


def _reasons(skipped: _Skipped) -> str:
    return "; ".join(f"{count} × {reason}" for reason, count in skipped.reasons.items()) or "there are no images"


def _unicode(key: str) -> str:
    """Return a key that files can store: names of files may be invalid Unicode."""
    return key.encode(errors="backslashreplace").decode()
