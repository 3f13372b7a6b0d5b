"""Halves of fp32 numbers: nothing is lost, and the upper half is the nearest bf16 number."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3i_scale.engine.device import join, split


def halves(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    upper, lower = torch.empty_like(values, dtype=torch.bfloat16), torch.empty_like(values, dtype=torch.int16)
    split(values, upper, lower)
    return upper, lower


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_joined_halves_are_the_number_to_the_last_bit(numbers: list[float]) -> None:
    values = torch.tensor(numbers, dtype=torch.float32)
    assert torch.equal(join(*halves(values)).view(torch.int32), values.view(torch.int32))


@given(st.floats(width=32, min_value=-(2.0**127), max_value=2.0**127))
def test_the_upper_half_is_the_nearest_bf16_number(number: float) -> None:
    value = torch.tensor([number])
    upper, _ = halves(value)
    error = abs(float(upper.double()) - number)
    assert error == abs(float(value.bfloat16().double()) - number)  # at a tie both neighbours are nearest


@pytest.mark.parametrize("bits", [0x3F808000, 0x3F818000, 0xBF808000, 0x00008000, 0x80008000])
def test_ties_are_told_apart(bits: int) -> None:
    value = torch.tensor([struct.unpack(">f", struct.pack(">I", bits))[0]])
    assert torch.equal(join(*halves(value)).view(torch.int32), value.view(torch.int32))


def test_not_a_number_stays_one() -> None:
    upper, lower = halves(torch.tensor([float("nan"), float("inf"), -float("inf")]))
    assert upper.isnan().tolist() == [True, False, False]
    assert join(upper, lower).isinf().tolist() == [False, True, True]


def test_any_shape_and_a_transposed_value() -> None:
    values = torch.randn(4, 6).T
    upper, lower = torch.empty(24, dtype=torch.bfloat16), torch.empty(24, dtype=torch.int16)
    split(values, upper, lower)
    assert torch.equal(join(upper, lower).view(6, 4), values)
