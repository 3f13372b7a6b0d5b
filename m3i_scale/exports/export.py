"""`m3i-scale export`: convert a checkpoint to a Hub folder, which is verified and then renamed to its target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import logging as transformers_logging

from m3i_scale import __version__
from m3i_scale.checkpoint.layout import MANIFEST
from m3i_scale.errors import CheckpointError, ExportError, did_you_mean
from m3i_scale.exports.blend import Blend, blend
from m3i_scale.exports.card import compute_of, curve_of, last_figures, render_card
from m3i_scale.exports.push import PROVENANCE, check_repository_name, push
from m3i_scale.exports.reference import make_reference
from m3i_scale.exports.source import (
    ExportedWeights,
    Source,
    describe_data,
    evaluation_of,
    find_source,
    hash_folder,
    source_tokenizer,
    with_best_head,
)
from m3i_scale.exports.tensors import DTYPES, ExportedModule, check_shard_size
from m3i_scale.exports.verify import check_onnx, verify, write_onnx
from m3i_scale.exports.write import FORMATS, TASKS, ExportContents, plan_parts, write_folder
from m3i_scale.files import atomic_dir, read_json, sha256_of, write_json
from m3i_scale.objective.targets.category import Category
from m3i_scale.text import redact

Weights = Literal["student", "ema"]
Dtype = Literal["float32", "bfloat16"]


def export(
    run_dir_or_checkpoint: Path | str,
    output: Path | str,
    weights: Weights = "student",
    dtype: Dtype = "float32",
    *,
    wanted: ExportContents | None = None,
    overwrite: bool = False,
    license_id: str = "other",
    evaluation_file: Path | None = None,
    blended: Blend | None = None,
) -> dict[str, Any]:
    """Export a checkpoint and verify it in a fresh process. The folder appears only after verification.

    Args:
        run_dir_or_checkpoint: one checkpoint, or a run's output folder (uses its latest valid checkpoint).
        output: folder to write.
        weights: the trained weights or the EMA weights.
        dtype: data type of the exported tensors.
        wanted: model and format of the export; default: features, for `AutoModel`.
        overwrite: replace an earlier export. Any other non-empty folder is an error.
        license_id: license of the weights for the model card, as a Hub license id.
        evaluation_file: output of `m3i-scale evaluate --output`; default: evaluation.json of the run, if any.
        blended: model to interpolate the weights with.

    Returns:
        Provenance: checkpoint, step, files with hashes, verification results, skipped checkpoints.
    """
    target, wanted = Path(output).absolute(), wanted or ExportContents()
    _check(weights, dtype, target, overwrite)
    check_contents(wanted)
    source, heads = with_best_head(find_source(Path(run_dir_or_checkpoint)))
    reads_text = wanted.task == "zero_shot" or (wanted.task == "features" and wanted.format != "timm")
    tokenizer = source_tokenizer(source) if source.recipe.uses_text_tower and reads_text else None
    parts = plan_parts(source, wanted, tokenizer)
    _check_rounding(source, wanted, dtype)
    evaluation, other_evaluation = evaluation_of(source, weights, evaluation_file)
    tensors: Mapping[str, Tensor] = ExportedWeights(source, weights)
    if blended is not None:
        tensors = blend(source, parts, tensors, blended)
    origin = _origin(source)
    with _export_folder(target) as folder:
        fingerprints = write_folder(folder, source, parts, tensors, DTYPES[dtype], tokenizer, wanted)
        reference = make_reference(source, parts, fingerprints, tensors, DTYPES[dtype], tokenizer)
        proven = verify(folder, reference)
        if wanted.format == "onnx":
            proven["programs"] = {"onnx": write_onnx(folder, reference)}
        facts = (
            _provenance(source, folder, parts, weights, dtype)
            | origin
            | {
                "task": wanted.task,
                "format": wanted.format,
                "label_set": wanted.label_set,
                "request": asdict(wanted),
                "blend": None if blended is None else {"model": blended.folder.name, "alpha": blended.alpha},
                "license": license_id,
                "verified": proven,
                "evaluation": evaluation,
                "heads": heads,
            }
        )
        facts = redact(facts)
        config = read_json(folder / "config.json")
        (folder / "README.md").write_text(render_card(source, facts, config), encoding="utf-8")
        facts["files"] = hash_folder(folder)
        write_json(folder / PROVENANCE, facts)
        _follow_umask(folder)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    warning = _warning(source, other_evaluation, wanted)
    return {"output": str(target), "bytes": size, "warning": warning, **facts}


def export_and_push(
    run_dir_or_checkpoint: Path | str,
    output: Path | str,
    *,
    push_to: str | None = None,
    public: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Run `export`, and with `push_to` also `push`."""
    if push_to is None and (public or dry_run):
        raise ExportError(
            f"{'--public' if public else '--dry-run'} has no effect without --push",
            fix="add --push USER/NAME, or leave it out",
        )
    if push_to is not None:
        check_repository_name(push_to)
    facts = export(run_dir_or_checkpoint, output, **options)
    if push_to is None:
        return facts
    return facts | {"push": push(Path(output).absolute(), push_to, public=public, dry_run=dry_run)}


def _warning(source: Source, other: str | None, wanted: ExportContents) -> str | None:
    """Return which checkpoints were skipped and what is left out, with the `other` warning; None if there is none."""
    skipped, warnings = source.passed_over, [] if other is None else [other]
    tokens = source.run.text.max_tokens
    captioning = [target.name for target in source.recipe.targets if target.kind == "caption"]
    if wanted.task == "zero_shot" and source.run.text.model_type == "siglip_text_model" and tokens != 64:
        warnings.append(
            f"the zero-shot pipeline pads captions of a SigLIP to 64 tokens, and this one has {tokens} positions: pass "
            f"tokenizer_kwargs={{'max_length': {tokens}}}"
        )
    if wanted.task == "zero_shot" and captioning:
        warnings.append(f"the caption decoder of '{captioning[0]}' is not part of a zero-shot model")
    if skipped:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in skipped)
        taken = f"{len(skipped)} newer checkpoints do not verify, so {source.checkpoint.name} was taken ({reasons})"
        warnings.insert(0, taken)
    return "; ".join(warnings) or None


def _origin(source: Source) -> dict[str, str]:
    """Return the hashes that identify the checkpoint. They are read before the tensors, because a run may remove it."""
    try:
        return {
            "checkpoint_manifest_sha256": sha256_of(source.checkpoint / MANIFEST),
            "config_sha256": sha256_of(source.checkpoint / "run.yaml"),
        }
    except FileNotFoundError:
        raise CheckpointError(
            "the checkpoint was removed during the export, by a run or by `checkpoint prune`",
            where=str(source.checkpoint),
            fix="export again; the latest valid checkpoint is used",
        ) from None


def _provenance(
    source: Source, folder: Path, parts: list[ExportedModule], weights: Weights, dtype: Dtype
) -> dict[str, Any]:
    return {
        "name": source.run.name,
        "m3i_scale": __version__,
        "checkpoint": source.checkpoint.name,
        "passed_over": [{"checkpoint": path.name, "reason": reason} for path, reason in source.passed_over],
        "step": source.step,
        "samples": source.step * source.run.optim.batch_size,
        "stages": source.meta.get("stages", []),
        "weights": weights,
        "dtype": dtype,
        "parameters": sum(tensor.numel() for tensor in parts[0].model.state_dict().values()),
        "data": describe_data(source),
        "figures": last_figures(source),
        "compute": compute_of(source),
        "curve": curve_of(source),
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors", "deepspeed")},
        "files": hash_folder(folder),
    }


def _check_rounding(source: Source, wanted: ExportContents, dtype: Dtype) -> None:
    normalized = any(isinstance(target, Category) and target.batch_norm for target in source.recipe.targets)
    if dtype == "bfloat16" and wanted.task == "classification" and normalized:
        raise ExportError(
            "a classifier with batch norm cannot be exported in bfloat16",
            where="--dtype bfloat16",
            why="folding the statistics into the weights would round a second time",
            fix="use --dtype float32, or --task features",
        )


def check_contents(wanted: ExportContents) -> None:
    """Raise an error for an unknown task, format or shard size."""
    if wanted.task not in TASKS:
        raise ExportError(f"unknown task '{wanted.task}'", where="--task", fix=did_you_mean(wanted.task, TASKS))
    if wanted.format not in FORMATS:
        raise ExportError(
            f"unknown format '{wanted.format}'", where="--format", fix=did_you_mean(wanted.format, FORMATS)
        )
    if wanted.format == "timm" and find_spec("timm") is None:
        raise ExportError("timm is not installed", where="--format timm", fix="run `pip install -e '.[timm]'`")
    if wanted.format == "onnx":
        check_onnx()
    check_shard_size(wanted.max_shard_size)


def _check(weights: str, dtype: str, target: Path, overwrite: bool) -> None:
    if weights not in ("student", "ema"):
        raise ExportError(f"unknown weights '{weights}'", fix=did_you_mean(weights, ("student", "ema")))
    if dtype not in DTYPES:
        raise ExportError(f"unknown dtype '{dtype}' for an export", fix=did_you_mean(dtype, DTYPES))
    if target.exists() and not target.is_dir():
        raise ExportError(
            "the output must be a folder, but it is a file", where=str(target), fix="use another --output"
        )
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ExportError(
            "the output folder must be empty", where=str(target), fix="use another --output, or add --overwrite"
        )
    if not (target / PROVENANCE).is_file():
        raise ExportError(
            f"--overwrite replaces only an export, but the folder has no {PROVENANCE}",
            where=str(target),
            why="another program wrote its files",
            fix="remove the folder yourself, or use another --output",
        )


def _follow_umask(folder: Path) -> None:
    """Set the mode of all files by the umask: files that libraries create as temporary files are readable by their
    owner only."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


@contextmanager
def _export_folder(target: Path) -> Iterator[Path]:
    """Wrap `atomic_dir` for the export folder: without progress bars of `transformers`, and with an `ExportError` if
    the folder cannot be written."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with atomic_dir(target, replace=True) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"cannot write the export: {error}",
            where=str(target),
            fix="free space and make the folder writable, or use another --output",
        ) from None
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
