"""How a step ends that overflows at the smallest scale, and what it leaves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from torch import nn

from m3i_scale.engine import engine as under_test
from m3i_scale.engine.engine import loss_scale, spread_nonfinite, take_step, undone_if_skipped
from m3i_scale.engine.engine_state import restore_counters
from m3i_scale.errors import UserError


def engine(monkeypatch: pytest.MonkeyPatch, *, fp16: bool = True, applied: bool = False) -> SimpleNamespace:
    """DeepSpeed's own scaler at its minimum, meeting one overflow more."""
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda *_: 0)
    scaler = DynamicLossScaler(2.0, 1000, 2.0, 1, False)
    return SimpleNamespace(
        optimizer=SimpleNamespace(cur_scale=scaler.cur_scale),
        fp16_enabled=lambda: fp16,
        was_step_applied=lambda: applied,
        step=lambda: scaler.update_scale(True),
        zero_optimization_stage=lambda: 2,
    )


def test_an_overflow_at_the_smallest_scale_is_explained(monkeypatch) -> None:
    with pytest.raises(UserError) as caught:
        take_step(engine(monkeypatch))
    assert caught.value.where == "fp16.min_loss_scale"
    assert "optim.lr" in str(caught.value.fix)


def test_other_errors_of_a_step_pass(monkeypatch) -> None:
    broken = engine(monkeypatch)
    broken.step = lambda: (_ for _ in ()).throw(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        take_step(broken)


@pytest.mark.parametrize(("fp16", "applied", "kept"), [(True, False, 1.0), (True, True, 2.0), (False, False, 1.0)])
def test_buffers_go_back_where_the_engine_skips(monkeypatch, fp16: bool, applied: bool, kept: float) -> None:
    module = nn.Module()
    module.register_buffer("factor", torch.ones(1))
    with undone_if_skipped(engine(monkeypatch, fp16=fp16, applied=applied), module):
        module.factor.fill_(2.0)
    assert module.factor.tolist() == [kept]


def test_the_scale_is_told_for_fp16_alone(monkeypatch) -> None:
    assert loss_scale(engine(monkeypatch)) == 2.0
    assert loss_scale(engine(monkeypatch, fp16=False)) is None
    assert under_test._AT_MINIMUM in "Current loss scale already at minimum - cannot decrease"


def resumed(own: object, **saved: float) -> object:
    """The scaler of an engine that goes on from saved counters."""
    there = SimpleNamespace(
        fp16_enabled=lambda: True,
        gradient_accumulation_steps=lambda: 1,
        optimizer=SimpleNamespace(loss_scaler=own),
    )
    counts = dict.fromkeys(("global_steps", "global_samples", "skipped_steps"), 0)
    restore_counters(there, {**counts, "loss_scaler": saved})
    return there.optimizer.loss_scaler


def test_a_checkpoint_brings_the_scale_and_the_run_file_its_settings() -> None:
    own = DynamicLossScaler(2.0**8, 50, 4.0, 2, True)
    scaler = resumed(own, cur_scale=512.0, cur_iter=30, last_overflow_iter=21, cur_hysteresis=4)
    assert (scaler.scale_window, scaler.min_scale, scaler.delayed_shift, scaler.consecutive_hysteresis) == (
        *(50, 4.0, 2, True),
    )
    assert (scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter, scaler.cur_hysteresis) == (512.0, 30, 21, 2)


def test_a_resume_begins_a_step_whatever_number_of_micro_batches_it_has() -> None:
    """The engine knows the last micro-batch of a step by their count since the run began."""
    engine = SimpleNamespace(fp16_enabled=lambda: False, gradient_accumulation_steps=lambda: 2)
    restore_counters(engine, {"global_steps": 3, "global_samples": 24, "skipped_steps": 0, "micro_steps": 3})
    assert engine.micro_steps % 2 == 0


def test_a_saved_scale_below_the_smallest_of_the_run_file_is_raised_to_it() -> None:
    assert resumed(DynamicLossScaler(2.0**8, 1000, 16.0, 1, False), cur_scale=1.0).cur_scale == 16.0


def test_a_fixed_scale_is_a_setting() -> None:
    assert resumed(LossScaler(64.0), cur_scale=512.0).cur_scale == 64.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_finite_loss_passes_to_the_bit_and_another_one_poisons_its_whole_gradient(dtype: torch.dtype) -> None:
    weights = torch.randn(5, dtype=dtype, requires_grad=True)
    for extra in (0.0, float("nan"), float("inf")):
        loss = (weights * torch.arange(5, dtype=dtype)).sum() + extra  # whose own gradient is finite, with a 0 in it
        plain, spread = (
            torch.autograd.grad(of, weights, retain_graph=True)[0] for of in (loss, spread_nonfinite(loss))
        )
        assert plain.isfinite().all()
        assert torch.equal(plain, spread) if extra == 0.0 else spread.isnan().all()
        assert spread_nonfinite(loss).dtype == dtype


def test_nobody_waits_for_the_value_of_a_loss() -> None:
    loss = torch.zeros((), device="meta", requires_grad=True)  # has none
    spread_nonfinite(loss).backward()
    assert loss.grad is not None
