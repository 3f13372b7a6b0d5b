"""Cases about losses over all micro-batches of a step (`optim.contrastive_batch: global`)."""

from __future__ import annotations

from typing import Any

from deepspeed.utils import safe_get_full_grad
from micro_batches import of_a_step
from rank_parts import GLOBAL_BATCH, RankParts
from tiny import LABEL_SETS, first_weights, part, random_batch

from m3i_scale.engine.agree import mean_over_ranks
from m3i_scale.engine.device import replayed
from m3i_scale.objective.build import build_objective
from m3i_scale.run.setup import start_engine

WHOLE_STEPS = tuple(
    (engine, recipe)
    for engine in ("zero1_cpu_fp32", "zero1_overlap", "zero2_fp32", "zero3_cpu_fp32", "zero3_offload")
    for recipe in ("clip", "siglip", "barlow", "m3i")
    if engine in ("zero1_cpu_fp32", "zero3_cpu_fp32") or recipe == "clip"
)
"""DeepSpeed files, in part with other settings, and recipes."""
_CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "zero1_overlap": ("zero1_cpu_fp32", {"overlap_comm": True}),
    "zero2_fp32": ("zero1_cpu_fp32", {"stage": 2}),
    "zero3_offload": ("zero3_cpu_fp32", {"offload_optimizer": {"device": "cpu"}}),
}
STEPS = 3


class StepCases(RankParts):
    """One method per case."""

    def whole_step(self, name: str, recipe: str) -> dict[str, Any]:
        """Gradients of the micro-batches of a step, of an engine, and of one large batch, of plain modules."""
        ds_config, changes = _CHANGES.get(name, (name, {}))
        plan = self.plan(ds_config, recipe, f"optim.batch_size={STEPS * GLOBAL_BATCH}")
        plan.deepspeed.config["zero_optimization"].update(changes)
        alone = build_objective(plan.run, LABEL_SETS, plan.vocab_size)
        first_weights(alone, plan.run.seed)
        whole = random_batch(STEPS * GLOBAL_BATCH, seed=1, image=self.image)
        loss, _ = alone(whole)
        loss.backward()
        engine, _ = start_engine(plan, self.ranks)
        size = GLOBAL_BATCH // self.world
        starts = [GLOBAL_BATCH * number + size * self.rank for number in range(STEPS)]
        batches = [part(whole, start, start + size) for start in starts]
        losses = []
        for number, (batch, step, states) in enumerate(of_a_step(engine, batches)):
            with replayed(states):
                loss_of_batch, _ = engine(batch, step)
            engine.backward(loss_of_batch)
            losses.append(loss_of_batch.detach())
            if number + 1 < STEPS:
                engine.step()
        trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
        gradients = {name: safe_get_full_grad(parameter).clone() for name, parameter in trained}
        engine.destroy()
        plain = {name: p.grad for name, p in alone.named_parameters() if p.requires_grad}
        return {
            "plain": {"figures": {"loss": loss.item()}, "gradients": plain},
            "engine": {"figures": mean_over_ranks({"loss": sum(losses).item() / STEPS}), "gradients": gradients},
        }
