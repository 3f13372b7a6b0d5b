"""Gradients are added up, reduced and clipped as DeepSpeed does it, bit by bit, and the host reads nothing back but the
norm."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from clipping_engine import BOUNDS, MICRO_BATCHES, NOT_FINITE, SENT, STEPS
from deepspeed.runtime import utils
from launch import TESTS, start_ranks
from torch import Tensor

from m3i_scale.engine.gradients import clip_by_norm, mark_invalid_norm, norm_of_all

pytestmark = pytest.mark.slow

NORMS = (0.0, 1e-30, 0.3, 1.0, 1.0 + 1e-6, 7.3, 1e30, math.inf, math.nan, -1.0)


def gradients(dtype: torch.dtype) -> list[Tensor]:
    """Of several sizes, and with values that a product with 1 could change: signed zeros, subnormals, infinities."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(size, generator=generator) for size in (1, 5, 300, 4_097)]
    special = torch.tensor([0.0, -0.0, 1e-42, -1e-42, math.inf, -math.inf, 3e38])
    return [tensor.to(dtype) for tensor in (*drawn, special)]


def bits(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16) for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bound", [0.5, 1.0, 100.0])
def test_clipping_is_that_of_deepspeed(norm: float, bound: float, dtype: torch.dtype) -> None:
    expected, clipped = gradients(dtype), gradients(dtype)
    global_norm = torch.tensor(norm)
    assert utils.clip_tensors_by_global_norm(expected, max_norm=bound, global_norm=global_norm) is global_norm
    assert clip_by_norm(clipped, max_norm=bound, global_norm=global_norm) is global_norm
    for ours, theirs in zip(bits(clipped), bits(expected), strict=True):
        assert torch.equal(ours, theirs)


def test_clipping_takes_the_norm_itself_where_none_is_given() -> None:
    expected, clipped = gradients(torch.float32)[:4], gradients(torch.float32)[:4]
    norm = utils.clip_tensors_by_global_norm(expected)
    assert torch.equal(clip_by_norm(clipped), norm)
    for ours, theirs in zip(clipped, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("norm", [0.0, 7.3, math.inf, -math.inf, math.nan])
def test_an_invalid_norm_is_marked_as_deepspeed_marks_it(norm: float) -> None:
    expected, marked = torch.tensor(norm), torch.tensor(norm)
    utils.mask_nan_or_inf_with_val_inplace(expected, device="cpu")
    mark_invalid_norm(marked, device="cpu")
    assert torch.equal(marked, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [0.0, math.inf, math.nan])
def test_the_norm_is_that_of_deepspeed(dtype: torch.dtype, last: float) -> None:
    tensors = [*gradients(dtype)[:4], torch.tensor([last], dtype=dtype)]
    assert torch.equal(norm_of_all(tensors), utils.get_global_norm_of_tensors(tensors))


def test_nothing_is_read_back() -> None:
    """A tensor of the meta device has no value to be read."""
    tensors, norm = [torch.empty(3, device="meta")], torch.empty((), device="meta")
    norm_of_all(tensors)
    mark_invalid_norm(norm)
    assert clip_by_norm(tensors, global_norm=norm) is norm


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Any]:
    """What came of the steps of one rank and of two, by (ranks, rank)."""
    folder = tmp_path_factory.mktemp("clipping")
    for ranks in (1, 2):
        job = start_ranks([str(TESTS / "scale" / "clipping_engine.py"), str(folder)], ranks, folder / f"logs-{ranks}")
        assert job.wait() == [0] * ranks, job.text()[-4000:]
    return {
        (ranks, rank): json.loads((folder / f"{ranks}-{rank}.json").read_text())
        for ranks in (1, 2)
        for rank in range(ranks)
    }


RANKS = [(1, 0), (2, 0), (2, 1)]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("sent", SENT)
@pytest.mark.parametrize("bound", BOUNDS)
def test_an_engine_takes_the_steps_of_deepspeed_with_one_wait(
    told: Any, rank: tuple[int, int], bound: float, sent: str
) -> None:
    theirs, ours = (told[rank][f"{bound} {sent}"][side] for side in ("deepspeed", "ours"))
    several = rank[0] > 1
    if several:  # without gradients, `rare` adds zeros to the norm from the step after NOT_FINITE on
        assert ours["gradients"][:NOT_FINITE] == theirs["gradients"][:NOT_FINITE]
        for found, wanted in zip(ours["gradients"], theirs["gradients"], strict=True):
            for name, values in found.items():
                assert torch.tensor(values) == pytest.approx(torch.tensor(wanted[name]), rel=1e-4, abs=1e-7), name
        assert ours["norms"][: NOT_FINITE + 1] == theirs["norms"][: NOT_FINITE + 1]
        assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-5)
        for what in ("weight", "exp_avg", "exp_avg_sq"):
            for name, values in ours[what].items():
                assert torch.tensor(values) == pytest.approx(torch.tensor(theirs[what][name]), rel=1e-5, abs=1e-7)
    for what in ("frozen_moved",) if several else ("gradients", "norms", "weight", "exp_avg", "exp_avg_sq"):
        assert ours[what] == theirs[what], what
    assert not ours["frozen_moved"]
    assert ours["applied"] == theirs["applied"] == [number != NOT_FINITE for number in range(STEPS)]
    assert ours["reads"] == [1] * STEPS
    if bound:
        assert theirs["reads"][0] == 2  # else there is nothing left to replace


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("sent", SENT)
def test_gradients_are_freed_with_every_backward_pass(told: Any, rank: tuple[int, int], sent: str) -> None:
    assert told[rank][f"{BOUNDS[0]} {sent}"]["ours"]["freed"] == [True] * STEPS * MICRO_BATCHES


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("sent", SENT)
def test_a_parameter_without_a_gradient_in_a_step_keeps_none_of_the_last_step(
    told: Any, rank: tuple[int, int], sent: str
) -> None:
    steps = [gradients["rare.bias"] for gradients in told[rank][f"{BOUNDS[1]} {sent}"]["ours"]["gradients"]]
    assert [any(gradient) for gradient in steps] == [True, True, False, True, True]


@pytest.mark.parametrize("sent", SENT)
@pytest.mark.parametrize("bound", BOUNDS)
def test_two_ranks_clip_by_the_norm_of_one(told: Any, bound: float, sent: str) -> None:
    one, *two = (told[rank][f"{bound} {sent}"]["ours"]["norms"] for rank in RANKS)
    assert two[0] == two[1]
    # bf16 gradients of half the batch are rounded; in the last step the ranks use different parts
    assert two[0][: STEPS - 1] == pytest.approx(one[: STEPS - 1], rel=1e-2)
    assert max(norm for norm in one if math.isfinite(norm)) < BOUNDS[1]
    assert min(one) > BOUNDS[0]


@pytest.mark.parametrize("sent", SENT)
def test_ranks_that_use_different_parameters_clip_by_the_same_norm(told: Any, sent: str) -> None:
    both = [told[2, rank][f"{sent} rank 0 only"]["ours"] for rank in (0, 1)]
    assert both[0]["norms"] == both[1]["norms"]
    assert both[0]["applied"] == both[1]["applied"] == [number != NOT_FINITE for number in range(STEPS)]
    assert both[0]["gradients"] == both[1]["gradients"]
    assert any(both[1]["gradients"][0]["rare.bias"])


def test_reductions_begin_before_the_first_layer_has_its_gradient_in_the_same_order_on_all_ranks(told: Any) -> None:
    one, *two = (told[rank][f"{BOUNDS[0]} fp32"]["ours"]["reduced"] for rank in RANKS)
    sizes = [[each for each in passed if each != "first layer"] for passed in two[0]]
    assert sizes == [[each for each in passed if each != "first layer"] for passed in two[1]]
    assert [bool(reduced) for reduced in sizes] == [False, False, True] * STEPS
    assert len({tuple(reduced) for reduced in sizes if reduced}) == 1
    last = MICRO_BATCHES * 5 - 1  # it uses all parts
    assert two[0][last][0] != "first layer"
    assert all(passed == ["first layer"] for passed in one)
    copied = told[2, 0][f"{BOUNDS[0]} bf16"]["ours"]["reduced"]
    assert copied[last][0] == "first layer"
