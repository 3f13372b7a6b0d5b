"""Cases about what lasts from step to step: EMA teacher, queues, centers, weights; through checkpoints too."""

from __future__ import annotations

from typing import Any

import deepspeed.comm
import torch
import torch.distributed as dist
from deepspeed.utils import groups, safe_get_full_grad
from rank_parts import GLOBAL_BATCH, RankParts
from tiny import LABEL_SETS, first_weights
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from m3i_scale.checkpoint.load import first_samples, load_checkpoint
from m3i_scale.checkpoint.saver import Saver
from m3i_scale.checkpoint_tools.consolidate import saved_weights
from m3i_scale.objective.build import build_objective, ema_pairs
from m3i_scale.run.setup import start_engine

STEPS = 8
REMEMBERED = {
    "queue": ("densecl",),
    "center": ("ibot",),
    "correlation": ("unigrad",),
    "balance": ("m3i", "recipe.balance={kind: gradient_norm, momentum: 0.5}"),
}
"""Recipes that keep something between batches."""
ENGINES = {"zero1_bf16": 1, "zero1_cpu_fp32": 1, "zero2_bf16": 2, "zero3_cpu": 3, "zero3_cpu_fp32": 3}
ENGINES["zero3_cpu_hpz"] = 3
"""DeepSpeed files, and their stage. The last is `zero3_cpu` with second copies of the parameters in groups of ranks."""


class Collectives(TorchDispatchMode):
    """Names of the collectives of this thread, whoever calls them: all pass through torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.seen.append(function._opname)
        return function(*args, **(kwargs or {}))


class LastingCases(RankParts):
    """One method per case."""

    def first_samples(self) -> dict[int, list[str]]:
        """Keys of the first samples of a global batch, by how many are asked for."""
        return {count: first_samples(self.batch(), count).keys for count in (1, GLOBAL_BATCH // 2 + 1, GLOBAL_BATCH)}

    def accumulated(self, recipe: str, *overrides: str) -> dict[str, Any]:
        """Gradients of two micro-batches that make one step: of the engine, and of plain modules."""
        plan = self.plan("zero3_cpu_fp32", recipe, f"optim.batch_size={2 * GLOBAL_BATCH}", *overrides)
        objective = build_objective(plan.run, LABEL_SETS, plan.vocab_size, self.ranks)
        first_weights(objective, plan.run.seed, plan.run.backbone.weight_init)
        for seed in (1, 2):
            (objective(self.batch(seed))[0] / 2).backward()
            objective.after_backward()
        gradients = {name: p.grad for name, p in objective.named_parameters() if p.requires_grad}
        for gradient in gradients.values():
            gradient.copy_(self.ranks.sum(gradient) / self.world)
        engine, _ = start_engine(plan, self.ranks)
        engine.backward(engine(self.batch(1))[0])
        engine.module.after_backward()
        engine.step()
        updates = engine.global_steps
        engine.backward(engine(self.batch(2))[0])
        theirs = {n: safe_get_full_grad(p).clone() for n, p in engine.module.named_parameters() if p.requires_grad}
        engine.destroy()
        return {"plain": gradients, "engine": theirs, "updates": updates}

    def momentum(self, ds_config: str, stage: int) -> dict[str, Any]:
        """The sharded average beside one of the gathered fp32 weights, and the copy that the forward pass used."""
        plan = self.plan(ds_config.removesuffix("_hpz"), "sim")
        if ds_config.endswith("_hpz"):
            plan.deepspeed.config["zero_optimization"]["zero_hpz_partition_size"] = self.world
        engine, momentum = start_engine(plan, self.ranks)
        assert momentum is not None
        named = dict(engine.module.named_parameters())
        pairs = ema_pairs(engine.module)
        used: dict[str, Tensor] = {}
        self._watch_forward(engine.module, used)
        reference = {target: self._master(named[online]) for online, target in pairs}
        frozen = {
            name: self._full_value(parameter)
            for name, parameter in named.items()
            if name.startswith("student.") and not parameter.requires_grad
        }
        collectives = Collectives()
        for step in range(STEPS):
            self._train_step(engine, step)
            with collectives:
                momentum.update(0.99 + 0.0003 * step)
            for online, target in pairs:
                reference[target].lerp_(self._master(named[online]), 1.0 - (0.99 + 0.0003 * step))
        with torch.no_grad():
            engine(self.batch(99))
        averages = {name: self._average(momentum, name, reference[name]) for name in reference}
        moved = max(float((averages[t] - self._master(named[o])).abs().max()) for o, t in pairs)
        result = {
            "different": [name for name, value in averages.items() if not torch.equal(value, reference[name])],
            "stale": [name for name in reference if not self._is_nearest(used[name], reference[name])],
            "unused": sorted(set(reference) - set(used)),
            "moved": moved,
            "frozen": [*frozen],
            "frozen_moved": [not torch.equal(self._full_value(named[name]), value) for name, value in frozen.items()],
            "positions": frozen["student.model.embeddings.position_embeddings"].float(),
            "collectives": collectives.seen,
            "collectives_of_others": self._other_collectives(),
            "dtype": str(next(iter(used.values())).dtype),
            "small": sum(value.numel() <= 640 for value in reference.values()),
            "sub_groups": len(getattr(engine.optimizer, "sub_group_to_group_id", ())),
        }
        result["second_copies"] = sum(
            getattr(named[target], "ds_secondary_tensor", None) is not None for _, target in pairs
        )
        result["sum"] = sum(float(value.double().sum()) for value in reference.values())
        result |= self._through_checkpoint(f"{ds_config}-{stage}", stage, engine, momentum, reference)
        engine.destroy()
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # DeepSpeed makes it once a process, and hands it to all engines
        return result

    def _other_collectives(self) -> list[str]:
        """What the counter sees of collectives that are there."""
        with (counter := Collectives()):
            dist.all_reduce(torch.ones(1))
            deepspeed.comm.all_reduce(torch.ones(1))
            dist.barrier()
        return counter.seen

    def _through_checkpoint(
        self, name: str, stage: int, engine: Any, momentum: Any, averages: dict[str, Tensor]
    ) -> dict[str, Any]:
        folder = self.out / "checkpoints" / name / f"step-{STEPS:08d}"
        meta = {"world_size": self.world, "zero_stage": stage, "step": STEPS}
        clipping, engine.optimizer.clip_grad = engine.optimizer.clip_grad, 123.0
        Saver(engine, momentum).save(folder, data_state={"rank": self.rank}, meta=meta, run_yaml="name: x\n")
        engine.optimizer.clip_grad = clipping
        trained, averaged = dict(saved_weights(folder, "student")), dict(saved_weights(folder, "ema"))
        named = dict(engine.module.named_parameters())
        wrong = []
        for key, parameter in named.items():
            if key.startswith("momentum."):
                online = key.removeprefix("momentum.").replace("backbone.", "student.", 1)
                wrong += [] if torch.equal(averaged[online], averages[key]) else [key]
            elif not torch.equal(trained[key], self._master(parameter)):
                wrong.append(key)

        def go_on() -> dict[str, Tensor]:
            for step in (STEPS, STEPS + 1):
                self._train_step(engine, step)
                momentum.update(0.99)
            masters = {k: self._master(p).clone() for k, p in named.items() if p.requires_grad}
            return masters | self._averages(momentum)

        straight = go_on()
        state = load_checkpoint(folder, engine, momentum)
        clipping_after = engine.optimizer.clip_grad
        again = go_on()
        return {
            "loaded_wrong": wrong,
            "clipping": (clipping, clipping_after),
            "resumed_different": [key for key, value in straight.items() if not torch.equal(value, again[key])],
            "data_state": state,
        }

    def remembered(self, recipe: str, *overrides: str) -> dict[str, Any]:
        """What heads and weights keep between batches: in fp32 in a bf16 engine, in the checkpoint, back from it."""
        plan = self.plan("zero3_cpu", recipe, *overrides)
        engine, momentum = start_engine(plan, self.ranks)

        def kept() -> dict[str, Tensor]:
            return {
                name: buffer.clone()
                for name, buffer in engine.module.named_buffers()
                if name.startswith(("states.", "weights.")) and buffer.numel()
            }

        def train(*steps: int) -> dict[str, Tensor]:
            for step in steps:
                self._train_step(engine, step)
                momentum.update(0.9)
            masters = {k: self._master(p).clone() for k, p in engine.module.named_parameters() if p.requires_grad}
            return masters | kept()

        lasting = engine.module.state_dict().keys()
        constants = {name: buffer for name, buffer in engine.module.named_buffers() if name not in lasting}
        first = kept()
        train(0, 1, 2)
        saved = kept()
        folder = self.out / "checkpoints" / f"remembered-{recipe}" / "step-00000003"
        meta = {"world_size": self.world, "zero_stage": 3, "step": 3}
        Saver(engine, momentum).save(folder, data_state={}, meta=meta, run_yaml="name: x\n")
        parameters = dict(engine.module.named_parameters())
        trained, averaged = dict(saved_weights(folder, "student")), dict(saved_weights(folder, "ema"))
        wrong = [
            name
            for name, parameter in parameters.items()
            if parameter.requires_grad and not torch.equal(trained[name], self._master(parameter))
        ]
        wrong += [name for name in trained if name not in parameters]
        for online, target in ema_pairs(engine.module):
            average = self._average(momentum, target, trained[online])
            wrong += [] if torch.equal(averaged[online], average) else [online]
        straight = train(3, 4)
        engine.destroy()
        engine, momentum = start_engine(plan, self.ranks)  # as a new process would
        load_checkpoint(folder, engine, momentum)
        loaded = kept()
        again = train(3, 4)
        engine.destroy()
        return {
            "constants": constants,
            "dtypes": sorted({str(buffer.dtype) for buffer in saved.values()}),
            "moved": [name for name, buffer in saved.items() if not torch.equal(buffer, first[name])],
            "loaded_different": [name for name, buffer in saved.items() if not torch.equal(buffer, loaded[name])],
            "resumed_different": [name for name, value in straight.items() if not torch.equal(value, again[name])],
            "kept": saved,
            "loaded_wrong": wrong,
        }

    def _watch_forward(self, module: nn.Module, used: dict[str, Tensor]) -> None:
        """Keep what every target module really multiplied with, seen from inside its forward pass."""
        for prefix, child in module.named_modules():
            own = dict(child.named_parameters(recurse=False))
            if not prefix.startswith("momentum.") or not own:
                continue

            def note(child: nn.Module, inputs: Any, prefix: str = prefix) -> None:
                for name, parameter in child.named_parameters(recurse=False):
                    used[f"{prefix}.{name}"] = parameter.detach().clone()

            child.register_forward_pre_hook(note)
