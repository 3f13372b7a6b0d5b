"""Bicubic resizing by matrices gives the values and gradients of torch's kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import DINOV2, REGISTERS, tiny_run
from torch import Tensor

from m3i_scale.backbones.build import backbone_config, build_backbone
from m3i_scale.backbones.families.base import BicubicByMatrix, resize_bicubic


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(
    ("old", "new"), [((14, 14), (6, 6)), ((7, 7), (16, 16)), ((16, 16), (37, 5)), ((4, 9), (4, 3))]
)
def test_values_and_gradients_are_those_of_torch(old: tuple[int, int], new: tuple[int, int], antialias: bool) -> None:
    drawn = torch.Generator().manual_seed(0)
    table_1DHW = torch.randn(1, 8, *old, generator=drawn)
    gradient_1DOP = torch.randn(1, 8, *new, generator=drawn)

    def values_and_gradient(dtype: torch.dtype, *, by_matrix: bool) -> tuple[Tensor, Tensor]:
        leaf = table_1DHW.to(dtype).requires_grad_()
        options: dict[str, Any] = {"size": new, "mode": "bicubic", "antialias": antialias, "align_corners": False}
        if by_matrix:
            with BicubicByMatrix():
                resized = F.interpolate(leaf, **options)
        else:
            resized = F.interpolate(leaf, **options)
        resized.backward(gradient_1DOP.to(dtype))
        assert leaf.grad is not None
        return resized, leaf.grad

    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        expected, expected_gradient = values_and_gradient(dtype, by_matrix=False)
        values, gradient = values_and_gradient(dtype, by_matrix=True)
        assert values.dtype == dtype
        assert (values - expected).abs().max() <= tolerance * expected.abs().max()
        assert (gradient - expected_gradient).abs().max() <= tolerance * expected_gradient.abs().max()


def test_a_table_in_16_bits_is_rounded_once() -> None:
    table = torch.randn(1, 8, 14, 14, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = F.interpolate(table.double(), size=(6, 6), mode="bicubic", align_corners=False)
    resized = resize_bicubic(table, (6, 6), align_corners=False)
    assert resized.dtype == torch.bfloat16
    assert ((resized - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()  # half of the last digit of bf16


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_other_modes_are_left_to_torch(mode: str) -> None:
    maps = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    with BicubicByMatrix():
        resized = F.interpolate(maps, size=(3, 4), mode=mode)
    assert torch.equal(resized, F.interpolate(maps, size=(3, 4), mode=mode))


@pytest.mark.parametrize(
    "overrides",
    [(), ("backbone.preset=clip-b/16",), ("backbone.preset=siglip-b/16",), DINOV2, REGISTERS],
    ids=["vit", "clip", "siglip", "dinov2", "registers"],
)
def test_embeddings_of_another_size_are_those_of_the_stock_model(overrides: tuple[str, ...]) -> None:
    backbone = build_backbone(backbone_config(tiny_run("m3i", *overrides).backbone))
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(generator=drawn)
        images_BCHW = torch.randn(2, 3, 48, 48, generator=drawn)
        prefix_BPD, tokens_BND = backbone.embed(images_BCHW)
        stock = backbone.model.embeddings
        asks = {"interpolate_pos_encoding": True} if backbone.family.asks_to_interpolate else {}
        stock_BSD = stock(images_BCHW, **asks)
        if hasattr(backbone.model, "pre_layrnorm"):
            stock_BSD = backbone.model.pre_layrnorm(stock_BSD)
    torch.testing.assert_close(torch.cat([prefix_BPD, tokens_BND], dim=1), stock_BSD, rtol=1e-5, atol=1e-5)
