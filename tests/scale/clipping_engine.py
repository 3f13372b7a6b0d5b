"""Ranks that add up, reduce and clip gradients under ZeRO-1 in bf16: `python clipping_engine.py FOLDER`.

The same steps of several micro-batches are taken twice, by DeepSpeed alone and by an engine of ours; every rank writes
what came of them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from plain_engine import GLOBAL_BATCH, Small, config_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from m3i_scale.engine.engine import build_engine, take_step
from m3i_scale.engine.engine_state import pieces
from m3i_scale.engine.parameter_groups import parameter_groups

BOUNDS = (1e-3, 1e3, 0.0)
"""All of the steps are clipped, none is, or clipping is off."""
SENT = ("bf16", "fp32")
"""In the dtype of the sums, gradients are reduced during the backward pass."""
STEPS, NOT_FINITE, MICRO_BATCHES = 6, 2, 3
USED = {0: {1}, 1: {0, 2}, NOT_FINITE: {0, 1, 2}, 4: {2}}
"""Micro-batches that use the layer `rare`, by step. The step after NOT_FINITE does not use it. In the last step, each
rank uses it in a different micro-batch."""


class Parts(Small):
    """With a part that few micro-batches use, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.rare = nn.Linear(7, 33)
        self.frozen = nn.Linear(33, 33).requires_grad_(False)

    def forward(self, x: Tensor, uses_rare: bool) -> Tensor:
        hidden = torch.tanh(self.embed(x)) + (self.rare(x) if uses_rare else 0)
        return self.scale * self.head(self.norm(self.frozen(hidden))).square().mean()


def fill(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


class EventRecorder(TorchDispatchMode):
    """Counts values that the host reads, and lists the sizes of all-reduces in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.events: list[int | str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += operator._schema.name == "aten::_local_scalar_dense"
        if operator._schema.name == "c10d::allreduce_":
            self.events.append(sum(tensor.numel() for tensor in args[0]))
        return operator(*args, **(kwargs or {}))


def start(ours: bool, bound: float, sent: str) -> Any:
    config = config_of(1, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"}, gradient_clipping=bound)
    config["train_batch_size"] *= MICRO_BATCHES
    config["communication_data_type"] = sent
    config["zero_optimization"]["reduce_bucket_size"] = 250
    if ours:
        return build_engine(Parts, fill, config, weight_decay=0.1)
    module = Parts()
    fill(module)
    engine, *_ = deepspeed.initialize(model=module, model_parameters=parameter_groups(module, 0.1), config=config)
    return engine


def train(ours: bool, bound: float, sent: str, only_rank_0: bool = False) -> dict[str, Any]:
    """Take the steps. With `only_rank_0`, the other ranks never use the layer `rare`."""
    engine = start(ours, bound, sent)
    share = GLOBAL_BATCH // dist.get_world_size()
    named = dict(engine.module.named_parameters())
    frozen = named["frozen.weight"].clone()
    told: dict[str, Any] = {"norms": [], "applied": [], "reads": [], "gradients": [], "freed": [], "reduced": []}
    recorder = EventRecorder()
    named["embed.weight"].register_hook(lambda _: recorder.events.append("first layer"))  # before it is accumulated
    for number in range(STEPS):
        for part in range(MICRO_BATCHES):
            generator = torch.Generator().manual_seed(MICRO_BATCHES * number + part)
            batch = torch.randn(GLOBAL_BATCH, 7, generator=generator).bfloat16()
            used = USED.get(number, {2 - dist.get_rank()} if number == STEPS - 1 else set())
            used = set() if only_rank_0 and dist.get_rank() else used
            loss = engine(batch[dist.get_rank() * share :][:share], part in used)
            recorder.events = []
            with recorder:
                engine.backward(loss * (torch.nan if (number, part) == (NOT_FINITE, 1) else 1.0))
            told["reduced"].append(recorder.events)
            told["freed"].append(all(parameter.grad is None for parameter in named.values()))
            if part + 1 < MICRO_BATCHES:
                engine.step()
        if number != NOT_FINITE:
            gradients = {name: safe_get_full_grad(p) for name, p in named.items() if p.requires_grad}
            told["gradients"].append({name: gradient.tolist() for name, gradient in gradients.items()})
        with EventRecorder() as counted:
            take_step(engine) if ours else engine.step()
        told["norms"].append(float(engine.get_global_grad_norm()))
        told["applied"].append(engine.was_step_applied())
        told["reads"].append(counted.reads)
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        told[kind] = {piece.name: piece.tensors[kind].tolist() for piece in pieces(engine)}
    return told | {"frozen_moved": not torch.equal(named["frozen.weight"], frozen)}


def main() -> None:
    deepspeed.init_distributed("gloo")
    told = {
        f"{bound} {sent}": {side: train(side == "ours", bound, sent) for side in ("deepspeed", "ours")}
        for bound in BOUNDS
        for sent in SENT
    }
    told |= {f"{sent} rank 0 only": {"ours": train(True, BOUNDS[0], sent, only_rank_0=True)} for sent in SENT}
    (Path(sys.argv[1]) / f"{dist.get_world_size()}-{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.barrier()
    os._exit(0)  # DeepSpeed's hooks keep engines alive, and an interpreter that goes down under their threads may abort


if __name__ == "__main__":
    main()
