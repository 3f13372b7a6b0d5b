"""A loaded checkpoint gives the optimizer its moments and its count of steps, on the devices that its kernels take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from m3i_scale.engine.engine_state import make_moments, optimizer_steps

STAGES = ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups")


def state_after(flat: Tensor, steps: int, *, stage: str = STAGES[1], **options: Any) -> tuple[Any, dict[str, Any]]:
    """An engine with one flat tensor, and what its optimizer holds of it."""
    optimizer = torch.optim.AdamW([flat], **options)
    if stage == STAGES[0]:
        optimizer.param_groups[0]["params"] = []  # as DeepSpeed leaves them between two steps
    engine = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer, **{stage: [flat]}))
    make_moments(engine, steps)
    return engine, optimizer.state[flat]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("options", "counts_on"),
    [({"fused": True}, "meta"), ({}, "cpu")],
)
def test_steps_are_counted_where_torch_counts_them(stage: str, options: dict[str, bool], counts_on: str) -> None:
    """The meta device stands for a GPU: it is not the host's, either."""
    flat = torch.empty(5, device="meta", requires_grad=True)
    _, state = state_after(flat, 7, stage=stage, **options)
    assert state["step"].device.type == counts_on
    assert state["step"].dtype == torch.float32
    assert {state[kind].device.type for kind in ("exp_avg", "exp_avg_sq")} == {"meta"}


@pytest.mark.parametrize("options", [{"fused": True}, {}])
def test_torchs_own_loading_moves_nothing_that_was_made(options: dict[str, bool]) -> None:
    flat = torch.empty(5, device="meta", requires_grad=True)
    _, made = state_after(flat, 7, **options)
    optimizer = torch.optim.AdamW([flat], **options)
    saved = optimizer.state_dict() | {"state": {0: {name: value.clone() for name, value in made.items()}}}
    optimizer.load_state_dict(saved)
    loaded = optimizer.state[flat]
    assert {name: (value.device, value.dtype) for name, value in loaded.items()} == {
        name: (value.device, value.dtype) for name, value in made.items()
    }


def test_the_next_step_is_that_of_an_optimizer_that_was_never_left() -> None:
    torch.manual_seed(0)
    flat, gradients = torch.randn(5, requires_grad=True), torch.randn(4, 5)
    other = flat.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([flat], fused=True)
    for gradient in gradients[:3]:
        flat.grad = gradient
        optimizer.step()
    engine, state = state_after(other, 3, fused=True)
    for kind in ("exp_avg", "exp_avg_sq"):
        state[kind].copy_(optimizer.state[flat][kind])
    with torch.no_grad():
        other.copy_(flat)
    flat.grad, other.grad = gradients[3], gradients[3].clone()
    optimizer.step()
    engine.optimizer.optimizer.step()
    assert torch.equal(flat, other)
    assert optimizer_steps(engine) == 4
