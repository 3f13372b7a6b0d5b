"""Engines with an EMA teacher: `python average_engine.py save FOLDER`, `python average_engine.py load FOLDER`.

`save` trains under ZeRO-3 and saves a checkpoint. `load` brings engines of other stages to it, and saves each again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from plain_engine import Small, config_of, take_step
from torch import Tensor, nn

from m3i_scale.checkpoint.load import load_checkpoint
from m3i_scale.checkpoint.saver import Saver
from m3i_scale.engine.averages import ShardedEma

STEP = "step-00000003"


class Averaged(nn.Module):
    """A module, and a copy of it that only averages."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = Small(), Small()
        self.target.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.online(x)
        return loss


def engine_of(stage: int, dtype: str, seed: int) -> tuple[Any, ShardedEma]:
    torch.manual_seed(seed)
    module = Averaged()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    config = config_of(stage, **({"bf16": {"enabled": True}} if dtype == "bf16" else {}))
    engine, *_ = deepspeed.initialize(model=module, model_parameters=trained, config=config)
    pairs = [(f"online.{name}", f"target.{name}") for name, _ in module.online.named_parameters()]
    return engine, ShardedEma(engine, pairs)


def save(engine: Any, momentum: ShardedEma, final: Path) -> None:
    meta = {"step": 3, "world_size": dist.get_world_size()}
    Saver(engine, momentum).save(final, data_state={}, meta=meta, run_yaml="name: averaged\n")


def main() -> None:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    deepspeed.init_distributed("gloo")
    if mode == "save":
        engine, momentum = engine_of(3, "fp32", seed=1)
        for number in range(3):
            take_step(engine, number)
            momentum.update(0.5)
        save(engine, momentum, folder / STEP)
    else:
        for stage, dtype in ((1, "fp32"), (2, "bf16"), (3, "bf16"), (3, "fp32")):
            engine, momentum = engine_of(stage, dtype, seed=2)
            load_checkpoint(folder / STEP, engine, momentum)
            save(engine, momentum, folder / f"zero{stage}-{dtype}-{dist.get_world_size()}" / STEP)
            engine.destroy()
    dist.barrier()
    os._exit(0)  # DeepSpeed's hooks keep engines alive, and an interpreter that goes down under their threads may abort


if __name__ == "__main__":
    main()
