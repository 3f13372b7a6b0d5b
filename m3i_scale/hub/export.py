"""`m3i-scale export`: a checkpoint becomes a Hub folder that is proven before it gets its name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from m3i_scale import __version__
from m3i_scale.errors import ExportError, did_you_mean
from m3i_scale.hub.card import render_card
from m3i_scale.hub.source import (
    Source,
    describe_data,
    evaluation_of,
    find_source,
    hash_folder,
    last_figures,
    source_tokenizer,
)
from m3i_scale.hub.verify import make_reference, verify
from m3i_scale.hub.write import write_folder
from m3i_scale.scale.checkpoint.consolidate import load_weights
from m3i_scale.scale.checkpoint.manifest import MANIFEST, hash_file

PROVENANCE = "export.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Weights = Literal["student", "momentum"]
Dtype = Literal["float32", "bfloat16"]


def export(
    run_dir_or_checkpoint: Path | str,
    to: Path | str,
    weights: Weights = "student",
    dtype: Dtype = "float32",
    *,
    overwrite: bool = False,
    license_id: str = "other",
) -> dict[str, Any]:
    """Export a checkpoint in the Hugging Face format, prove it in a fresh process, then give it its name.

    Args:
        run_dir_or_checkpoint: a run's output folder (its newest good checkpoint is taken) or one checkpoint.
        to: the folder to make.
        weights: the trained weights, or their moving average.
        dtype: of the written tensors.
        overwrite: replace an earlier export; any other folder with something in it is refused.
        license_id: licence of the weights for the model card, as the Hub spells it.

    Returns:
        Provenance: checkpoint, step, files with their hashes, what was proven, checkpoints that were passed over.

    Raises:
        ExportError: the target is taken, or what was written does not load as what was trained; nothing is left behind.
        CheckpointError: no checkpoint that verifies, or one without momentum weights where those are wanted.
    """
    target = Path(to).absolute()
    _check(weights, dtype, target, overwrite)
    source = find_source(Path(run_dir_or_checkpoint))
    tokenizer = source_tokenizer(source) if source.recipe.uses_text else None
    evaluation = evaluation_of(source)
    tensors = load_weights(source.checkpoint, weights)
    with _takes_name(target) as folder:
        write_folder(folder, source, tensors, DTYPES[dtype], tokenizer)
        reference = make_reference(source, tensors, DTYPES[dtype], tokenizer)
        proven = verify(folder, reference)
        facts = _provenance(source, folder, weights, dtype) | {
            "license": license_id,
            "verified": proven,
            "evaluation": evaluation,
        }
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "README.md").write_text(render_card(source, facts, config), encoding="utf-8")
        facts["files"] = hash_folder(folder)
        text = json.dumps(facts, indent=1, ensure_ascii=False)
        (folder / PROVENANCE).write_text(text + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return {"output": str(target), "bytes": size, "warning": _passed_over(source), **facts}


def _passed_over(source: Source) -> str | None:
    if not source.passed_over:
        return None
    reasons = "; ".join(f"{path.name}: {reason}" for path, reason in source.passed_over)
    return (
        f"{len(source.passed_over)} newer checkpoints do not verify, so {source.checkpoint.name} was taken ({reasons})"
    )


def _provenance(source: Source, folder: Path, weights: Weights, dtype: Dtype) -> dict[str, Any]:
    return {
        "name": source.run.name,
        "m3i_scale": __version__,
        "checkpoint": source.checkpoint.name,
        "checkpoint_manifest_sha256": hash_file(source.checkpoint / MANIFEST),
        "config_sha256": hash_file(source.checkpoint / "run.yaml"),
        "passed_over": [{"checkpoint": path.name, "reason": reason} for path, reason in source.passed_over],
        "step": source.step,
        "samples": source.step * source.run.optim.batch_size,
        "weights": weights,
        "dtype": dtype,
        "parameters": _parameters(folder),
        "data": describe_data(source),
        "figures": last_figures(source),
        "files": hash_folder(folder),
    }


def _parameters(folder: Path) -> int:
    """Elements of the vision model's files, by their headers."""
    from safetensors import safe_open

    count = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                count += torch.Size(file.get_slice(name).get_shape()).numel()
    return count


def _check(weights: str, dtype: str, target: Path, overwrite: bool) -> None:
    if weights not in ("student", "momentum"):
        raise ExportError(f"no weights '{weights}'", fix=did_you_mean(weights, ("student", "momentum")))
    if dtype not in DTYPES:
        raise ExportError(f"no dtype '{dtype}' for an export", fix=did_you_mean(dtype, DTYPES))
    if target.exists() and not target.is_dir():
        raise ExportError("the target is a file", where=str(target), fix="give a folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ExportError("the target has something in it", where=str(target), fix="another folder, or --overwrite")
    if not (target / PROVENANCE).is_file():
        raise ExportError(
            f"the target has something in it, and is no export: it has no {PROVENANCE}",
            where=str(target),
            why="--overwrite would remove what something else wrote",
            fix="remove it yourself, or give another folder",
        )


@contextmanager
def _takes_name(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its name when all went well, and is gone when not."""
    folder = target.with_name(f".{target.name}.{os.getpid()}.partial")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except OSError as error:
        raise ExportError(f"cannot write there: {error.strerror}", where=str(target.parent)) from None
    try:
        yield folder
        if target.is_dir():
            target.rename(old)
        folder.rename(target)
    except OSError as error:
        if old.is_dir() and not target.exists():
            old.rename(target)
        raise ExportError(
            f"cannot write the export: {error}", where=str(target), fix="check the disk's free space"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
