"""Load a checkpoint into an engine, independent of the number of ranks, ZeRO stage and precision that wrote it, and
check what was loaded: the norm of every tensor, and the loss of a few stored samples.

The samples' loss only depends on them, as with one rank, so it is independent of the number of ranks. It detects errors
that tensor norms cannot: weights mapped to the wrong parameters.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from m3i_scale.checkpoint.layout import BUFFERS, DATA_FILES, PROBE, read_meta, read_object, unreadable
from m3i_scale.checkpoint.stream import buffers_of, ranges_of, shapes_of, sum_of_squares, write_tensors
from m3i_scale.checkpoint.tensors import AVERAGE, SavedTensors
from m3i_scale.data.batch import Batch
from m3i_scale.engine.agree import from_rank, from_rank_0, together
from m3i_scale.engine.averages import ShardedEma
from m3i_scale.engine.engine_state import MASTER, MOMENTS, make_moments, pieces, publish, restore_counters
from m3i_scale.engine.partition import load_frozen, saved_frozen
from m3i_scale.errors import CheckpointError
from m3i_scale.objective.ranks import SingleProcess

NORM_TOLERANCE, ROUNDED_NORM_TOLERANCE = 1e-6, 4e-3
"""Relative tolerances: terms are added in another order; 16-bit master weights are rounded."""
_OF_MOMENTS = tuple(f"{kind}/" for kind in MOMENTS)
PROBE_SAMPLES = 2
"""Minimum number of samples for which every loss is defined."""
PROBE_TOLERANCE, OTHER_PRECISION_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-3, "fp16": 1e-3}, 2e-2
"""Relative tolerances of the loss by precision, and after a change of it: other machines, ZeRO stages or thread counts
sum in a different order."""


def load_checkpoint(folder: Path, engine: Any, ema: ShardedEma | None) -> list[dict[str, Any]]:
    """Load engine, EMA target, buffers and random states from a verified checkpoint; return the data states of all
    ranks that wrote it. Collective: every rank reads only its part."""
    # A read error on one rank fails all ranks: the others would wait for it in `publish`.
    saved: SavedTensors = together(lambda: _read_own_part(folder, engine, ema))
    # Every rank needs these files of all ranks: one rank reads them.
    states: list[dict[str, Any]] = from_rank_0(
        lambda: [read_object(folder, file) for file in _files_of_ranks(folder, DATA_FILES)]
    )
    publish(engine)
    if ema is not None:
        ema.publish()
    check_norms(saved, engine, ema)
    return states


def check_norms(saved: SavedTensors, engine: Any, ema: ShardedEma | None) -> None:
    """Raise CheckpointError if the norm of a loaded tensor differs from the saved norm. Collective."""
    squares = dict.fromkeys(saved.norms, 0.0)
    rounded = dict.fromkeys(saved.norms, 0.0)
    for piece in ranges_of(engine, ema):
        if piece.key in squares:  # no moments are saved before the first optimizer step
            squares[piece.key] += sum_of_squares(piece.read().view(-1))
            rounded[piece.key] += piece.dtype != torch.float32
    # The index gives all ranks the same keys in the same order.
    sums = torch.tensor([list(squares.values()), list(rounded.values())], dtype=torch.float64)
    sums = sums.to(get_accelerator().current_device_name())
    dist.all_reduce(sums)
    for (key, saved_norm), square, in_16_bits in zip(saved.norms.items(), *sums.tolist(), strict=True):
        tolerance = ROUNDED_NORM_TOLERANCE if in_16_bits else NORM_TOLERANCE
        if not math.isclose(math.sqrt(square), saved_norm, rel_tol=tolerance, abs_tol=1e-30):
            raise CheckpointError(
                f"checkpoint verification failed: the norm of '{key}' was {saved_norm:.9g}, and is now "
                f"{math.sqrt(square):.9g}",
                where=str(saved.folder.parent),
                fix="resume from an earlier checkpoint: checkpoint.resume=…",
            )


def _read_own_part(folder: Path, engine: Any, ema: ShardedEma | None) -> SavedTensors:
    """Read this rank's part. No collective."""
    try:
        saved, meta = SavedTensors(folder), read_meta(folder)
        _check_names(saved, engine, ema, folder)
        _read_pieces(saved, meta, engine)
        if ema is not None:
            ema.load(lambda name, start, out: saved.read_into(f"{AVERAGE}/{name}", start, out))
        _load_buffers(folder, engine.module)
        restore_counters(engine, meta["engine"])
        _restore_random_states(folder)
    except (OSError, SafetensorError) as error:
        name = Path(getattr(error, "filename", None) or folder)
        raise unreadable(folder, str(name.relative_to(folder) if name.is_relative_to(folder) else ""), error) from None
    return saved


def _check_names(saved: SavedTensors, engine: Any, ema: ShardedEma | None, folder: Path) -> None:
    shapes = {key: shape for key, shape in shapes_of(engine, ema).items() if not key.startswith(_OF_MOMENTS)}
    keys = [f"{kind}/{name}" for kind in (MASTER, AVERAGE) for name in saved.names(kind)]
    _compare_shapes(shapes, {key: saved.shape(key) for key in keys}, folder)


def _read_pieces(saved: SavedTensors, meta: dict[str, Any], engine: Any) -> None:
    make_moments(engine, int(meta["engine"]["optimizer_steps"]))
    kinds = saved.kinds()
    for piece in pieces(engine):
        for kind, view in piece.tensors.items():
            if kind in kinds:  # no moments are saved before the first optimizer step
                saved.read_into(f"{kind}/{piece.name}", piece.start, view)
    for name, parameter in saved_frozen(engine.module).items():
        load_frozen(parameter, partial(saved.read_into, f"{MASTER}/{name}"))


def _load_buffers(folder: Path, module: nn.Module) -> None:
    buffers, saved = buffers_of(module), load_file(folder / BUFFERS)
    shapes, saved_shapes = ({name: tuple(buffer.shape) for name, buffer in of.items()} for of in (buffers, saved))
    _compare_shapes(shapes, saved_shapes, folder)
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(saved[name])


def _restore_random_states(folder: Path) -> None:
    """Restore this rank's random states. Additional ranks use the states of an existing rank: only dropped branches
    depend on them."""
    files = _files_of_ranks(folder, "random/rank-*.safetensors")
    states = load_file(folder / files[dist.get_rank() % len(files)])
    torch.set_rng_state(states["host"])
    if "accelerator" in states and get_accelerator().device_name() != "cpu":
        get_accelerator().set_rng_state(states["accelerator"])


def _files_of_ranks(folder: Path, pattern: str) -> list[str]:
    names = sorted(file.relative_to(folder).as_posix() for file in folder.glob(pattern))
    if not names:
        raise unreadable(folder, pattern, "no such file")
    return names


def _compare_shapes(shapes: dict[str, tuple[int, ...]], saved: dict[str, tuple[int, ...]], folder: Path) -> None:
    wrong = sorted(name for name in shapes.keys() | saved.keys() if shapes.get(name) != saved.get(name))
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors of the checkpoint do not fit this model, e.g. {wrong[0]}",
            where=str(folder),
            why="another version of this package or of `transformers` wrote the checkpoint",
            fix="resume with the version that wrote it, or start a new run from its export: backbone.from_pretrained=…",
        )


# ------------------------------------------------------------------ sanity check


def first_samples(batch: Batch, count: int = PROBE_SAMPLES) -> Batch:
    """Return the first samples of the global micro-batch on the CPU, the same on all ranks. Collective."""
    # All ranks have the same batch size: the first few suffice, while gathering all would give thousands of samples.
    givers = range(min(math.ceil(count / len(batch)), dist.get_world_size()))
    return _first(Batch.cat([from_rank(rank, lambda: _first(batch, count).to("cpu")) for rank in givers]), count)


@torch.no_grad()
def probe_loss(engine: Any, batch: Batch) -> float:
    """Return the loss of these samples alone, without changing buffers. Every rank calls it with the same batch."""
    with evaluating(engine.module), _alone(engine.module):
        loss, _ = engine(batch.to(get_accelerator().current_device_name()))
    return float(loss)


@contextlib.contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """Switch the module to evaluation mode between two steps, without recording step times or health metrics."""
    span, module.span = module.span, contextlib.nullcontext
    module.measure_health = False
    module.eval()
    try:
        yield
    finally:
        module.train()
        module.span = span


def write_probe(folder: Path, batch: Batch) -> None:
    """Store the samples with the weights."""
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    write_tensors(folder / PROBE, tensors, {"keys": json.dumps(batch.keys)})


def read_probe(folder: Path) -> Batch:
    """Read the samples of a checkpoint."""
    try:
        with safe_open(folder / PROBE, framework="pt") as opened:
            keys = json.loads(opened.metadata()["keys"])
            return Batch(**{name: opened.get_tensor(name) for name in opened.keys()}, keys=keys)  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the stored samples cannot be read: {error}",
            where=str(folder / PROBE),
            fix="resume from another checkpoint: checkpoint.resume=…",
        ) from None


def check_probe(folder: Path, meta: dict[str, Any], engine: Any, *, precision: str) -> Batch | None:
    """Check that the stored samples have the same loss as when they were saved; return them, or None if there are none.
    Collective. `precision` is the run's, which may differ from the checkpoint's."""
    saved_loss = meta.get("probe_loss")
    if saved_loss is None:
        return None
    probe: Batch = together(lambda: read_probe(folder))
    loss = probe_loss(engine, probe)
    tolerance = PROBE_TOLERANCE[precision] if meta.get("precision") == precision else OTHER_PRECISION_TOLERANCE
    if not math.isclose(loss, saved_loss, rel_tol=tolerance, abs_tol=tolerance / 10):
        raise CheckpointError(
            f"checkpoint verification failed: the loss of {PROBE_SAMPLES} stored samples was {saved_loss:.9g}, and is "
            f"now {loss:.9g}",
            where=str(folder),
            why="weights went to the wrong parameters, or the model code changed since the checkpoint",
            fix="resume with the versions of torch, transformers and this package that saved it",
        )
    return probe


@contextlib.contextmanager
def _alone(module: nn.Module) -> Iterator[None]:
    """Compute losses without samples of other ranks."""
    ranks_of: dict[Any, Any] = {child: child.ranks for child in module.modules() if hasattr(child, "ranks")}
    for child in ranks_of:
        child.ranks = SingleProcess()
    try:
        yield
    finally:
        for child, ranks in ranks_of.items():
            child.ranks = ranks


def _first(batch: Batch, count: int) -> Batch:
    values: dict[str, Any] = {}
    for field in fields(Batch):
        value = getattr(batch, field.name)
        values[field.name] = value[:, :count].clone() if "_VB" in field.name else value[:count]
    return Batch(**values)
