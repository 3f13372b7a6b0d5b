"""Public functions for the results of a run, like the commands of the same name: export, evaluate, embed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from m3i_scale.files import local_path
from m3i_scale.output import leave_out_accelerator_warning
from m3i_scale.text import printable

if TYPE_CHECKING:  # imported inside the functions, to keep the import of a name fast
    from numpy.typing import NDArray

    from m3i_scale.evaluation.encoding import Dtype as EvaluationDtype
    from m3i_scale.evaluation.features import Pool
    from m3i_scale.exports.export import Dtype, Weights
    from m3i_scale.exports.write import Format, Task


def export(
    run_dir: str | Path,
    output: str | Path,
    *,
    weights: Weights = "student",
    dtype: Dtype = "float32",
    task: Task = "features",
    format: Format = "transformers",  # as on the command line
    label_set: str | None = None,
    overwrite: bool = False,
    license: str = "other",
) -> Path:
    """Export a checkpoint as a folder for `transformers` or timm, and verify it in a fresh process.

    Examples:
        >>> m3i_scale.export("/data/runs/first", "/data/export", weights="ema")

    Args:
        run_dir: output directory of a run (its latest valid checkpoint), or one checkpoint.
        output: folder to write, new or empty.
        weights: student or ema.
        dtype: float32 or bfloat16.
        task: features, classification, segmentation, detection, zero_shot or backbone.
        format: transformers, timm, or onnx: an additional file for ONNX Runtime.
        label_set: label set of the exported classifier.
        overwrite: replace an earlier export.
        license: license of the weights for the model card, as a Hub license id.

    Returns:
        The folder.

    Raises:
        UserError: there is no valid checkpoint, or it does not contain what is requested.
    """
    leave_out_accelerator_warning()
    from m3i_scale.exports.export import export as export_checkpoint
    from m3i_scale.exports.write import ExportContents

    folder = local_path(output, "output")
    contents = ExportContents(task, format, label_set)
    export_checkpoint(run_dir, folder, weights, dtype, wanted=contents, overwrite=overwrite, license_id=license)
    return folder


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    train_data: str | Path | None = None,
    measures: Sequence[str] | None = None,
    pool: Pool = "mean",
    batch_size: int | None = None,
    num_workers: int | None = None,
    dtype: EvaluationDtype = "auto",
    device: str = "auto",
) -> dict[str, Any]:
    """Evaluate the frozen features of a model, or a trained head.

    Examples:
        >>> result = m3i_scale.evaluate("/data/export", "/data/shards/val", train_data="/data/shards/train",
        ...                             measures=["knn", "linear"])
        >>> result["measures"]["linear"]["accuracy"]["value"]

    Args:
        model: a folder from `export`, or any folder with a vision model of `transformers`.
        data: test shards.
        train_data: training shards of the probes.
        measures: knn, few_shot, linear, dense, classifier, zero_shot, retrieval; or segmenter or detector. Default: all
            that the model supports.
        pool: image features of the probes: mean of the patch tokens, class token, or both.
        batch_size: images per forward pass.
        num_workers: processes that decode images; default: one per core.
        dtype: auto (bfloat16 on GPUs that support it, otherwise float32), float32 or bfloat16.
        device: auto (all visible GPUs, or the CPU), cpu, cuda, cuda:1, …

    Returns:
        The document of `m3i-scale evaluate --json`: metrics with confidence intervals, and reasons for missing metrics.

    Raises:
        UserError: the model or the shards cannot be read, or nothing can be measured.
    """
    leave_out_accelerator_warning()
    from m3i_scale.evaluation.commands import evaluate as evaluate_model

    return evaluate_model(
        model,
        os.fspath(data),
        train_data=None if train_data is None else os.fspath(train_data),
        measures=measures if measures is None else (measures,) if isinstance(measures, str) else tuple(measures),
        pool=pool,
        batch_size=batch_size,
        num_workers=num_workers,
        dtype=dtype,
        device=device,
    )


@overload
def embed(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    pool: Pool = ...,
    batch_size: int = ...,
    num_workers: int | None = ...,
    dtype: EvaluationDtype = ...,
) -> Path: ...


@overload
def embed(
    model: str | Path,
    data: str | Path,
    output: None = None,
    *,
    pool: Pool = ...,
    batch_size: int = ...,
    num_workers: int | None = ...,
    dtype: EvaluationDtype = ...,
) -> dict[str, NDArray[Any]]: ...


def embed(
    model: str | Path,
    data: str | Path,
    output: str | Path | None = None,
    *,
    pool: Pool = "mean",
    batch_size: int = 64,
    num_workers: int | None = None,
    dtype: EvaluationDtype = "auto",
) -> Path | dict[str, NDArray[Any]]:
    """Extract the features of every image of a folder or of shards, on all visible GPUs.

    Unreadable images are skipped, with a warning.

    Examples:
        >>> arrays = m3i_scale.embed("/data/export", "/data/photos")
        >>> arrays["features"].shape, arrays["keys"][0]
        >>> m3i_scale.embed("/data/export", "/data/photos", "/data/features.parquet")

    Args:
        model: a folder from `export`, any folder with a vision model of `transformers`, or a Hub id.
        data: a folder of images, which is searched recursively, or shards.
        output: file to write, .parquet or .npz.
        pool: mean of the patch tokens, class token, or both concatenated.
        batch_size: images per forward pass.
        num_workers: processes that decode images; default: one per core.
        dtype: auto (bfloat16 on GPUs that support it, otherwise float32), float32 or bfloat16.

    Returns:
        `output`. Without it the arrays `features` (N, D), `keys` (N) and `labels` (N), −1 without a label.

    Raises:
        UserError: the model or the data cannot be read, or the file cannot be written.
    """
    leave_out_accelerator_warning()
    from m3i_scale.evaluation.embed import embed as extract

    path = None if output is None else local_path(output, "output")
    result = extract(
        model, os.fspath(data), path, pool=pool, batch_size=batch_size, num_workers=num_workers, dtype=dtype
    )
    if skipped := result["skipped"]["count"]:
        first = result["skipped"]["samples"][0]
        text = f"{skipped} images are skipped, the first: {first['key']}: {first['reason']}"
        warnings.warn(printable(text), stacklevel=2)
    if path is not None:
        return path
    arrays: dict[str, NDArray[Any]] = result["arrays"]
    return arrays
