"""What a checkpoint holds, and how it is read back: by any number of ranks, under any ZeRO stage and precision.

step-00000100/
  tensors/     master weights, moments and averages, in pieces of every rank (see tensors.py)
  buffers.safetensors       what heads and balanced weights remember between batches
  random/      rank-00000.safetensors …  random states of the host and of the accelerator
  data/        rank-00000.json …         position of the stream
  run.yaml, meta.json, manifest.json
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from m3i_scale.errors import CheckpointError
from m3i_scale.scale.checkpoint.sums import Sums, sums_of
from m3i_scale.scale.checkpoint.tensors import Range, SavedTensors
from m3i_scale.scale.checkpoint.together import together
from m3i_scale.scale.engine_state import bytes_per_parameter, make_moments, pieces, publish, restore_counters, trained
from m3i_scale.scale.partition import ShardedMomentum, full_numel, full_shape

AVERAGE = "average"
BUFFERS = "buffers.safetensors"
SUM_TOLERANCE, ROUNDED_TOLERANCES = 1e-6, (4e-3, 1.6e-2)
"""How far norms and weighted sums after loading may be from those that were saved, as shares of the norm: as terms are
added up in another order; with master weights in 16 bits, whose errors do not average out in a weighted sum."""


def ranges_of(engine: Any, momentum: ShardedMomentum | None) -> list[Range]:
    """What this rank has to write: live views of the engine, and averages that are joined when they are asked for."""
    found = [
        Range(f"{kind}/{piece.name}", piece.shape, piece.start, piece.numel, view.dtype, _same(view))
        for piece in pieces(engine)
        for kind, view in piece.tensors.items()
    ]
    if momentum is None:
        return found
    shapes = momentum.shapes()
    for name, start, numel in momentum.pieces():
        if numel:
            parts = _average_parts(momentum, name, start, numel)
            key, shape = f"{AVERAGE}/{name}", tuple(shapes[name])
            read = _average_reader(momentum, name, start, numel)
            found.append(Range(key, shape, start, numel, torch.float32, read, parts, momentum.joined))
    return found


def bytes_wanted(engine: Any, momentum: ShardedMomentum | None) -> int:
    """Size of the tensors of a checkpoint: weights and two moments of what is trained, fp32 averages."""
    averaged = sum(math.prod(shape) for shape in momentum.shapes().values()) if momentum is not None else 0
    return bytes_per_parameter(engine) * full_numel(engine.module, trainable_only=True) + 4 * averaged


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Live buffers that outlast a batch, by name. All ranks have the same."""
    kept = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


def write_small_files(folder: Path, data_state: str, random: dict[str, Tensor], rank: int) -> list[str]:
    """A rank's position in the data (JSON) and its random states; returns the paths below `folder`.

    Raises:
        OSError, SafetensorError: the disk refused.
    """
    names = [f"random/rank-{rank:05d}.safetensors", f"data/rank-{rank:05d}.json"]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
    save_file(random, folder / names[0])
    (folder / names[1]).write_text(data_state, encoding="utf-8")
    return names


def random_states() -> dict[str, Tensor]:
    """Of this rank, now."""
    states = {"host": torch.get_rng_state()}
    if get_accelerator().device_name() != "cpu":
        states["accelerator"] = get_accelerator().get_rng_state()
    return states


def load_checkpoint(folder: Path, engine: Any, momentum: ShardedMomentum | None) -> list[dict[str, Any]]:
    """Bring engine, momentum target, buffers and random states to a verified checkpoint. Every rank calls it, and reads
    no more than it will hold. Returns the data states of all ranks that wrote it.

    Raises:
        CheckpointError: it is of another model, or what was loaded is not what was saved.
    """
    # What one rank cannot read ends all: the others would wait for it in `publish`.
    saved: SavedTensors
    states: list[dict[str, Any]]
    saved, states = together(lambda: _read_own(folder, engine, momentum))
    publish(engine)
    check_sums(saved, engine, momentum)
    return states


def _read_own(folder: Path, engine: Any, momentum: ShardedMomentum | None) -> tuple[SavedTensors, list[dict[str, Any]]]:
    """This rank's part of a checkpoint; its index, and the data states of all ranks. No collective."""
    try:
        saved, meta = SavedTensors(folder), read_meta(folder)
        _check_names(saved, engine.module, momentum, folder)
        _read_pieces(saved, meta, engine)
        if momentum is not None:
            momentum.load(lambda name, start, out: saved.read_into(f"{AVERAGE}/{name}", start, out))
        _load_buffers(folder, engine.module)
        restore_counters(engine, meta["engine"])
        _restore_random_states(folder)
        files = sorted((folder / "data").glob("rank-*.json"))
        states = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint cannot be read: {getattr(error, 'strerror', None) or error}",
            where=str(getattr(error, "filename", None) or folder),
            fix="start again; where it does not go away, resume from an earlier checkpoint: checkpoint.resume=…",
        ) from None
    return saved, states


def _read_pieces(saved: SavedTensors, meta: dict[str, Any], engine: Any) -> None:
    make_moments(engine, int(meta["engine"]["optimizer_steps"]))
    kinds = saved.kinds()
    for piece in pieces(engine):
        for kind, view in piece.tensors.items():
            if kind in kinds:  # an optimizer that had taken no step has saved no moments
                saved.read_into(f"{kind}/{piece.name}", piece.start, view)


def check_sums(saved: SavedTensors, engine: Any, momentum: ShardedMomentum | None) -> None:
    """See that every tensor that the engine now holds has the norm of what was saved under its name, and the sum that
    knows positions. Collective.

    Raises:
        CheckpointError: one has not; the same on every rank.
    """
    held = dict.fromkeys(saved.norms, Sums())
    rounded = dict.fromkeys(saved.norms, 0.0)
    for piece in ranges_of(engine, momentum):
        if piece.key in held:  # an optimizer that had taken no step has saved no moments
            held[piece.key] += sums_of(piece.read().view(-1), piece.start)
            rounded[piece.key] += piece.dtype != torch.float32
    # The index gives all ranks the same keys in the same order.
    found = [(sums.squares, sums.weighted, loose) for sums, loose in zip(held.values(), rounded.values(), strict=True)]
    sums = torch.tensor(found, dtype=torch.float64).to(get_accelerator().current_device_name())
    dist.all_reduce(sums)
    for (key, norm), (squares, weighted, in_16_bits) in zip(saved.norms.items(), sums.tolist(), strict=True):
        of_norms, of_sums = ROUNDED_TOLERANCES if in_16_bits else (SUM_TOLERANCE, SUM_TOLERANCE)
        if not math.isclose(math.sqrt(squares), norm, rel_tol=of_norms, abs_tol=1e-30):
            raise _not_what_was_saved(saved, f"the norm of '{key}'", norm, math.sqrt(squares))
        # Terms of random signs: the sum is about as large as the norm, and so is what another order makes of it.
        if math.isfinite(norm) and not abs(weighted - saved.weighted_sums[key]) <= of_sums * norm + 1e-30:
            what = f"the values of '{key}' are in another order: their weighted sum"
            raise _not_what_was_saved(saved, what, saved.weighted_sums[key], weighted)


def _not_what_was_saved(saved: SavedTensors, what: str, was: float, found: float) -> CheckpointError:
    return CheckpointError(
        f"what was loaded is not what was saved: {what} was {was:.9g}, and is {found:.9g}",
        where=str(saved.folder.parent),
        fix="resume from an earlier checkpoint: checkpoint.resume=…",
    )


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a committed checkpoint."""
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return meta


def _same(view: Tensor) -> Callable[[], Tensor]:
    return lambda: view


def _average_reader(momentum: ShardedMomentum, name: str, start: int, numel: int) -> Callable[[], Tensor]:
    return lambda: momentum.piece(name, start, numel)


def _average_parts(momentum: ShardedMomentum, name: str, start: int, numel: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: momentum.parts(name, start, numel)


def _check_names(saved: SavedTensors, module: nn.Module, momentum: ShardedMomentum | None, folder: Path) -> None:
    """That the checkpoint has what the model trains and averages, in the same shapes, and nothing else."""
    own = {f"weight/{name}": tuple(full_shape(parameter)) for name, parameter in trained(module)}
    if momentum is not None:
        own |= {f"{AVERAGE}/{name}": tuple(shape) for name, shape in momentum.shapes().items()}
    there = {f"{kind}/{name}" for kind in ("weight", AVERAGE) for name in saved.names(kind)}
    wrong = sorted(own.keys() ^ there)
    wrong += [key for key in sorted(own.keys() & there) if saved.shape(key) != own[key]]
    if wrong:
        raise _another_model(wrong, folder)


def _load_buffers(folder: Path, module: nn.Module) -> None:
    own, there = buffers_of(module), load_file(folder / BUFFERS)
    wrong = sorted(own.keys() ^ there.keys())
    wrong += [name for name in sorted(own.keys() & there.keys()) if own[name].shape != there[name].shape]
    if wrong:
        raise _another_model(wrong, folder)
    with torch.no_grad():
        for name, buffer in own.items():
            buffer.copy_(there[name])


def _restore_random_states(folder: Path) -> None:
    """A rank that the run did not have takes those of one that it had: no number of the training depends on them."""
    files = sorted((folder / "random").glob("rank-*.safetensors"))
    states = load_file(files[dist.get_rank() % len(files)])
    torch.set_rng_state(states["host"])
    if "accelerator" in states and get_accelerator().device_name() != "cpu":
        get_accelerator().set_rng_state(states["accelerator"])


def _another_model(wrong: list[str], folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{len(wrong)} tensors do not belong together with this model, e.g. {wrong[0]}",
        where=str(folder),
        why="the checkpoint is of another version of this package or of `transformers`",
        fix="resume with the version that wrote it, or start a new run from its export: backbone.from_pretrained=…",
    )
