"""What every case of the distributed tests stands on: a plan, a part of the batch, whole values out of shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from tiny import LABEL_SETS, VOCABULARY, in_parts, part, random_batch, tiny_run
from torch import Tensor, nn

from m3i_scale.backbones.build import backbone_config
from m3i_scale.engine.averages import ShardedEma
from m3i_scale.engine.deepspeed.resolve import resolve
from m3i_scale.engine.device import join
from m3i_scale.engine.partition import gathered
from m3i_scale.engine.process_group import start_ranks
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.run.setup import ResolvedRun

GLOBAL_BATCH = 8


class Vocabulary:
    """Stands for a tokenizer where only its size is asked for."""

    def __len__(self) -> int:
        return VOCABULARY


class RankParts:
    """One rank of one process group."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.ranks = start_ranks()
        self.rank, self.world = self.ranks.rank, self.ranks.world_size
        self.image = 32

    def plan(self, ds_config: str, recipe: str, *overrides: str) -> ResolvedRun:
        micro = GLOBAL_BATCH // self.world
        run = tiny_run(
            recipe, f"optim.batch_size={GLOBAL_BATCH}", f"optim.micro_batch_size={micro}", "optim.lr=1e-2", *overrides
        )
        optim = run.optim
        resolved = resolve(
            in_parts(ds_config),
            world_size=self.world,
            batch_size=optim.batch_size,
            micro_batch_size=micro,
            clip_grad_norm=optim.clip_grad_norm,
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            hidden_size=64,
            where=ds_config,
        )
        parsed, self.image = parse_recipe(run.recipe), backbone_config(run.backbone).image_size
        return ResolvedRun(run, parsed, LABEL_SETS, Vocabulary() if parsed.uses_text else None, self.image, resolved, 1)

    def batch(self, seed: int = 0) -> Any:
        size = GLOBAL_BATCH // self.world
        return part(random_batch(GLOBAL_BATCH, seed=seed, image=self.image), self.rank * size, (self.rank + 1) * size)

    def full_values(self, module: nn.Module) -> dict[str, Tensor]:
        return {name: self._full_value(parameter) for name, parameter in module.named_parameters()}

    @staticmethod
    def _full_value(parameter: nn.Parameter) -> Tensor:
        with gathered([parameter]):
            return parameter.detach().clone()

    def _train_step(self, engine: Any, step: int) -> None:
        loss, _ = engine(self.batch(step))
        engine.backward(loss)
        engine.module.after_backward()
        engine.step()

    def _master(self, parameter: nn.Parameter) -> Tensor:
        full = safe_get_full_fp32_param(parameter)
        return (self._full_value(parameter) if full is None else full).float().clone()

    @staticmethod
    def _is_nearest(used: Tensor, exact: Tensor) -> bool:
        """Whether every element is the number of its type that is nearest; at a tie both neighbours are."""
        errors = [(value.double() - exact.double()).abs() for value in (used, exact.to(used.dtype))]
        return torch.equal(*errors)

    @staticmethod
    def _averages(momentum: ShardedEma) -> dict[str, Tensor]:
        """What this rank saves of every average, flat."""
        pieces = {name: momentum.parts(name, start, numel) for name, start, numel in momentum.pieces()}
        return {name: join(*parts) if len(parts) == 2 else parts[0].clone() for name, parts in pieces.items()}

    def _average(self, momentum: ShardedEma, name: str, like: Tensor) -> Tensor:
        """What all ranks would save of an average, together."""
        gathered, values = torch.zeros(like.numel()), self._averages(momentum)[name]
        (start,) = (start for of, start, _ in momentum.pieces() if of == name)
        gathered[start : start + values.numel()] = values
        dist.all_reduce(gathered)
        return gathered.view_as(like)
