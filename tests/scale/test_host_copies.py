"""Pinned memory of pools: every piece has its own place, and little lies idle."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ViTConfig, ViTModel

from m3i_scale.checkpoint.saver import HostCopies, make_places, plan_pools

DTYPES = [torch.float32, torch.bfloat16, torch.uint8]


def rounded(size: int) -> int:
    """What torch allocates for a pinned tensor."""
    return 1 << (size - 1).bit_length() if size else 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 1 << 20), max_size=30))
def test_every_piece_has_a_place_of_its_own_in_pools_of_powers_of_two(sizes: list[int]) -> None:
    pools, places = plan_pools(sizes)
    assert all(pool == rounded(pool) for pool in pools)
    for number, pool in enumerate(pools):
        inside = sorted((start, start + size) for (at, start), size in zip(places, sizes, strict=True) if at == number)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(inside))
        assert all(end <= pool for _, end in inside)
    assert sum(pools) <= 2 * sum(rounded(max(size, 64)) for size in sizes)


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_little_lies_idle(ranks: int) -> None:
    """A ViT-L: master weights, two moments and averages, a share of each tensor on every rank."""
    shape = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device("meta"):
        model = ViTModel(ViTConfig(**shape), add_pooling_layer=False)
    sizes = [4 * -(-parameter.numel() // ranks) for parameter in model.parameters()] * 4
    pools, _ = plan_pools(sizes)
    assert sum(sizes) <= sum(pools) <= 1.02 * sum(sizes)
    assert len(pools) < 40


def test_copies_are_true_and_kept() -> None:
    tensors = [torch.randn(5), torch.arange(7, dtype=torch.uint8), torch.randn(0), torch.randn(300).bfloat16()]
    asked: list[int] = []

    def pin(size: int) -> torch.Tensor:
        asked.append(size)
        return torch.empty(size, dtype=torch.uint8)

    wanted = [(tensor.numel(), tensor.dtype) for tensor in tensors]
    places = make_places(wanted, pin)
    assert all(size == rounded(size) for size in asked)
    for place, tensor in zip(places, tensors, strict=True):
        place.copy_(tensor)
    assert all(torch.equal(place, tensor) for place, tensor in zip(places, tensors, strict=True))
    kept = HostCopies()
    first = kept.copy(tensors)
    changed = [tensor + 1 for tensor in tensors]
    assert all(torch.equal(place, tensor) for place, tensor in zip(first, tensors, strict=True))
    second = kept.copy(changed)
    assert [place.data_ptr() for place in second] == [place.data_ptr() for place in first]
    assert all(torch.equal(place, tensor) for place, tensor in zip(second, changed, strict=True))
    assert [place.numel() for place in kept.copy(tensors[:2])] == [5, 7]
