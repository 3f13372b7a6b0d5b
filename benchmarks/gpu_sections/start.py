"""Every built-in DeepSpeed file starts on a machine without nvcc, and what needs it is refused in one line."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from _rows import Rows
from deepspeed.accelerator import get_accelerator
from rank_parts import RankParts

from m3i_scale.config import resource_folder
from m3i_scale.engine.deepspeed.resolve import ResolvedConfig, check_accelerator
from m3i_scale.engine.process_group import stop_ranks
from m3i_scale.errors import ConfigError
from m3i_scale.run.setup import start_engine


def measure(mode: str, rows: Rows) -> None:
    """Rows: a step under every file for this device; under `fake`, what is checked before a start."""
    files = sorted(path.stem for path in resource_folder("ds_configs").glob("*.json"))
    on_cpus = [name for name in files if name.split("_")[1] == "cpu"]
    wanted = on_cpus if mode == "cpu" else [name for name in files if name not in on_cpus]
    with tempfile.TemporaryDirectory() as folder, _presented(mode):
        parts = RankParts(Path(folder))
        resolved = {name: parts.plan(name, "m3i") for name in wanted}
        for name, plan in resolved.items():
            check_accelerator(plan.deepspeed)
            if mode != "fake":
                engine, ema = start_engine(plan, parts.ranks)
                parts._train_step(engine, 0)
                ema.update(0.9)
                engine.destroy()
            rows.must(name, "starts", "starts", ok=True)
        if mode != "cpu":
            refused = _needs_nvcc(resolved["zero3_bf16"].deepspeed)
            rows.must("DeepSpeed's own Adam", "refused", "refused" if refused else "accepted", ok=refused)
        stop_ranks(wait=True)
    if mode == "cuda":
        _step_of_a_long_tensor(rows)


def _step_of_a_long_tensor(rows: Rows) -> None:
    """Row: fused AdamW updates every element of a flat tensor whose last indices need more than 32 bits. ZeRO-1 on one
    GPU makes such a tensor of a model of 2.2 billion parameters."""
    flat = torch.zeros(2**31 + 8, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    flat.grad = torch.ones_like(flat)
    torch.optim.AdamW([flat], lr=1.0, fused=True).step()
    updated = int((flat.detach() < 0).sum())
    rows.must("elements that AdamW updates", flat.numel(), updated, ok=updated == flat.numel())


def _needs_nvcc(resolved: ResolvedConfig) -> bool:
    """Return whether DeepSpeed's own Adam is refused in this configuration, which this changes."""
    resolved.config["optimizer"]["params"]["torch_adam"] = False
    try:
        check_accelerator(resolved)
    except ConfigError:
        return True
    return False


@contextlib.contextmanager
def _presented(mode: str) -> Iterator[None]:
    """Under `fake`, have the checks see a CUDA device without nvcc."""
    if mode != "fake":
        yield
        return
    seen = {"device_name": "cuda", "is_bf16_supported": True, "is_fp16_supported": True}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("torch.utils.cpp_extension.CUDA_HOME", None))
        for name, value in seen.items():
            stack.enter_context(mock.patch.object(get_accelerator(), name, lambda *_, value=value: value))
        yield
