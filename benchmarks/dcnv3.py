"""The two formulations of InternImage's operator and torchvision's, forward and backward, in turn.

`embedding_bag` is what the package takes on CPUs, `grid_sample` what it takes on GPUs; `torchvision` is `deform_conv2d`
with all-ones depthwise weights. Sizes are the four stages of InternImage-H at 224 pixels. Values are compared before
anything is timed.

    python benchmarks/dcnv3.py --json
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
import typer
from _common import emit, in_turn, machine
from torch import Tensor
from torchvision.ops import deform_conv2d

from m3i_scale.backbones.internimage import modeling_internimage

STAGES = {"stage1": (56, 320, 10), "stage2": (28, 640, 20), "stage3": (14, 1280, 40), "stage4": (7, 2560, 80)}
POINTS = 9
Operator = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def formulated(formulation: Callable[..., Tensor]) -> Operator:
    """The package's operator with one of its formulations."""

    def operator(value: Tensor, offset: Tensor, weight: Tensor, groups: int) -> Tensor:
        chosen = dict.fromkeys(("cpu", "cuda"), formulation)
        with mock.patch.dict(modeling_internimage.FORMULATIONS, chosen):
            return modeling_internimage.dcnv3(value, offset, weight, groups, 1.0)

    return operator


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


OPERATORS: dict[str, Operator] = {
    "embedding_bag": formulated(modeling_internimage.sum_by_bag),
    "grid_sample": formulated(modeling_internimage.sum_by_grid),
    "torchvision": torchvision,
}


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    batch: int = 1,
    repeats: int = 7,
    threads: int = 0,
) -> None:
    """Print {stage: {operator: seconds, torchvision_ratio, other_ratio}, taken: operator}; ratios are above 1 where the
    one that the package takes on this device is faster than torchvision's, and than its other formulation."""
    if threads:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    taken, other = ("grid_sample", "embedding_bag") if device == "cuda" else ("embedding_bag", "grid_sample")
    document: dict[str, object] = {}
    for name, (side, channels, groups) in STAGES.items():
        value = torch.randn(batch, side, side, channels, device=device, requires_grad=True)
        offset = (torch.randn(batch, side, side, groups * 2 * POINTS, device=device) * 0.7).requires_grad_()
        weight = torch.randn(batch, side, side, groups, POINTS, device=device).softmax(dim=-1)
        weight = weight.flatten(3).requires_grad_()
        inputs = (value, offset, weight)
        direction = torch.randn_like(value)
        wanted = OPERATORS[taken](*inputs, groups)
        for operator in OPERATORS.values():
            torch.testing.assert_close(operator(*inputs, groups), wanted, atol=1e-4, rtol=1e-4)
        sides = {label: partial(_step, operator, inputs, groups, direction) for label, operator in OPERATORS.items()}
        seconds = in_turn(sides, repeats=repeats)
        ratios = {"torchvision_ratio": seconds["torchvision"], "other_ratio": seconds[other]}
        document[name] = seconds | {ratio: value / seconds[taken] for ratio, value in ratios.items()}
    emit(document | {"taken": taken, "batch": batch, "threads": torch.get_num_threads(), "machine": machine()})


def _step(operator: Operator, inputs: tuple[Tensor, Tensor, Tensor], groups: int, direction: Tensor) -> None:
    torch.autograd.grad(operator(*inputs, groups), inputs, direction)


if __name__ == "__main__":
    typer.run(main)
