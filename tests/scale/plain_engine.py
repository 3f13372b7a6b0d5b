"""One rank with a plain DeepSpeed engine, nothing of ours around it: `python plain_engine.py FOLDER`.

It trains with ZeRO-3, and saves a checkpoint of ours.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

STEPS, GLOBAL_BATCH = 3, 4


class Small(nn.Module):
    """Odd sizes, so that shards have padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 33)
        self.norm = nn.LayerNorm(33)
        self.head = nn.Linear(33, 5)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.head(self.norm(torch.tanh(self.embed(x)))).square().mean()


def config_of(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // dist.get_world_size(),
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True, "fused": True},
        },
        "zero_optimization": {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0},
        **more,
    }


def take_step(engine: Any, number: int) -> None:
    batch = torch.randn(GLOBAL_BATCH, 7, generator=torch.Generator().manual_seed(number))
    share = GLOBAL_BATCH // dist.get_world_size()
    loss = engine(batch[dist.get_rank() * share :][:share])
    engine.backward(loss)
    engine.step()


def main() -> None:
    from m3i_scale.checkpoint.saver import Saver

    folder = Path(sys.argv[1])
    deepspeed.init_distributed("gloo")
    torch.manual_seed(1)
    module = Small()
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config_of(3))
    for number in range(STEPS):
        take_step(engine, number)
    final = folder / "checkpoints" / "step-00000003"
    meta = {"step": STEPS, "world_size": dist.get_world_size()}
    Saver(engine, None).save(final, data_state={}, meta=meta, run_yaml="name: plain\n")
    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        if dist.get_rank() == 0:
            save_file(
                {name: value.detach().clone() for name, value in parameters.items()}, folder / "saved.safetensors"
            )
    dist.barrier()
    os._exit(0)  # DeepSpeed's hooks keep engines alive, and an interpreter that goes down under their threads may abort


if __name__ == "__main__":
    main()
