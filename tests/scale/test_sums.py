"""The sum that knows positions: alike however a tensor is cut, and another one for every other order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m3i_scale.scale.checkpoint.sums import ROW, Sums, sums_of, weights


def test_the_weights_are_those_of_every_machine() -> None:
    """Checkpoints hold sums of them: other ones would be a mismatch at every resume."""
    first = [(2 * 0xE220A8397B1DCDAF / 2**64 - 1) * 3**0.5, (2 * 0x6E789E6AA1B965F4 / 2**64 - 1) * 3**0.5]
    assert weights(0, 2).tolist() == pytest.approx(first, rel=1e-12)  # SplitMix64's numbers after seed 0
    many = weights(1 << 40, 1 << 16)
    assert abs(many.mean()) < 0.02
    assert abs(many.var() - 1) < 0.02
    assert np.unique(many).size == many.size


@settings(max_examples=40, deadline=None)
@given(
    numel=st.integers(0, 70 * ROW),
    cuts=st.lists(st.integers(0, 70 * ROW), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_pieces_add_up_to_the_whole(numel: int, cuts: list[int], dtype: torch.dtype, seed: int) -> None:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)
    edges = [0, *sorted(min(cut, numel) for cut in cuts), numel]
    found = sum((sums_of(values[a:b], a) for a, b in itertools.pairwise(edges)), Sums())
    exact, number = values.double(), np.arange(numel)
    weight = torch.from_numpy(weights(0, ROW)[number % ROW] * weights(1 << 40, numel // ROW + 1)[number // ROW])
    norm = float(exact.norm())
    assert found.squares == pytest.approx(norm**2, rel=1e-12)
    assert found.weighted == pytest.approx(float(exact @ weight), abs=1e-11 * norm + 1e-300)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_two_values_that_change_places_are_noticed(data: st.DataObject) -> None:
    numel = data.draw(st.integers(2, 40 * ROW))
    one, other = data.draw(st.lists(st.integers(0, numel - 1), min_size=2, max_size=2, unique=True))
    values = torch.randn(numel, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    values[one], values[other] = 1.0, -1.0
    turned = values.clone()
    turned[one], turned[other] = -1.0, 1.0
    before, now = sums_of(values, 0), sums_of(turned, 0)
    assert now.squares == pytest.approx(before.squares, rel=1e-12)
    assert abs(now.weighted - before.weighted) > 1e-6 * before.squares**0.5


@pytest.mark.parametrize(
    "change",
    [
        lambda matrix: matrix.flip(0),
        lambda matrix: matrix.flip(1),
        lambda matrix: matrix.roll(ROW // 64, 0),  # whole rows of the sum
        lambda matrix: matrix.T.contiguous(),
        lambda matrix: matrix[torch.randperm(len(matrix), generator=torch.Generator().manual_seed(1))],
    ],
)
def test_another_order_of_a_matrix_is_noticed(change) -> None:
    matrix = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    before, now = (sums_of(values.flatten(), 0) for values in (matrix, change(matrix)))
    assert now.squares == pytest.approx(before.squares, rel=1e-12)
    assert abs(now.weighted - before.weighted) > 0.01 * before.squares**0.5
