"""DeepSpeed files changed at single keys."""

from __future__ import annotations

import copy
from typing import Any

RUN: dict[str, Any] = {
    "world_size": 1,
    "batch_size": 8,
    "micro_batch_size": 4,
    "clip_grad_norm": 0.5,
    "lr": 1e-2,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.05,
    "hidden_size": 16,
}
GONE = object()


def changed(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of `raw` with values set (or removed: GONE) at dotted paths."""
    raw = copy.deepcopy(raw)
    for path, value in changes.items():
        *parents, key = path.split(".")
        node = raw
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is GONE:
            del node[key]
        else:
            node[key] = value
    return raw
