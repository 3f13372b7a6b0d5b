"""Cases about fp16 with a loss scale, and about the type in which gradients are added up."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_grad
from rank_parts import GLOBAL_BATCH, RankParts
from tiny import LABEL_SETS, first_weights
from torch import Tensor

from m3i_scale.checkpoint.load import load_checkpoint
from m3i_scale.checkpoint.saver import Saver
from m3i_scale.engine.engine import loss_scale, take_step, undone_if_skipped
from m3i_scale.engine.peak import Peak
from m3i_scale.objective.build import build_objective
from m3i_scale.run.flops import Work
from m3i_scale.run.meter import Meter
from m3i_scale.run.setup import start_engine

MICRO_BATCHES = 16
"""A power of two: the engine divides every loss by it, which must be exact in bf16."""
FIRST_POWER = 20
"""2^20 times the loss overflows in fp16."""
FOLLOWED = ("m3i", "recipe.balance={kind: gradient_norm, momentum: 0.5}")


class PrecisionCases(RankParts):
    """One method per case."""

    def fp16(self, ds_config: str) -> dict[str, Any]:
        """From a loss scale that overflows down to one that does not, through a checkpoint, and overflowing again.

        torch computes in fp16 on any CPU, if slowly; DeepSpeed only asks whether it would be fast.
        """
        accelerator = get_accelerator()
        accelerator.is_fp16_supported = lambda: True
        try:
            return self._fp16(ds_config)
        finally:
            del accelerator.is_fp16_supported

    def _fp16(self, ds_config: str) -> dict[str, Any]:
        plan = self.plan("zero3_fp16", *FOLLOWED)
        plan.deepspeed.config["fp16"] |= {"initial_scale_power": FIRST_POWER, "hysteresis": 1}
        if ds_config != "zero3_fp16":
            plan.deepspeed.config["zero_optimization"] = self.plan(ds_config, "mae").deepspeed.config[
                "zero_optimization"
            ]
        engine, momentum = start_engine(plan, self.ranks)
        meter = Meter(engine.module, GLOBAL_BATCH, Work({}, 1, Peak(1.0, "given")))

        def kept() -> dict[str, Tensor]:
            values = {k: self._master(p).clone() for k, p in engine.module.named_parameters() if p.requires_grad}
            values |= {f"momentum {name}": value for name, value in self._averages(momentum).items()}
            values |= {f"buffer {k}": b.clone() for k, b in engine.module.named_buffers() if k.startswith("weights.")}
            steps = [s["step"] for s in engine.basic_optimizer.state.values() if "step" in s]
            return values | {"adam": torch.tensor([float(step) for step in steps])}

        def step(seed: int) -> bool:
            with undone_if_skipped(engine, engine.module):
                loss, _ = engine(self.batch(seed))
                engine.backward(loss)
                engine.module.after_backward(loss_scale(engine))
                meter.add_gradients(loss_scale(engine))
                take_step(engine)
            if engine.was_step_applied():
                momentum.update(0.9)
            meter.end_step(applied=engine.was_step_applied())
            return bool(engine.was_step_applied())

        start, scales, moved = kept(), [], []
        while True:
            scales.append(loss_scale(engine))
            if step(0):
                break
            moved += [key for key, value in kept().items() if not torch.equal(value, start.get(key, value))]
        norms = {name: mean for name, mean in meter._good.means().items() if name.endswith("/grad_norm")}
        factors = engine.module.weights.factors_K.clone()
        skipped = engine.skipped_steps
        folder = self.out / "checkpoints" / f"fp16-{ds_config}" / "step-00000001"
        stage = int(engine.zero_optimization_stage())
        meta = {"world_size": self.world, "zero_stage": stage, "step": 1}
        Saver(engine, momentum).save(folder, data_state={}, meta=meta, run_yaml="name: x\n")

        def go_on() -> dict[str, Any]:
            applied = [step(1)]
            engine.optimizer.cur_scale = 2.0**FIRST_POWER
            applied += [step(2)]
            told = {"applied": applied, "scale": loss_scale(engine), "skipped": engine.skipped_steps}
            return {"told": told, "values": kept()}

        straight = go_on()
        engine.optimizer.loss_scaler.scale_window = 500  # as if the run file said so now
        load_checkpoint(folder, engine, momentum)
        loaded = {"scale": loss_scale(engine), "skipped": engine.skipped_steps}
        window = engine.optimizer.loss_scaler.scale_window
        again = go_on()
        engine.destroy()
        return {
            "scales": scales,
            "moved_while_skipped": moved,
            "norms": norms,
            "factors": factors,
            "skipped": skipped,
            "loaded": loaded,
            "window": window,
            "straight": straight["told"],
            "again": again["told"],
            "resumed_different": [k for k, v in straight["values"].items() if not torch.equal(v, again["values"][k])],
            "plain": self._plain_norms(),
        }

    def _plain_norms(self) -> dict[str, Any]:
        """Norms and factors of the first batch, in fp32 and without an engine."""
        plan = self.plan("zero3_cpu_fp32", *FOLLOWED)
        objective = build_objective(plan.run, LABEL_SETS, plan.vocab_size, self.ranks)
        first_weights(objective, plan.run.seed, plan.run.backbone.weight_init)
        objective(self.batch(0))[0].backward()
        objective.after_backward()
        parts = objective.squared_grad_norms.items()
        norms = {f"{name}/grad_norm": float(torch.stack(squared).sum().sqrt()) for name, squared in parts}
        return {"norms": norms, "factors": objective.weights.factors_K.clone()}

    def added_up(self, ds_config: str) -> dict[str, float]:
        """How far the sum over many micro-batches is from the fp32 sum of their gradients, relative to the largest."""
        single, _ = start_engine(self.plan(ds_config, "supervised"), self.ranks)
        total: dict[str, Tensor] = {}
        for group in single.optimizer.param_groups:
            group["lr"] = 0.0
        for seed in range(MICRO_BATCHES):
            single.backward(single(self.batch(seed))[0])
            for name, gradient in self._gradients(single).items():
                total[name] = total.get(name, torch.zeros_like(gradient)) + gradient / MICRO_BATCHES
            single.step()
        single.destroy()
        batch_size = f"optim.batch_size={MICRO_BATCHES * GLOBAL_BATCH}"
        engine, _ = start_engine(self.plan(ds_config, "supervised", batch_size), self.ranks)
        for seed in range(MICRO_BATCHES):
            engine.backward(engine(self.batch(seed))[0])
            if seed + 1 < MICRO_BATCHES:
                engine.step()
        found = self._gradients(engine)
        engine.destroy()
        largest = max(float(value.abs().max()) for value in total.values())
        return {"error": max(float((found[name] - value).abs().max()) for name, value in total.items()) / largest}

    def _gradients(self, engine: Any) -> dict[str, Tensor]:
        named = engine.module.named_parameters()
        return {name: safe_get_full_grad(p).float().clone() for name, p in named if p.requires_grad}
