"""Cases about losses over all micro-batches of a step (`optim.contrastive_batch: global`)."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad
from micro_batches import of_a_step
from rank_parts import GLOBAL_BATCH, RankParts
from tiny import LABEL_SETS, first_weights, part, random_batch
from torch import nn

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
TRUSTED = ("zero1_cpu_fp32", "zero1_bf16", "zero2_fp32")


class StepCases(RankParts):
    """One method per case."""

    def trust_ratio(self, name: str) -> dict[str, Any]:
        """Master weights after three steps of LARS, and those of AdamW with gradients that are scaled one by one."""
        ds_config, changes = _CHANGES.get(name, (name, {}))
        sgd = ("optim.eps=1e6", "optim.momentum_correction=false", "optim.weight_decay=0", "optim.clip_grad_norm=0")
        plan = self.plan(ds_config, "supervised", *sgd, "optim.trust_coefficient=0.02", "optim.lr=3e6")
        plan.deepspeed.config["zero_optimization"].update(changes)
        engine, _ = start_engine(plan, self.ranks)
        trained = [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
        reference = {name: nn.Parameter(self._master(parameter)) for name, parameter in trained}
        optim = plan.run.optim
        adam = torch.optim.AdamW(reference.values(), optim.lr, optim.betas, optim.eps, weight_decay=0)
        first = {name: weights.detach().clone() for name, weights in reference.items()}
        for step in range(STEPS):
            loss, _ = engine(self.batch(step))
            engine.backward(loss)
            for name, parameter in trained:
                weights, gradient = reference[name], safe_get_full_grad(parameter).float()
                norms = weights.norm(), gradient.norm()
                ratio = 0.02 * norms[0] / norms[1] if weights.ndim > 1 and min(norms) > 0 else 1.0
                weights.grad = ratio * gradient
            engine.step()
            adam.step()
        weights = {name: self._master(parameter) for name, parameter in trained}
        engine.destroy()
        return {"engine": weights, "reference": {name: w.detach() for name, w in reference.items()}, "first": first}

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
