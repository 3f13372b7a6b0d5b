"""Position embeddings: target patches relative to the input view (as in SIM), fixed grid (MAE), and text tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m3i_scale.data.batch import Batch


def frequencies(count: int, device: torch.device) -> Tensor:
    """Return ω_k = 10000^(−k/count), k = 0 … count−1, fp32."""
    return torch.exp(torch.arange(count, device=device, dtype=torch.float32) * (-math.log(10000.0) / count))


def _waves(x: Tensor, omega_F: Tensor) -> list[Tensor]:
    angle = x[..., None] * omega_F
    return [angle.sin(), angle.cos()]


def patch_coordinates(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return row and column of every patch: int64 (N) each."""
    rows, columns = grid
    row_N = torch.arange(rows, device=device).repeat_interleave(columns)
    return row_N, torch.arange(columns, device=device).repeat(rows)


def relative_position(batch: Batch, view: int, target: int, grid: tuple[int, int], width: int) -> Tensor:
    """Return sine-cosine features of every patch of view `target` relative to the input `view`, both from 0: fp32
    (B, N, 2·width).

    With crops (top, left, height, width) taken after the flip, and target patch (r, c), in units of the input grid:

        u = δ_h (r+½) + g Δ_i − ½
        v = δ_w (c+½) + g Δ_j − ½                      same flip
        v = −δ_w (c+½) + g (W − j₁ − j₂)/w₁ − ½        opposite flip

    where δ = target size / input size and Δ = offset / input size. Features: u, v, 10·ln δ_h, 10·ln δ_w, each at
    width/4 frequencies.
    """
    rows, columns = grid
    top1, left1, height1, width1 = batch.crops_VB4[view].float().unbind(dim=1)
    top2, left2, height2, width2 = batch.crops_VB4[target].float().unbind(dim=1)
    delta_h, delta_w = height2 / height1, width2 / width1
    row_R = torch.arange(rows, device=top1.device, dtype=torch.float32) + 0.5
    column_C = torch.arange(columns, device=top1.device, dtype=torch.float32) + 0.5
    u_BR = delta_h[:, None] * row_R + rows * ((top2 - top1) / height1)[:, None] - 0.5
    same_BC = delta_w[:, None] * column_C + columns * ((left2 - left1) / width1)[:, None] - 0.5
    mirrored = columns * (batch.sizes_B2[:, 1].float() - left1 - left2) / width1
    opposite_BC = mirrored[:, None] - delta_w[:, None] * column_C - 0.5
    v_BC = torch.where((batch.flips_VB[view] == batch.flips_VB[target])[:, None], same_BC, opposite_BC)
    omega_F = frequencies(width // 4, top1.device)
    count = len(top1)
    blocks = [wave[:, :, None].expand(count, rows, columns, -1) for wave in _waves(u_BR, omega_F)]
    blocks += [wave[:, None].expand(count, rows, columns, -1) for wave in _waves(v_BC, omega_F)]
    for scale_B in (delta_h, delta_w):
        blocks += [wave[:, None, None].expand(count, rows, columns, -1) for wave in _waves(10 * scale_B.log(), omega_F)]
    return torch.cat(blocks, dim=-1).flatten(1, 2)


def grid_position(grid: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """Return MAE's fixed position embeddings, fp32 (N, width): [sin x, cos x, sin y, cos y] at width/4 frequencies. The
    column is x, the row is y."""
    omega_F = frequencies(width // 4, device)
    row_N, column_N = patch_coordinates(grid, device)
    return torch.cat(_waves(column_N, omega_F) + _waves(row_N, omega_F), dim=-1)


def token_position(count: int, width: int, device: torch.device) -> Tensor:
    """Return fixed position embeddings of text tokens: fp32 (T, width), [sin t, cos t] at width/2 frequencies."""
    place_T = torch.arange(count, device=device, dtype=torch.float32)
    return torch.cat(_waves(place_T, frequencies(width // 2, device)), dim=-1)
