"""The operator of InternImage against two others that compute the same, forward and backward, in turn.

`torchvision` is `deform_conv2d` with all-ones depthwise weights; `grid_sample` samples all points, then sums
them. Sizes are the four stages of InternImage-H at 224 pixels. Values are compared before anything is timed.

    python benchmarks/dcnv3.py --json
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import typer
from _common import emit, in_turn, machine
from torch import Tensor
from torchvision.ops import deform_conv2d

from m3i_scale.backbones.internimage.modeling_internimage import dcnv3

STAGES = {"stage1": (56, 320, 10), "stage2": (28, 640, 20), "stage3": (14, 1280, 40), "stage4": (7, 2560, 80)}
POINTS = 9
Operator = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def ours(value: Tensor, offset: Tensor, weight: Tensor, groups: int) -> Tensor:
    """The package's."""
    return dcnv3(value, offset, weight, groups, 1.0)


def torchvision(value: Tensor, offset: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Offsets in rows of (y, x), point by point; one depthwise kernel of ones."""
    batch, height, width, channels = value.shape
    order = [column * 3 + row for row in range(3) for column in range(3)]
    moved = offset.view(batch, height, width, groups, POINTS, 2)[..., order, :].flip(-1)
    moved = moved.permute(0, 3, 4, 5, 1, 2).reshape(batch, groups * 2 * POINTS, height, width)
    mask = weight.view(batch, height, width, groups, POINTS)[..., order].permute(0, 3, 4, 1, 2)
    mask = mask.reshape(batch, groups * POINTS, height, width)
    ones = torch.ones(channels, 1, 3, 3, device=value.device)
    return deform_conv2d(value.permute(0, 3, 1, 2), moved, ones, padding=1, mask=mask).permute(0, 2, 3, 1)


def grid_sample(value: Tensor, offset: Tensor, weight: Tensor, groups: int) -> Tensor:
    """All 9 sampled values of every place, then their weighted sum."""
    batch, height, width, channels = value.shape
    near = torch.arange(-1.0, 2.0, device=value.device)
    points = torch.stack([near.repeat_interleave(3), near.repeat(3)], dim=-1)
    x = torch.arange(width, device=value.device, dtype=torch.float32).repeat(height)
    y = torch.arange(height, device=value.device, dtype=torch.float32).repeat_interleave(width)
    places = torch.stack([x, y], dim=-1)[:, None, None]
    moved = places + points + offset.view(batch, height * width, groups, POINTS, 2)
    grid = (2 * moved + 1) / torch.tensor([width, height], device=value.device) - 1
    grid = grid.transpose(1, 2).reshape(batch * groups, height * width, POINTS, 2)
    rows = value.view(batch, height * width, groups, -1).permute(0, 2, 3, 1)
    sampled = F.grid_sample(rows.reshape(batch * groups, -1, height, width), grid, align_corners=False)
    mask = weight.view(batch, height * width, groups, POINTS).transpose(1, 2)
    summed = (sampled * mask.reshape(batch * groups, 1, height * width, POINTS)).sum(dim=-1)
    return summed.view(batch, channels, height * width).transpose(1, 2).reshape(batch, height, width, channels)


OPERATORS: dict[str, Operator] = {"ours": ours, "torchvision": torchvision, "grid_sample": grid_sample}


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    batch: int = 1,
    repeats: int = 7,
    threads: int = 0,
) -> None:
    """Print {stage: {operator: seconds, torchvision_ratio, grid_sample_ratio}}, ratios above 1 where ours is faster."""
    if threads:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    document: dict[str, object] = {}
    for name, (side, channels, groups) in STAGES.items():
        value = torch.randn(batch, side, side, channels, device=device, requires_grad=True)
        offset = (torch.randn(batch, side, side, groups * 2 * POINTS, device=device) * 0.7).requires_grad_()
        weight = torch.randn(batch, side, side, groups, POINTS, device=device).softmax(dim=-1)
        weight = weight.flatten(3).requires_grad_()
        inputs = (value, offset, weight)
        direction = torch.randn_like(value)
        wanted = ours(*inputs, groups)
        for operator in OPERATORS.values():
            torch.testing.assert_close(operator(*inputs, groups), wanted, atol=1e-4, rtol=1e-4)
        sides = {label: partial(_step, operator, inputs, groups, direction) for label, operator in OPERATORS.items()}
        seconds = in_turn(sides, repeats=repeats)
        ratios = {f"{peer}_ratio": seconds[peer] / seconds["ours"] for peer in ("torchvision", "grid_sample")}
        document[name] = {**seconds, **ratios}
    emit(document | {"batch": batch, "threads": torch.get_num_threads(), "machine": machine()})


def _step(operator: Operator, inputs: tuple[Tensor, Tensor, Tensor], groups: int, direction: Tensor) -> None:
    torch.autograd.grad(operator(*inputs, groups), inputs, direction)


if __name__ == "__main__":
    typer.run(main)
