"""One step of a recipe without an engine, on a batch that has everything a recipe can ask for."""

from __future__ import annotations

from collections.abc import Callable

from m3i_scale.backbones.flops import counter
from m3i_scale.config import RunConfig
from m3i_scale.data.batch import Batch, synthetic_batch
from m3i_scale.engine.partition import initialize_sharded
from m3i_scale.objective.build import build_objective, initialize_module
from m3i_scale.objective.information import Objective

__all__ = ["count_flop", "recipe_step", "synthetic_batch"]


def count_flop(step: Callable[[], None]) -> int:
    """Return the FLOPs of one call of `step`."""
    with counter() as counted:
        step()
    return int(counted.get_total_flops())


def recipe_step(run: RunConfig, label_sets: dict[str, list[str]], vocabulary: int, batch: Batch) -> Callable[[], None]:
    """Forward and backward of a recipe on `batch`."""
    objective: Objective = build_objective(run, label_sets, vocabulary)
    initialize_sharded(objective, initialize_module, seed=0)

    def step() -> None:
        loss, _ = objective(batch)
        loss.backward()
        objective.zero_grad()

    return step
