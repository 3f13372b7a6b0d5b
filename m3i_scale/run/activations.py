"""Activation checkpointing of an initialized engine: measure memory budgets and report the checkpointed layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator

from m3i_scale.config import RunConfig
from m3i_scale.data.batch import Batch
from m3i_scale.data.loader import TrainStream
from m3i_scale.engine.activation_budget import fit_activations
from m3i_scale.engine.activations import read_policy, recomputing, summarize_layers
from m3i_scale.run.data_supply import Fetcher


def set_activations(run: RunConfig, engine: Any, stream: TrainStream) -> str:
    """Return a description of the activation checkpointing set by `start_engine`. A memory budget is measured on a
    first batch that the stream then repeats. Every rank must call it."""
    text = run.backbone.activation_checkpointing
    policy = read_policy(text)
    if policy.kind == "budget":
        first = next(Fetcher(_first_batch(stream)))  # all ranks have a batch, or all raise
        batch = _longest(first, run.text.max_tokens).to(get_accelerator().current_device_name())
        return str(fit_activations(engine.module, lambda: engine(batch), policy.budget_gib))
    if policy.kind == "selective" and run.backbone.compiles:
        return f"activations ({text}): compiled layers keep about half, and compute the rest again"
    names = recomputing(engine.module)
    layers = f"{len(names)} layers recompute: {summarize_layers(names)}" if names else "no layer recomputes"
    return f"activations ({text}): {layers}"


def _first_batch(stream: TrainStream) -> Iterator[Batch]:
    yield stream.peek()


def _longest(batch: Batch, max_tokens: int) -> Batch:
    """Pad the captions of a batch to the maximum length of later batches."""
    missing = max(max_tokens - batch.text_ids_BT.shape[1], 0)
    return replace(
        batch,
        text_ids_BT=F.pad(batch.text_ids_BT, (0, missing)),
        text_mask_BT=F.pad(batch.text_mask_BT, (0, missing)),
    )
