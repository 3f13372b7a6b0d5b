"""Have this process compute on the simulated GPU, as rank 0 of several. Import it before DeepSpeed."""

from __future__ import annotations

import os
from typing import Any

import collectives
import device_api
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

WORLD = 2


def _start() -> Any:
    """Return DeepSpeed's accelerator for CUDA, once everything that it asks is replaced."""
    device_api.install()
    world = str(WORLD)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, LOCAL_SIZE=world)
    os.environ["DS_ACCELERATOR"] = "cuda"
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())  # type: ignore[no-untyped-call]
    collectives.install()
    import deepspeed

    deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)
    return deepspeed.accelerator.get_accelerator()


ACCELERATOR = _start()
