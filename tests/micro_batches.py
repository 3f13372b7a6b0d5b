"""Micro-batches of a step as the trainer serves them, for an engine or a plain objective."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

from m3i_scale.config.optim import OptimConfig
from m3i_scale.data.batch import Batch
from m3i_scale.run.trainer import Trainer


def of_a_step(engine: Any, batches: Sequence[Batch], contrastive_batch: str = "global") -> Iterator[Any]:
    """The arguments of every call of `Trainer._micro_batch`; the features are those of `engine`."""
    supply = iter(batches)
    trainer: Any = SimpleNamespace(
        run=SimpleNamespace(optim=OptimConfig.model_validate({"contrastive_batch": contrastive_batch})),
        state=SimpleNamespace(engine=engine, stage=SimpleNamespace(accumulation=len(batches))),
        step_times=SimpleNamespace(span=lambda name: nullcontext()),
        copy=lambda batch: batch,
        _fetch=lambda: next(supply),
        _next_batch=lambda: next(supply),
    )
    yield from Trainer._micro_batches(trainer)
