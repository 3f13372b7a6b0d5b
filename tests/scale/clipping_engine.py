"""Ranks that clip gradients under ZeRO-1 in bf16: `python clipping_engine.py FOLDER`.

The same steps are taken twice, by DeepSpeed alone and by `take_step`; every rank writes what came of them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from plain_engine import GLOBAL_BATCH, Small, config_of
from torch.utils._python_dispatch import TorchDispatchMode

from m3i_scale.engine.engine import take_step
from m3i_scale.engine.engine_state import pieces

BOUNDS = (1e-3, 1e3)
"""All of the steps are clipped, or none is."""
STEPS, NOT_FINITE = 4, 2


class Reads(TorchDispatchMode):
    """Counts values that the host reads."""

    count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += operator._schema.name == "aten::_local_scalar_dense"
        return operator(*args, **(kwargs or {}))


def train(step: Callable[[Any], None], bound: float) -> dict[str, Any]:
    torch.manual_seed(1)
    module = Small()
    more = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "gradient_clipping": bound}
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config_of(1, **more))
    share = GLOBAL_BATCH // dist.get_world_size()
    norms, applied, reads = [], [], []
    for number in range(STEPS):
        batch = torch.randn(GLOBAL_BATCH, 7, generator=torch.Generator().manual_seed(number)).bfloat16()
        loss = engine(batch[dist.get_rank() * share :][:share])
        engine.backward(loss * (torch.nan if number == NOT_FINITE else 1.0))
        with Reads() as counted:
            step(engine)
        norms.append(float(engine.get_global_grad_norm()))
        applied.append(engine.was_step_applied())
        reads.append(counted.count)
    weights = {piece.name: piece.tensors["weight"].tolist() for piece in pieces(engine)}
    return {"norms": norms, "applied": applied, "reads": reads, "weights": weights}


def main() -> None:
    deepspeed.init_distributed("gloo")
    told = {
        str(bound): {"deepspeed": train(lambda engine: engine.step(), bound), "ours": train(take_step, bound)}
        for bound in BOUNDS
    }
    (Path(sys.argv[1]) / f"{dist.get_world_size()}-{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.barrier()
    os._exit(0)  # DeepSpeed's hooks keep engines alive, and an interpreter that goes down under their threads may abort


if __name__ == "__main__":
    main()
