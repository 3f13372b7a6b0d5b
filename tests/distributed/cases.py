"""What one rank does in the distributed tests: all cases in one process group, results written to files.

Run by `conftest.py` with one and with two ranks: `python cases.py OUT`.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from lasting_cases import ENGINES, REMEMBERED, LastingCases
from open_clip.loss import ClipLoss, SigLipLoss
from rank_parts import GLOBAL_BATCH
from tiny import LABEL_SETS, VOCABULARY, first_weights
from torch import Tensor, nn
from transformers import ViTModel

from m3i_scale.backbones.build import backbone_config
from m3i_scale.errors import UserError
from m3i_scale.objective.build import build_objective, initialize_module, momentum_pairs
from m3i_scale.objective.distributions import bernoulli_pairs, boltzmann_pairs, gather_targets
from m3i_scale.run.preemption import Preemption
from m3i_scale.run.setup import start_engine
from m3i_scale.run.trainer import MicroBatch, Trainer
from m3i_scale.scale.collectives import agree, max_over_ranks, mean_over_ranks, stop_ranks
from m3i_scale.scale.engine import parameter_groups
from m3i_scale.scale.partition import (
    construct,
    copy_into,
    full_numel,
    full_shape,
    initialize_sharded,
    is_partitioned,
)

RECIPES = {name: (name,) for name in tiny.RECIPES} | {
    "barlow_narrow": ("barlow", "recipe.heads.global.width=6"),  # fewer channels than samples
    "vicreg_narrow": ("vicreg", "recipe.heads.global.width=6"),
    "m3i_mixed": ("m3i", "backbone.attention=mixed"),
    "m3i_maps": ("m3i", *tiny.MAPS, "backbone.attention=mixed"),
    "mae_maps": ("mae", *tiny.MAPS),
    "m3i_forward": ("m3i", "recipe.targets.2.direction=forward"),
    "m3i_learned": ("m3i", "recipe.balance={kind: learned}"),
    "m3i_followed": ("m3i", "recipe.balance={kind: gradient_norm, momentum: 0.5}"),
}


class Cases(LastingCases):
    """One method per case; each returns what the tests compare."""

    def run_all(self) -> None:
        cases: dict[str, Callable[[], Any]] = {
            "collectives": self.collectives,
            "construction": self.construction,
            "first_weights_plain": self.plain_first_weights,
            "first_weights_zero1": lambda: self.first_weights("zero1_bf16"),
            "first_weights_zero3": lambda: self.first_weights("zero3_cpu_fp32"),
            "from_pretrained": self.from_pretrained,
        }
        for name, arguments in RECIPES.items():
            cases[f"plain_{name}"] = lambda arguments=arguments: self.plain_gradients(*arguments)
            cases[f"zero3_{name}"] = lambda arguments=arguments: self.engine_gradients(*arguments)
        cases["zero3_m3i_recomputed"] = lambda: self.engine_gradients("m3i", "backbone.activation_checkpointing=full")
        for name in ("clip", "siglip"):
            cases[f"published_{name}"] = lambda name=name: self.published(name)
        for name, arguments in REMEMBERED.items():
            cases[f"remembered_{name}"] = lambda arguments=arguments: self.remembered(*arguments)
            cases[f"accumulated_{name}"] = lambda arguments=arguments: self.accumulated(*arguments)
        for name, stage in ENGINES.items():
            cases[f"momentum_{name}"] = lambda name=name, stage=stage: self.momentum(name, stage)
        for name, case in cases.items():
            try:
                result = case()
            except BaseException:
                (self.out / f"failed-rank{self.rank}.txt").write_text(f"case {name}\n{traceback.format_exc()}")
                raise
            torch.save(result, self.out / f"{name}-rank{self.rank}.pt")
            gc.collect()

    # ------------------------------------------------------------ parts

    # ------------------------------------------------------------ cases

    def collectives(self) -> dict[str, Any]:
        own = torch.arange(6.0).view(3, 2) + 10 * self.rank
        own.requires_grad_()
        gathered = self.ranks.gather(own)
        weights = torch.arange(float(gathered.numel())).view_as(gathered) * (self.rank + 1)
        (gathered * weights).sum().backward()
        return {
            "gathered": gathered.detach(),
            "gradient": own.grad,
            "flags": self.ranks.gather(torch.tensor([self.rank == 0, True])),
            "integers": self.ranks.gather(torch.tensor([2**62 + self.rank])),
            "sum": self.ranks.sum(torch.tensor([1.0 + self.rank], requires_grad=True)),
            "sum_gradient": self.sum_gradient(),
            "agree": agree(self.rank == self.world - 1, False, self.rank == 0),
            "agree_tensors": agree(torch.tensor(self.rank == self.world - 1), False, torch.tensor(False)),
            "votes": [self.vote(*case) for case in ((False, False), (False, True), (True, True))],
            "mean": mean_over_ranks({"b": 1.0 + self.rank, "a": float(10**9 + self.rank)}),
            "max": max_over_ranks({"b": 1.0 - self.rank, "a": float(self.rank)}),
            "nothing": (mean_over_ranks({}), max_over_ranks({})),
        }

    def sum_gradient(self) -> tuple[Tensor, Tensor]:
        """A sum over ranks, and what every rank's share gets of a loss that weighs it by 1, 2, …"""
        own = torch.tensor([1.0 + self.rank], requires_grad=True)
        total = self.ranks.sum_with_gradient(own)
        (total * (self.rank + 1)).sum().backward()
        assert own.grad is not None
        return total.detach(), own.grad

    def vote(self, nan_here: bool, asked_here: bool) -> Any:
        """The trainer's vote after two micro-batches, when only the last rank has met something."""
        last = self.rank == self.world - 1
        losses = [1.0, float("nan") if nan_here and last else 2.0]
        seen = [
            MicroBatch(torch.tensor(loss), {"text/loss": torch.tensor(loss)}, [f"r{self.rank}m{number}"])
            for number, loss in enumerate(losses)
        ]
        preemption = Preemption()
        preemption.requested = asked_here and last
        trainer = SimpleNamespace(ranks=self.ranks, step=6, preemption=preemption)
        try:
            return Trainer._vote(trainer, seen)
        except UserError as error:
            return str(error)

    def construction(self) -> dict[str, Any]:
        """The most parameters that this rank held at a time, while the model was built and while it was filled."""
        plan = self.plan("zero3_cpu_fp32", "m3i")
        alive: dict[int, Any] = {}
        peak = {"building": 0, "filling": 0}

        def held() -> int:
            return sum(parameter.numel() for reference in alive.values() if (parameter := reference()) is not None)

        def note(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            if parameter is not None:
                alive[id(parameter)] = weakref.ref(parameter)
                peak["building"] = max(peak["building"], held())

        hook = nn.modules.module.register_module_parameter_registration_hook(note)
        try:
            module = construct(
                lambda: build_objective(plan.run, LABEL_SETS, VOCABULARY, self.ranks), plan.deepspeed.config
            )
        finally:
            hook.remove()

        def initialize(owner: nn.Module, child: nn.Module) -> None:
            peak["filling"] = max(peak["filling"], sum(parameter.numel() for parameter in module.parameters()))
            initialize_module(owner, child)

        initialize_sharded(module, initialize, seed=0, skip=("momentum.",))
        parameters = list(module.parameters())
        largest = max(
            sum(full_shape(parameter).numel() for parameter in child.parameters(recurse=False))
            for child in module.modules()
        )
        return {
            "peak": peak,
            "largest_module": largest,
            "full": full_numel(module),
            "trainable": full_numel(module, trainable_only=True),
            "held_after": sum(parameter.numel() for parameter in parameters),
            "all_partitioned": all(is_partitioned(parameter) for parameter in parameters),
            "shards_fit": all(
                parameter.ds_tensor.numel() == -(-full_shape(parameter).numel() // self.world)
                for parameter in parameters
            ),
            "decayed": [len(group["params"]) for group in parameter_groups(module, 0.1)],
        }

    def plain_first_weights(self) -> dict[str, Tensor]:
        plan = self.plan("zero3_cpu_fp32", "m3i")
        objective = build_objective(plan.run, LABEL_SETS, VOCABULARY, self.ranks)
        initialize_sharded(objective, initialize_module, seed=plan.run.seed, skip=("momentum.",))
        return {name: p.detach() for name, p in objective.named_parameters() if not name.startswith("momentum.")}

    def first_weights(self, ds_config: str) -> dict[str, Tensor]:
        """The fp32 masters of an engine, and the averages of its momentum target."""
        engine, momentum = start_engine(self.plan(ds_config, "m3i"), self.ranks)
        assert momentum is not None
        named = dict(engine.module.named_parameters())
        values = {name: self._master(p) for name, p in named.items() if p.requires_grad}
        for online, target in momentum_pairs(engine.module):
            values[target] = self._gather_shard(momentum.shards[target], values[online])
        engine.destroy()
        return values

    def from_pretrained(self) -> dict[str, Any]:
        folder = self.out / "pretrained"
        plan = self.plan("zero3_cpu_fp32", "sim")
        if self.rank == 0:
            torch.manual_seed(5)
            ViTModel(backbone_config(plan.run.backbone), add_pooling_layer=False).save_pretrained(folder)
        dist.barrier()
        backbone = plan.run.backbone.model_copy(update={"from_pretrained": str(folder), "config": {}})
        plan = replace(plan, run=plan.run.model_copy(update={"backbone": backbone}))
        engine, _ = start_engine(plan, self.ranks)
        values = self.full_values(engine.module)
        wanted = dict(ViTModel.from_pretrained(folder, add_pooling_layer=False).named_parameters())
        different = [
            name
            for name, value in wanted.items()
            for prefix in ("student.model.", "momentum.backbone.model.")
            if not torch.equal(values[prefix + name], value)
        ]
        ours = {name for name in values if name.startswith("student.model.")}
        copied = self._copy_into(engine.module)
        return {"different": different, "count": (len(ours), len(wanted)), "copied": copied}

    def _copy_into(self, module: nn.Module) -> bool:
        """Whole tensors of rank 0 reach the shards of every rank, and nothing else is touched."""
        before = self.full_values(module)
        prefix = "student.model.layers.1."
        names = [name for name in before if name.startswith(prefix)]
        new = {name.removeprefix(prefix): torch.full_like(before[name], 0.5) for name in names}
        copy_into(module, prefix, new if self.rank == 0 else None)
        after = self.full_values(module)
        return all(
            bool((value == 0.5).all()) if name in names else torch.equal(value, before[name])
            for name, value in after.items()
        )

    def plain_gradients(self, recipe: str, *overrides: str) -> dict[str, Any]:
        plan = self.plan("zero3_cpu_fp32", recipe, *overrides)
        objective = build_objective(plan.run, LABEL_SETS, plan.vocab_size, self.ranks)
        first_weights(objective, plan.run.seed)
        objective(self.batch(1))[0].backward()  # queues, centers and balanced weights are not empty any more
        objective.after_backward()
        objective.zero_grad()
        loss, figures = objective(self.batch())
        loss.backward()
        gradients = {name: p.grad for name, p in objective.named_parameters() if p.requires_grad}
        for gradient in gradients.values():
            dist.all_reduce(gradient)
            gradient.div_(self.world)
        return self._told(loss, figures, gradients)

    def engine_gradients(self, recipe: str, *overrides: str) -> dict[str, Any]:
        engine, _ = start_engine(self.plan("zero3_cpu_fp32", recipe, *overrides), self.ranks)
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0
        self._train_step(engine, 1)
        loss, figures = engine(self.batch())
        engine.backward(loss)
        gradients = {
            name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters() if p.requires_grad
        }
        engine.destroy()
        return self._told(loss, figures, gradients)

    def _told(self, loss: Tensor, figures: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Any]:
        values = {"loss": float(loss.detach())} | {name: float(value) for name, value in figures.items()}
        return {"figures": mean_over_ranks(values), "gradients": gradients if self.rank == 0 else {}}

    def published(self, loss: str) -> dict[str, Any]:
        """CLIP and SigLIP over the global batch, beside open_clip's own losses on the same features."""
        generator = torch.Generator().manual_seed(3)
        size = GLOBAL_BATCH // self.world
        rows = slice(self.rank * size, (self.rank + 1) * size)
        features = [torch.randn(GLOBAL_BATCH, 6, generator=generator)[rows].requires_grad_() for _ in range(2)]
        numbers = [torch.tensor([value], requires_grad=True) for value in (10.0, -3.0)]
        leaves = [*features, *(numbers if loss == "siglip" else numbers[:1])]

        def ours() -> Tensor:
            image, text = (nn.functional.normalize(side, dim=-1) for side in features)
            items = torch.arange(1, GLOBAL_BATCH + 1)[rows]
            targets = gather_targets(text, items, torch.ones(size, dtype=torch.bool), self.ranks)
            if loss == "siglip":
                return bernoulli_pairs(image, targets, numbers[0], numbers[1], self.ranks)[0]
            return boltzmann_pairs(image, targets, numbers[0], self.ranks)[0]

        def theirs() -> Tensor:
            image, text = (nn.functional.normalize(side, dim=-1) for side in features)
            if loss == "siglip":
                peer = SigLipLoss(rank=self.rank, world_size=self.world, dist_impl="gather")
                value: Tensor = peer(image, text, *numbers)
                return value
            peer = ClipLoss(local_loss=True, gather_with_grad=True, rank=self.rank, world_size=self.world)
            value = peer(image, text, numbers[0])
            return value

        results = []
        for compute in (ours, theirs):
            value = compute()
            gradients = torch.autograd.grad(value, leaves)
            results.append({"loss": mean_over_ranks({"loss": float(value)})["loss"], "gradients": gradients})
        return {"ours": results[0], "theirs": results[1]}


def main() -> None:
    cases = Cases(Path(sys.argv[1]))
    clean = False
    try:
        cases.run_all()
        clean = True
    finally:
        stop_ranks(wait=clean)
    if cases.rank == 0:
        (cases.out / "done.json").write_text(json.dumps({"world": cases.world}))


if __name__ == "__main__":
    main()
