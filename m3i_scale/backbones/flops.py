"""FLOP counting, with formulas that torch's counter lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Size
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker


def _bag(weight: Size, index: Size, *_: Any, **__: Any) -> int:
    """Count a weighted bag: a product and a sum per value of the fetched rows."""
    return 2 * index.numel() * weight[1]


def _bag_backward(gradient: Size, index: Size, *_: Any, **__: Any) -> int:
    return 2 * index.numel() * gradient[-1]


def _bag_weights_backward(gradient: Size, _weight: Size, index: Size, *_: Any, **__: Any) -> int:
    return _bag_backward(gradient, index)


def _attention(query: Size, key: Size, value: Size, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: Size, query: Size, key: Size, value: Size, *_: Any, **__: Any) -> int:
    """Count four products, without the scores that the kernel recomputes to save memory."""
    again = query.numel() * key[-2] * 2  # torch counts the recomputed scores
    return int(sdpa_backward_flop_count(gradient, query, key, value)) - again


def _convolution_backward(
    gradient: Size,
    image: Size,
    weight: Size,
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    output_mask: Any,
    **_: Any,
) -> int:
    """Count each gradient as the forward pass, which has the same products. torch's formula ignores groups: for a
    depthwise convolution of 64 channels, it counts 64 times too much for the weight gradient."""
    places = image if transposed else gradient
    forward = 2 * places[0] * places[2:].numel() * weight.numel()
    return forward * sum(map(bool, output_mask[:2]))


FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._embedding_bag: _bag,
    torch.ops.aten._embedding_bag_backward: _bag_backward,
    torch.ops.aten._embedding_bag_per_sample_weights_backward: _bag_weights_backward,
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Formulas in addition to torch's. Tensor arguments are shapes."""


class _NoModules(ModuleTracker):
    """A no-op module tracker. torch's hooks create reference cycles with the graph, which would keep recomputed
    activations in memory until garbage collection."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def counter() -> FlopCounterMode:
    """Return torch's counter with `FORMULAS`, without module tracking. It counts products and sums of matrix products,
    convolutions and attention."""
    counted = FlopCounterMode(display=False, custom_mapping=dict(FORMULAS))
    counted.mod_tracker = _NoModules()
    return counted
