"""A case about layers that go through `torch.compile`, under the engine and with layers that recompute."""

from __future__ import annotations

from typing import Any

from rank_parts import RankParts
from torch._dynamo.utils import counters

from m3i_scale.run.setup import start_engine

COMPILED = {"zero3": ("zero3_cpu_fp32", "selective")}
"""DeepSpeed files, and policies of activations."""


class CompileCases(RankParts):
    """One method per case."""

    def compiled(self, ds_config: str, policy: str) -> dict[str, Any]:
        """Losses of three steps with and without, and how many graphs were made meanwhile."""
        told: dict[str, Any] = {}
        for name in ("false", "true"):
            plan = self.plan(
                ds_config, "m3i", f"backbone.activation_checkpointing={policy}", f"backbone.compile={name}"
            )
            engine, _ = start_engine(plan, self.ranks)
            counters.clear()
            losses = []
            for step in range(3):
                loss, _ = engine(self.batch(step))
                engine.backward(loss)
                engine.module.after_backward()
                engine.step()
                losses.append(float(loss))
            told[name] = {"losses": losses, "graphs": int(counters["stats"]["unique_graphs"])}
            engine.destroy()
        return told
