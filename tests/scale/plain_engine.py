"""One rank with a plain DeepSpeed engine, nothing of ours around it: `python plain_engine.py save|load FOLDER`.

`save` trains with ZeRO-3, saves a checkpoint of ours, and takes one more step. `load` reads what the checkpoint was
consolidated into through DeepSpeed's own universal loading, under ZeRO-1 and ZeRO-3, and takes that step.
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


def engine_of(stage: int, seed: int, **more: Any) -> Any:
    torch.manual_seed(seed)
    module = Small()
    config = config_of(stage, **more)
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
    return engine


def take_step(engine: Any, number: int) -> None:
    batch = torch.randn(GLOBAL_BATCH, 7, generator=torch.Generator().manual_seed(number))
    share = GLOBAL_BATCH // dist.get_world_size()
    loss = engine(batch[dist.get_rank() * share :][:share])
    engine.backward(loss)
    engine.step()


def whole(engine: Any) -> dict[str, Tensor]:
    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def write(values: dict[str, Tensor], path: Path) -> None:
    if dist.get_rank() == 0:
        save_file(values, path)


def main() -> None:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    deepspeed.init_distributed("gloo")
    if mode == "save":
        from m3i_scale.checkpoint.saver import Saver

        engine = engine_of(3, seed=1)
        for number in range(STEPS):
            take_step(engine, number)
        final = folder / "checkpoints" / "step-00000003"
        meta = {"step": STEPS, "world_size": dist.get_world_size()}
        Saver(engine, None).save(final, data_state={}, meta=meta, run_yaml="name: plain\n")
        write(whole(engine), folder / "saved.safetensors")
        take_step(engine, STEPS)
        write(whole(engine), folder / "after.safetensors")
    else:
        for stage in (1, 3):
            engine = engine_of(stage, seed=2, checkpoint={"load_universal": True})
            path, _ = engine.load_checkpoint(str(folder / "universal"))
            assert path is not None
            assert engine.global_steps == STEPS
            name = f"zero{stage}-{dist.get_world_size()}.safetensors"
            write(whole(engine), folder / f"loaded-{name}")
            take_step(engine, STEPS)
            write(whole(engine), folder / f"after-{name}")
            engine.destroy()
    dist.barrier()
    os._exit(0)  # DeepSpeed's hooks keep engines alive, and an interpreter that goes down under their threads may abort


if __name__ == "__main__":
    main()
