"""Relative positions against numbers worked by hand from the definition, and against geometry."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from m3i_scale.objective.positions import frequencies, grid_position, relative_position

WIDTH = 8


def features(
    input_crop: list[float], target_crop: list[float], flips: tuple[bool, bool], image_width: float, side: int
) -> np.ndarray:
    batch: Any = SimpleNamespace(
        crops_VB4=torch.tensor([[input_crop], [target_crop]]),
        flips_VB=torch.tensor(flips)[:, None],
        sizes_B2=torch.tensor([[0, image_width]]),
    )
    found = relative_position(batch, 0, 1, (side, side), WIDTH)
    assert found.shape == (1, side * side, 2 * WIDTH)
    return found[0].numpy()


def encode(u: float, v: float, delta_h: float, delta_w: float) -> np.ndarray:
    """[sin uω, cos uω, sin vω, cos vω, sin(10 ln δ_h)ω, cos(·), sin(10 ln δ_w)ω, cos(·)]; ω_k = 10000^(−k/(D/4))"""
    omega = np.array([10000.0 ** (-k / (WIDTH / 4)) for k in range(WIDTH // 4)])
    values = [u, v, 10 * np.log(delta_h), 10 * np.log(delta_w)]
    return np.concatenate([f(value * omega) for value in values for f in (np.sin, np.cos)])


def check(found: np.ndarray, table: list[tuple[float, float]], delta_h: float, delta_w: float) -> None:
    for patch, (u, v) in enumerate(table):
        np.testing.assert_allclose(found[patch], encode(u, v, delta_h, delta_w), atol=2e-5)


def test_a_view_relative_to_itself_is_its_own_grid() -> None:
    found = features([3, 5, 20, 30], [3, 5, 20, 30], (True, True), 50, 2)
    check(found, [(0, 0), (0, 1), (1, 0), (1, 1)], 1, 1)


def test_worked_by_hand_same_flip() -> None:
    # Input: top 10, left 20, 40 high, 80 wide. Target: top 30, left 10, 20 high, 40 wide. Grid 2.
    # δ_h = ½, δ_w = ½, Δ_i = 20/40 = ½, Δ_j = −10/80 = −⅛.
    # u = ½(r+½) + 2·½ − ½ = 0.75, 1.25;  v = ½(c+½) − ¼ − ½ = −0.5, 0.
    table = [(0.75, -0.5), (0.75, 0.0), (1.25, -0.5), (1.25, 0.0)]
    check(features([10, 20, 40, 80], [30, 10, 20, 40], (False, False), 100, 2), table, 0.5, 0.5)
    check(features([10, 20, 40, 80], [30, 10, 20, 40], (True, True), 100, 2), table, 0.5, 0.5)


def test_worked_by_hand_opposite_flip() -> None:
    # The same crops, image 100 wide: g (W − j₁ − j₂)/w₁ = 2 · 70/80 = 1.75.
    # v = −½(c+½) + 1.75 − ½ = 1.0, 0.5: the target's columns run against the input's.
    table = [(0.75, 1.0), (0.75, 0.5), (1.25, 1.0), (1.25, 0.5)]
    check(features([10, 20, 40, 80], [30, 10, 20, 40], (False, True), 100, 2), table, 0.5, 0.5)
    check(features([10, 20, 40, 80], [30, 10, 20, 40], (True, False), 100, 2), table, 0.5, 0.5)


def test_a_flipped_view_of_the_whole_image_mirrors_the_columns() -> None:
    found = features([0, 0, 60, 90], [0, 0, 60, 90], (False, True), 90, 3)
    check(found, [(r, 2 - c) for r in range(3) for c in range(3)], 1, 1)


BOX = st.tuples(st.floats(0, 30), st.floats(0, 30), st.floats(10, 60), st.floats(10, 60))


@given(BOX, BOX, st.booleans(), st.booleans(), st.floats(90, 120))
def test_positions_follow_the_pixels_of_the_image(
    first: tuple[float, ...], second: tuple[float, ...], flip1: bool, flip2: bool, width: float
) -> None:
    """Center of a target patch → pixel of the unflipped image → units of the input's grid."""
    side = 3
    found = features(list(first), list(second), (flip1, flip2), width, side)
    for row in range(side):
        for column in range(side):
            y = second[0] + (row + 0.5) / side * second[2]
            x = second[1] + (column + 0.5) / side * second[3]
            x = width - x if flip2 else x
            x = width - x if flip1 else x
            u = (y - first[0]) / first[2] * side - 0.5
            v = (x - first[1]) / first[3] * side - 0.5
            wanted = encode(u, v, second[2] / first[2], second[3] / first[3])
            np.testing.assert_allclose(found[row * side + column], wanted, atol=2e-4)


def test_the_fixed_grid_is_that_of_mae() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 40, "patch_size": 8}
    decoder = ViTMAEForPreTraining(ViTMAEConfig(**sizes, decoder_hidden_size=32, decoder_num_hidden_layers=1)).decoder
    decoder.initialize_weights(25)
    wanted = decoder.decoder_pos_embed[0, 1:]
    torch.testing.assert_close(grid_position((5, 5), 32, torch.device("cpu")), wanted, atol=1e-5, rtol=0)


def test_frequencies_fall_from_one_towards_a_ten_thousandth() -> None:
    wanted = torch.tensor([1.0, 0.1, 0.01, 0.001])
    torch.testing.assert_close(frequencies(4, torch.device("cpu")), wanted)
