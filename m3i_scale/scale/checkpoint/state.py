"""What a checkpoint holds, written by all ranks: engine shards, momentum shards, random states, data position.

step-00000100/
  deepspeed/   ZeRO shards of weights and optimizer, as DeepSpeed writes them
  momentum/    rank-00000.safetensors …  fp32 shards of the averaged weights; shapes.json, online.json
  random/      rank-00000.safetensors …  random states of the host and of the accelerator
  data/        rank-00000.json …         position of the stream
  run.yaml, meta.json, manifest.json
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from m3i_scale.errors import CheckpointError, UserError
from m3i_scale.scale.checkpoint.commit import begin, commit, digest_files, ensure_space, write_guard
from m3i_scale.scale.checkpoint.manifest import Digest, list_files
from m3i_scale.scale.partition import ShardedMomentum, full_numel

TAG = "deepspeed"


def save_checkpoint(
    final: Path,
    engine: Any,
    momentum: ShardedMomentum | None,
    *,
    data_state: dict[str, Any],
    meta: dict[str, Any],
    run_yaml: str,
) -> None:
    """Write and commit `final`; every rank calls it. Errors of any rank are raised on all.

    Raises:
        CheckpointError: the disk refused; what was committed before is untouched.
    """
    wanted = bytes_wanted(engine.module, momentum)
    from_rank_0(lambda: ensure_space(final.parent, wanted))
    temporary = Path(from_rank_0(lambda: str(begin(final))))
    try:
        _together(lambda: _write(temporary, engine, momentum, data_state, meta, run_yaml))
        digests = _digests(temporary)
    except CheckpointError:
        # Only now, when no rank is writing any more: a folder that vanishes early would hide the first cause.
        from_rank_0(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise
    from_rank_0(lambda: commit(final, temporary, meta, digests=digests))


def bytes_wanted(module: nn.Module, momentum: ShardedMomentum | None = None) -> int:
    """Size of a checkpoint: fp32 weights and two moments and a 16-bit copy of what is trained, fp32 averages."""
    averaged = sum(math.prod(shape) for shape in momentum.shapes().values()) if momentum is not None else 0
    return 14 * full_numel(module, trainable_only=True) + 4 * averaged


def _write(
    folder: Path,
    engine: Any,
    momentum: ShardedMomentum | None,
    data_state: dict[str, Any],
    meta: dict[str, Any],
    run_yaml: str,
) -> None:
    rank = dist.get_rank()
    with write_guard(folder.parent, folder, remove_folder=False):
        with _errors_after(engine.checkpoint_engine):
            # The averaged weights are saved below in fp32; DeepSpeed's copy of them would be the rounded one.
            engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
        for name in ("momentum", "random", "data"):
            (folder / name).mkdir(exist_ok=True)
        if momentum is not None:
            shards = {name: shard.cpu().contiguous() for name, shard in momentum.shards.items()}
            save_file(shards, _rank_file(folder / "momentum", rank))
        save_file(_random_states(), _rank_file(folder / "random", rank))
        _write_text(folder / "data" / f"rank-{rank:05d}.json", json.dumps(data_state))
        if rank == 0:
            if momentum is not None:
                _write_text(folder / "momentum" / "shapes.json", json.dumps(momentum.shapes()))
                _write_text(folder / "momentum" / "online.json", json.dumps(momentum.online_names()))
            _write_text(folder / "meta.json", json.dumps(meta, indent=1))
            _write_text(folder / "run.yaml", run_yaml)


@contextlib.contextmanager
def _errors_after(checkpoint_engine: Any) -> Iterator[None]:
    """Hold back a failed write until DeepSpeed's last barrier: a rank that left early would hang the others in it."""
    faults: list[Exception] = []
    write = checkpoint_engine.save

    def save(*arguments: Any, **options: Any) -> Any:
        try:
            return write(*arguments, **options)
        except (OSError, RuntimeError) as error:
            faults.append(error)
            return None

    checkpoint_engine.save = save
    try:
        yield
    finally:
        checkpoint_engine.save = write
    if faults:
        raise faults[0]


def load_checkpoint(folder: Path, engine: Any, momentum: ShardedMomentum | None) -> list[dict[str, Any]]:
    """Bring engine, momentum target and random states to a verified checkpoint; returns the data states of all ranks.

    The caller has checked world size and ZeRO stage against meta.json.

    Raises:
        CheckpointError: DeepSpeed found nothing in it, or it lacks what this model needs.
    """
    rank = dist.get_rank()
    with tensors_only():
        loaded, _ = engine.load_checkpoint(
            str(folder), tag=TAG, custom_load_fn=lambda src, dst: fill(dst, src, where=folder / TAG)
        )
    if loaded is None:
        raise CheckpointError("DeepSpeed loaded nothing from the checkpoint", where=str(folder / TAG))
    if momentum is not None:
        momentum.load(load_file(_rank_file(folder / "momentum", rank)))
    _restore_random_states(load_file(_rank_file(folder / "random", rank)))
    files = sorted((folder / "data").glob("rank-*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def fill(module: nn.Module, values: dict[str, torch.Tensor], *, where: Path) -> None:
    """Load what is trained and what is remembered between batches.

    Frozen parameters are not in DeepSpeed's files: the momentum target lies beside them, a teacher where it came from.

    Raises:
        CheckpointError: anything else is missing, or there is something that the model does not have.
    """
    missing, unexpected = module.load_state_dict(values, strict=False)
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    wrong = [name for name in missing if name not in frozen] + list(unexpected)
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors do not belong together with this model, e.g. {wrong[0]}",
            where=str(where),
            why="the checkpoint is of another version of this package or of `transformers`",
            fix="resume with the version that wrote it, or start a new run from its export: backbone.from_pretrained=…",
        )


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a committed checkpoint."""
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return meta


@contextlib.contextmanager
def tensors_only() -> Iterator[None]:
    """DeepSpeed reads its files with full unpickling. Here they may hold tensors, numbers and DeepSpeed's own settings,
    and nothing that runs code."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def _random_states() -> dict[str, torch.Tensor]:
    states = {"host": torch.get_rng_state()}
    if get_accelerator().device_name() != "cpu":
        states["accelerator"] = get_accelerator().get_rng_state()
    return states


def _restore_random_states(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["host"])
    if "accelerator" in states:
        get_accelerator().set_rng_state(states["accelerator"])


def _digests(folder: Path) -> dict[str, Digest]:
    """Checksums of all files, the work shared out over the ranks, complete on every rank."""
    names = from_rank_0(lambda: list_files(folder))
    mine = _together(lambda: _digest_guarded(folder, names[dist.get_rank() :: dist.get_world_size()]))
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return {name: digest for part in parts for name, digest in part.items()}


def _digest_guarded(folder: Path, names: list[str]) -> dict[str, Digest]:
    with write_guard(folder.parent, folder, remove_folder=False):
        return digest_files(folder, names)


def _together(work: Any) -> Any:
    """Do `work` on every rank; when it fails on one, it fails on all, with that rank's message."""
    fault: UserError | None = None
    result = None
    try:
        result = work()
    except UserError as error:
        fault = error
    faults: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    first = next((other for other in faults if other is not None), None)
    if first is not None:
        raise first
    return result


def from_rank_0(work: Any) -> Any:
    """The result of `work`, done on rank 0 alone; its UserError is raised on all ranks."""
    result = _together(lambda: work() if dist.get_rank() == 0 else None)
    box = [result]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.safetensors"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
