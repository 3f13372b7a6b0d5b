"""Losses on plain tensors against the packages that publish them: values to 1e-5, gradients to 1e-4."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import (
    BarlowTwinsLoss,
    DINOLoss,
    MSNLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    VICRegLoss,
)
from lightly.loss.swav_loss import sinkhorn as swav_sinkhorn
from lightly.models.modules.memory_bank import MemoryBankModule
from lightly.models.utils import select_most_similar
from open_clip.loss import ClipLoss, SigLipLoss
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor

from m3i_scale.backbones.base import gather_tokens
from m3i_scale.objective.distributions import Boltzmann, Gaussian, assigned, unit
from m3i_scale.objective.ranks import SingleProcess
from m3i_scale.objective.regularizers import Correlation, Memory, Queue
from m3i_scale.objective.regularizers.pooled import CrossCorrelation, UniGrad, VarianceCovariance
from m3i_scale.objective.regularizers.prototypes import Centering, MeanEntropy, sinkhorn
from m3i_scale.objective.targets.category import BoltzmannClasses
from m3i_scale.objective.targets.dense import most_similar
from m3i_scale.objective.targets.text import BernoulliPairs, BoltzmannPairs, gather_targets

RANKS = SingleProcess()
NOTHING = Memory(1)
P = Boltzmann(temperature=0.2)
Loss = Callable[..., Tensor]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(ours: Loss, theirs: Loss, *inputs: Tensor) -> None:
    """Value, and gradient towards every input."""
    results = []
    for loss in (ours, theirs):
        leaves = [value.clone().requires_grad_() for value in inputs]
        value = loss(*leaves)
        results.append((value.detach(), torch.autograd.grad(value, leaves, allow_unused=True)))
    (value, gradients), (wanted, wanted_gradients) = results
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    for gradient, other in zip(gradients, wanted_gradients, strict=True):
        assert (gradient is None) == (other is None)
        if gradient is not None:
            assert float(other.abs().max()) > 0
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent(temperature: float) -> None:
    def ours(a: Tensor, b: Tensor) -> Tensor:
        pairs = [
            Boltzmann(temperature=temperature).among_samples(x, y, RANKS, both=True)[0] for x, y in ((a, b), (b, a))
        ]
        return (pairs[0] + pairs[1]) / 2

    same(ours, NTXentLoss(temperature=temperature), noise(12, 8), noise(12, 8, seed=1))


def test_a_queue_of_negatives() -> None:
    peer = NTXentLoss(temperature=0.2, memory_bank_size=(24, 8))
    bank, key = peer.memory_bank.bank.clone(), noise(6, 8, seed=1)
    same(
        lambda query: P.among_queue(query, key, bank, torch.tensor(24))[0],
        lambda query: peer(query, key),
        noise(6, 8),
    )


def test_the_queue_holds_what_the_memory_bank_holds() -> None:
    """For batches that divide the queue; on others lightly drops what overflows, and ours does not."""
    peer = MemoryBankModule(size=(12, 4))
    state = Queue(4, 12)
    for step in range(5):
        keys = unit(noise(4, 4, seed=step))
        peer(keys, update=True)
        state.update(keys, RANKS)
        filled = int(state.filled)
        assert filled == min(4 * (step + 1), 12)
        torch.testing.assert_close(state.queue_QE[:filled], peer.bank[:filled])
    state.update(unit(noise(5, 4, seed=9)), RANKS)  # rows 8 … 11 and row 0
    torch.testing.assert_close(state.queue_QE[[8, 9, 10, 11, 0]], unit(noise(5, 4, seed=9)))
    state.update(unit(noise(30, 4, seed=10)), RANKS)  # more than it holds: the newest stay
    assert {tuple(row) for row in state.queue_QE.tolist()} == {
        tuple(row) for row in unit(noise(30, 4, seed=10))[-12:].tolist()
    }


def test_an_empty_queue_costs_nothing_and_rows_that_are_not_filled_are_no_negatives() -> None:
    query, key, queue = noise(3, 4), noise(3, 4, seed=1), unit(noise(8, 4, seed=2))
    loss, nats = P.among_queue(query, key, queue, torch.tensor(0))
    assert float(loss) == float(nats) == 0.0
    part = P.among_queue(query, key, queue, torch.tensor(5))
    whole = P.among_queue(query, key, queue[:5], torch.tensor(5))
    torch.testing.assert_close(part, whole)


def test_negative_cosine_of_byol_and_simsiam() -> None:
    target = noise(7, 5, seed=1)
    peer = NegativeCosineSimilarity()
    same(lambda x: Gaussian().vectors(x, target, RANKS), lambda x: 2 + 2 * peer(x, target), noise(7, 5))


SAMPLES_AND_CHANNELS = pytest.mark.parametrize(("samples", "channels"), [(16, 6), (6, 6), (8, 40)])


@SAMPLES_AND_CHANNELS
def test_barlow_twins(samples: int, channels: int) -> None:
    same(
        lambda a, b: CrossCorrelation(offdiagonal_weight=5e-3).loss(Gaussian(), a, b, NOTHING, RANKS).value,
        BarlowTwinsLoss(lambda_param=5e-3),
        noise(samples, channels),
        noise(samples, channels, seed=1) + noise(samples, channels),
    )


@SAMPLES_AND_CHANNELS
def test_vicreg(samples: int, channels: int) -> None:
    vicreg, p = VarianceCovariance(variance_weight=25.0, covariance_weight=1.0), Gaussian(sigma2=0.02)
    same(
        lambda a, b: vicreg.loss(p, a, b, NOTHING, RANKS).value,
        VICRegLoss(),
        0.5 * noise(samples, channels),
        2 * noise(samples, channels, seed=1),
    )


def test_dino_with_its_center_over_steps() -> None:
    peer = DINOLoss(output_dim=10, teacher_temp=0.04, student_temp=0.1, center_momentum=0.9)
    dino, p = Centering(target_temperature=0.04, momentum=0.9), Boltzmann(temperature=0.1)
    state = dino.memory(256, 10)
    for step in range(3):
        teacher = [noise(6, 10, seed=10 * step + view) for view in range(2)]

        def ours(a: Tensor, b: Tensor, teacher: list[Tensor] = teacher) -> Tensor:
            parts = [
                dino.loss(p, student / 0.1, assigned(dino.assign(p, target, state, RANKS, None), RANKS), RANKS).value
                for student, target in ((a, teacher[1]), (b, teacher[0]))
            ]
            return (parts[0] + parts[1]) / 2

        same(
            ours,
            lambda a, b, teacher=teacher: peer(teacher, [a, b]),
            noise(6, 10, seed=100 + step),
            noise(6, 10, seed=200 + step),
        )
        state.update(torch.cat(teacher), RANKS)
        torch.testing.assert_close(state.center_K, peer.center.flatten())
        assert step == 0 or bool(state.center_K.any())


def test_msn() -> None:
    peer = MSNLoss(temperature=0.1, sinkhorn_iterations=0, regularization_weight=0.7)
    targets = noise(8, 6, seed=1)

    def ours(anchors: Tensor, prototypes: Tensor) -> Tensor:
        logits = unit(anchors) @ unit(prototypes).T / 0.1
        p, msn = Boltzmann(temperature=0.1), MeanEntropy(target_temperature=0.25, weight=0.7)
        target = msn.assign(p, unit(targets) @ unit(prototypes.detach()).T, NOTHING, RANKS, None)
        return msn.loss(p, logits, assigned(target, RANKS), RANKS).value

    same(ours, lambda a, p: peer(a, targets, p, 0.25), noise(8, 6), noise(5, 6, seed=2))


def test_sinkhorn_of_several_positions_is_lightlys_of_each() -> None:
    logits = noise(3, 8, 5) / 0.05
    found = sinkhorn(logits.exp(), 3, RANKS)
    for position in range(3):
        torch.testing.assert_close(found[position], swav_sinkhorn(logits[position], 3, 1.0), rtol=1e-5, atol=1e-6)


def test_densecl_matches_patches_by_their_features() -> None:
    features, other = noise(3, 9, 7), noise(3, 9, 7, seed=1)
    keys = noise(3, 9, 5, seed=2)
    matched = gather_tokens(keys, most_similar(features, other))
    assert torch.equal(matched, select_most_similar(features, other, keys))
    peer = NTXentLoss(temperature=0.2, memory_bank_size=(16, 5))
    bank = peer.memory_bank.bank.clone()
    same(
        lambda query: P.among_queue(query.flatten(0, 1), matched.flatten(0, 1), bank, torch.tensor(16))[0],
        lambda query: peer(query.flatten(0, 1), matched.flatten(0, 1)),
        noise(3, 9, 5, seed=3),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_label_smoothing_of_timm(smoothing: float) -> None:
    labels, valid = torch.tensor([0, 3, 2, 2, 1]), torch.ones(5, dtype=torch.bool)
    peer = LabelSmoothingCrossEntropy(smoothing)
    same(
        lambda logits: BoltzmannClasses(label_smoothing=smoothing).loss(logits, labels, valid, RANKS)[0],
        lambda logits: peer(logits, labels),
        noise(5, 4),
    )


def test_soft_targets_of_timm() -> None:
    target = (noise(5, 4, seed=1) * 3).softmax(dim=-1)
    peer = SoftTargetCrossEntropy()
    same(lambda x: P.over_prototypes(x, assigned(target, RANKS))[0], lambda x: peer(x, target), noise(5, 4))


def pairs_of(text: Tensor, items: Tensor | None = None, valid: Tensor | None = None):
    count = len(text)
    items = torch.arange(1, count + 1) if items is None else items
    return gather_targets(text, items, torch.ones(count, dtype=torch.bool) if valid is None else valid, RANKS)


def test_clip() -> None:
    peer, scale = ClipLoss(), torch.tensor([12.0])
    same(
        lambda image, text, s: BoltzmannPairs().loss(unit(image), pairs_of(unit(text)), s, None, RANKS)[0],
        lambda image, text, s: peer(unit(image), unit(text), s),
        noise(6, 5),
        noise(6, 5, seed=1),
        scale,
    )


def test_siglip() -> None:
    peer = SigLipLoss()
    same(
        lambda image, text, s, b: BernoulliPairs().loss(unit(image), pairs_of(unit(text)), s, b, RANKS)[0],
        lambda image, text, s, b: peer(unit(image), unit(text), s, b),
        noise(6, 5),
        noise(6, 5, seed=1),
        torch.tensor([10.0]),
        torch.tensor([-3.0]),
    )


def test_siglip_leaves_out_equal_captions_and_missing_ones() -> None:
    image, text = unit(noise(5, 4)), unit(noise(5, 4, seed=1))
    scale, bias = torch.tensor([10.0]), torch.tensor([-3.0])
    items, valid = torch.tensor([1, 2, 1, 3, 0]), torch.tensor([True, True, True, True, False])
    loss, nats = BernoulliPairs().loss(image, pairs_of(text, items, valid), scale, bias, RANKS)
    logits = (scale * image @ text.T + bias)[:4, :4]
    sign = 2 * torch.eye(4) - 1
    terms = -F.logsigmoid(sign * logits)
    terms[0, 2] = terms[2, 0] = 0.0
    torch.testing.assert_close(loss, terms.sum() / 4)
    kept = logits.clone()
    kept[0, 2] = kept[2, 0] = -torch.inf
    candidates = torch.tensor([3.0, 4.0, 3.0, 4.0])
    wanted = (candidates.log() - F.cross_entropy(kept, torch.arange(4), reduction="none")).mean()
    torch.testing.assert_close(nats, wanted)


def test_unigrad_is_its_gradient() -> None:
    """∂L/∂u₁ = 2 (−u₂ + λ F u₁) along the sphere, with F the mean of u₂ u₂ᵀ."""
    u1, u2 = unit(noise(9, 6)).requires_grad_(), unit(noise(9, 6, seed=1))
    state = Correlation(6, 0.9)
    state.update(u2, RANKS)
    torch.testing.assert_close(state.correlation_EE, u2.T @ u2 / 9)
    loss = UniGrad(strength=5.0).loss(Gaussian(), u1, u2, state, RANKS).value
    (gradient,) = torch.autograd.grad(loss, u1)
    wanted = 2 * (5.0 * u1 @ (u2.T @ u2 / 9) - u2).detach() / 9
    radial = (wanted * u1.detach()).sum(dim=-1, keepdim=True) * u1.detach()
    torch.testing.assert_close(gradient, wanted - radial)
    state.update(u2.flip(1), RANKS)
    flipped = u2.flip(1)
    torch.testing.assert_close(state.correlation_EE, 0.9 * u2.T @ u2 / 9 + 0.1 * flipped.T @ flipped / 9)
