"""What an engine asks of a GPU when it is started."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator import cuda_accelerator
from torch import nn

from m3i_scale.engine import engine as under_test

FREE, TOTAL = 70 << 30, 80 << 30
CONFIG: dict[str, Any] = {
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "fused": True}},
}


@pytest.mark.parametrize(
    "names", ["0", "GPU-6f3c1e2a-0000-1111-2222-333344445555", "MIG-6f3c1e2a-0000-1111-2222-333344445555"]
)
def test_free_memory_is_known_whatever_gpus_are_called(monkeypatch: pytest.MonkeyPatch, names: str) -> None:
    """DeepSpeed asks for it under ZeRO-2, where pynvml is installed by the numbers of the GPUs."""
    monkeypatch.setattr(cuda_accelerator, "pynvml", SimpleNamespace())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (FREE, TOTAL))
    accelerator = cuda_accelerator.CUDA_Accelerator()
    monkeypatch.setattr(under_test, "get_accelerator", lambda: accelerator)
    asked: list[int] = []

    def initialize(**given: Any) -> tuple[Any, ...]:
        asked.append(accelerator.available_memory())
        return given["model"], None, None, None

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    module = nn.Linear(2, 2)
    module.optimizer = None
    assert under_test.build_engine(lambda: module, lambda built: None, CONFIG, weight_decay=0.1) is module
    assert asked == [FREE]
