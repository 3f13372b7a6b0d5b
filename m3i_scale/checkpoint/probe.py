"""Load-time sanity check: a checkpoint stores a few samples and their loss, which a resumed run recomputes.

The loss only depends on these samples, as with one rank, so it is independent of the number of ranks. It detects errors
that tensor norms cannot: weights mapped to the wrong parameters.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from m3i_scale.checkpoint.stream import write_tensors
from m3i_scale.data.batch import Batch
from m3i_scale.engine.agree import from_rank, together
from m3i_scale.errors import CheckpointError
from m3i_scale.objective.ranks import SingleProcess

FILE = "probe.safetensors"
SAMPLES = 2
"""Minimum number of samples for which every loss is defined."""
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-3, "fp16": 1e-3}
"""Relative tolerance by precision: other machines, ZeRO stages or thread counts sum in a different order."""
OTHER_PRECISION_TOLERANCE = 2e-2


def first_samples(batch: Batch, count: int = SAMPLES) -> Batch:
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
    write_tensors(folder / FILE, tensors, {"keys": json.dumps(batch.keys)})


def read_probe(folder: Path) -> Batch:
    """Read the samples of a checkpoint."""
    try:
        with safe_open(folder / FILE, framework="pt") as opened:
            keys = json.loads(opened.metadata()["keys"])
            return Batch(**{name: opened.get_tensor(name) for name in opened.keys()}, keys=keys)  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the stored samples cannot be read: {error}",
            where=str(folder / FILE),
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
    tolerance = TOLERANCE[precision] if meta.get("precision") == precision else OTHER_PRECISION_TOLERANCE
    if not math.isclose(loss, saved_loss, rel_tol=tolerance, abs_tol=tolerance / 10):
        raise CheckpointError(
            f"what was loaded is not what was saved: the loss of {SAMPLES} stored samples was {saved_loss:.9g}, and is "
            f"{loss:.9g}",
            where=str(folder),
            why="the weights are in other places, or the model computes something else than it did",
            fix="resume with the versions of torch, transformers and this package that saved it; docs/checkpoints.md",
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
