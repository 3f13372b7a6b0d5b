"""Projectors, batch norm over ranks, prototypes, and what is kept between batches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from m3i_scale.objective.heads import BatchNorm, HeadSpec, ImageHead, PrototypeLayer
from m3i_scale.objective.ranks import SingleProcess
from m3i_scale.objective.regularizers import Center
from m3i_scale.objective.state import Fp32State

RANKS = SingleProcess()


@pytest.mark.parametrize("shape", [(12, 6), (3, 4, 6)])
def test_batch_norm_is_that_of_torch(shape: tuple[int, ...]) -> None:
    ours, peer = BatchNorm(6, RANKS, affine=True), nn.BatchNorm1d(6, track_running_stats=False)
    ours.reset_parameters()
    with torch.no_grad():
        for side in (ours, peer):
            side.weight.copy_(torch.linspace(0.5, 2, 6))
            side.bias.copy_(torch.linspace(-1, 1, 6))
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 1).requires_grad_()
    results = []
    for layer in (ours, lambda value: peer(value.flatten(0, -2)).view_as(value)):
        output = layer(x)
        results.append((output, *torch.autograd.grad(output.sin().sum(), [x])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_head_is_its_layers_in_order() -> None:
    spec = HeadSpec(
        width=5, hidden=7, depth=3, norm="layer", output_norm="layer", predictor_depth=2, predictor_hidden=9
    )
    head = ImageHead(4, spec, RANKS, online=True, prototypes=False)
    kinds = [type(layer).__name__ for layer in head.projector]
    assert kinds == ["Linear", "LayerNorm", "GELU"] * 2 + ["Linear", "LayerNorm"]
    assert [layer.weight.shape for layer in head.projector if isinstance(layer, nn.Linear)] == [(7, 4), (7, 7), (5, 7)]
    assert not head.projector[-1].elementwise_affine
    assert [layer.weight.shape for layer in head.predictor if isinstance(layer, nn.Linear)] == [(9, 5), (5, 9)]
    x = torch.randn(3, 4)
    z = head(x, predict=False)
    torch.testing.assert_close(z, head.projector(x))
    torch.testing.assert_close(head(x, predict=True), head.predictor(z))
    averaged = ImageHead(4, spec, RANKS, online=False, prototypes=False)
    assert averaged.predictor is None


def test_prototypes_are_directions() -> None:
    prototypes = PrototypeLayer(4, 6)
    prototypes.reset_parameters()
    z = torch.randn(3, 4)
    cosines = prototypes(z)
    torch.testing.assert_close(cosines, torch.cosine_similarity(z[:, None], prototypes.weight[None], dim=-1))
    with torch.no_grad():
        prototypes.weight.mul_(7.0)
    torch.testing.assert_close(prototypes(3 * z), cosines)


def test_what_a_head_remembers_stays_in_fp32() -> None:
    state = Center(4, 6, 0.9)
    model = nn.Sequential(nn.Linear(4, 4), state)
    state.update(torch.full((2, 6), 1 / 3), RANKS)
    exact = state.center_K.clone()
    model.to(torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16
    assert torch.equal(model[1].center_K, exact)
    floating = [buffer for buffer in state.buffers() if buffer.is_floating_point()]
    assert {buffer.dtype for buffer in floating} == {torch.float32}
    assert len(floating) == 3


def test_a_buffer_that_arrives_rounded_is_kept_in_fp32() -> None:
    class Kept(Fp32State):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("x", torch.ones(2, dtype=torch.bfloat16))  # as inside zero.Init

    assert Kept().x.dtype == torch.float32
