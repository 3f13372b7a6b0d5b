"""The two likelihoods against their textbook formulas and against open_clip."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from open_clip.loss import ClipLoss

from m3i_scale.objective import distributions
from m3i_scale.objective.distributions import Boltzmann, Gaussian, SmoothL1, _LogSumExp
from m3i_scale.objective.ranks import SingleProcess, global_mean
from m3i_scale.objective.targets.category import BoltzmannClasses
from m3i_scale.objective.targets.text import BoltzmannPairs, gather_targets

ALONE = SingleProcess()


def unit(seed: int, rows: int = 6, width: int = 8) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def pairs(
    prediction: torch.Tensor, target: torch.Tensor, items: list[int], valid: list[bool], scale: float = 9.0
) -> tuple[torch.Tensor, torch.Tensor]:
    targets = gather_targets(target, torch.tensor(items), torch.tensor(valid), ALONE)
    return BoltzmannPairs().loss(prediction, targets, torch.tensor([scale]), None, ALONE)


def test_forward_is_the_cross_entropy_over_the_texts_alone() -> None:
    forward = BoltzmannPairs(direction="forward")
    prediction, target = unit(1).requires_grad_(), unit(2).requires_grad_()
    items, valid = torch.tensor([1, 2, 3, 1, 5, 6]), torch.tensor([True, True, True, True, False, True])
    targets = gather_targets(target, items, valid, ALONE)
    loss, nats = forward.loss(prediction, targets, torch.tensor([9.0]), None, ALONE)
    logits = 9.0 * prediction @ target.T
    out = ~valid.expand(6, 6) | ((items[:, None] == items) & ~torch.eye(6, dtype=torch.bool))
    out[4, 4] = False
    rows = F.cross_entropy(logits.masked_fill(out, -torch.inf), torch.arange(6), reduction="none")
    torch.testing.assert_close(loss, rows[valid].mean())
    torch.testing.assert_close(nats, ((~out).sum(dim=1).float().log() - rows)[valid].mean().detach())
    both = BoltzmannPairs().loss(prediction, targets, torch.tensor([9.0]), None, ALONE)[0]
    images = gather_targets(prediction, items, valid, ALONE)
    backward = forward.loss(target, images, torch.tensor([9.0]), None, ALONE)[0]
    torch.testing.assert_close(both, (loss + backward) / 2)


# ---------------------------------------------------------------- Gaussian


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_smooth_l1_is_a_square_near_the_target_and_straight_beyond(beta: float) -> None:
    target = torch.zeros(1, 1, 4)
    prediction = torch.tensor([0.0, 0.4 * beta, -beta, 3.0]).view(1, 1, 4).requires_grad_()
    loss = SmoothL1(beta=beta).maps(prediction, target, ALONE)
    loss.backward()
    wanted = torch.tensor([0.0, 0.08 * beta, 0.5 * beta, 3.0 - 0.5 * beta])
    torch.testing.assert_close(loss.detach(), wanted.mean())
    torch.testing.assert_close(prediction.grad.flatten(), torch.tensor([0.0, 0.4, -1.0, 1.0]) / 4)
    with pytest.raises(ValueError, match="beta"):
        SmoothL1(beta=0)


def test_smooth_l1_of_vectors_compares_directions() -> None:
    prediction, target = torch.randn(6, 8), unit(3)
    wanted = ((F.normalize(prediction, dim=-1) - target).square() / 2 / 5.0).sum(dim=1).mean()
    torch.testing.assert_close(SmoothL1(beta=5.0).vectors(prediction * 3, target * 2, ALONE), wanted)


def test_half_a_variance_is_the_mean_squared_error() -> None:
    prediction, target = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    torch.testing.assert_close(Gaussian(sigma2=0.5).maps(prediction, target, ALONE), F.mse_loss(prediction, target))


def test_gaussian_is_the_log_likelihood_without_its_constant() -> None:
    prediction, target, sigma2 = torch.randn(2, 3, 4), torch.randn(2, 3, 4), 1.7
    distribution = torch.distributions.Normal(prediction, math.sqrt(sigma2))
    constant = 0.5 * math.log(2 * math.pi * sigma2)
    wanted = -distribution.log_prob(target).mean() - constant
    torch.testing.assert_close(Gaussian(sigma2=sigma2).maps(prediction, target, ALONE), wanted)


# ---------------------------------------------------------------- classes


def test_classes_are_cross_entropy_over_the_labelled() -> None:
    logits = torch.randn(5, 7)
    labels, valid = torch.tensor([0, 6, -1, 3, -1]), torch.tensor([True, True, False, True, False])
    loss, nats = BoltzmannClasses(label_smoothing=0.0).loss(logits, labels, valid, ALONE)
    torch.testing.assert_close(loss, F.cross_entropy(logits[valid], labels[valid]))
    torch.testing.assert_close(nats, math.log(7) - loss)


def test_label_smoothing_is_in_the_loss_and_not_in_the_nats() -> None:
    logits, labels, valid = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.ones(4, dtype=torch.bool)
    loss, nats = BoltzmannClasses(label_smoothing=0.1).loss(logits, labels, valid, ALONE)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, label_smoothing=0.1))
    torch.testing.assert_close(nats, math.log(3) - F.cross_entropy(logits, labels))


def test_a_perfect_classifier_knows_log_k_nats() -> None:
    labels = torch.arange(5)
    _, nats = BoltzmannClasses().loss(torch.eye(5) * 100, labels, torch.ones(5, dtype=torch.bool), ALONE)
    torch.testing.assert_close(nats, torch.tensor(math.log(5)))


# ---------------------------------------------------------------- pairs


def test_pairs_are_the_loss_of_open_clip() -> None:
    image, text = unit(1), unit(2)
    loss, nats = pairs(image, text, list(range(6)), [True] * 6)
    torch.testing.assert_close(loss, ClipLoss()(image, text, torch.tensor(9.0)))
    torch.testing.assert_close(nats, math.log(6) - loss)


def test_samples_without_target_leave_the_loss_of_the_others_alone() -> None:
    image, text = unit(1).requires_grad_(), unit(2).requires_grad_()
    valid = [True, False, True, True, False, True]
    loss, nats = pairs(image, text, [1, 0, 2, 3, 0, 4], valid)
    kept = torch.tensor(valid)
    torch.testing.assert_close(loss, ClipLoss()(image[kept], text[kept], torch.tensor(9.0)))
    torch.testing.assert_close(nats, math.log(4) - loss.detach())
    loss.backward()
    assert not image.grad[~kept].any()
    assert not text.grad[~kept].any()
    assert image.grad[kept].abs().sum() > 0


def test_equal_captions_are_no_negatives_of_each_other() -> None:
    image, text = unit(1, rows=4), unit(2, rows=4)
    text[2] = text[0]
    loss, nats = pairs(image, text, [5, 6, 5, 7], [True] * 4)
    wanted, bound = [], []
    out = {0: 2, 2: 0}
    for row in range(4):
        keep = [column for column in range(4) if column != out.get(row)]
        place = torch.tensor(keep.index(row))
        i2t, t2i = 9.0 * image[row] @ text[keep].T, 9.0 * text[row] @ image[keep].T
        wanted.append((F.cross_entropy(i2t, place) + F.cross_entropy(t2i, place)) / 2)
        bound.append(math.log(len(keep)) - wanted[-1])
    torch.testing.assert_close(loss, torch.stack(wanted).mean())
    torch.testing.assert_close(nats, torch.stack(bound).mean())
    plain = ClipLoss()(image, text, torch.tensor(9.0))
    assert loss < plain


@pytest.mark.parametrize("valid", [[False] * 6, [False] * 5 + [True]])
def test_nobody_or_one_alone_gives_zero_with_zero_gradient(valid: list[bool]) -> None:
    image, text = unit(1).requires_grad_(), unit(2).requires_grad_()
    loss, nats = pairs(image, text, [0] * 5 + [3], valid)
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(nats) == 0
    assert not image.grad.any()
    assert not text.grad.any()


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.integers(0, 3))
def test_global_mean_is_the_mean_of_the_valid(valid: list[bool], seed: int) -> None:
    values = torch.randn(len(valid), generator=torch.Generator().manual_seed(seed))
    kept = values[torch.tensor(valid)]
    wanted = kept.mean() if len(kept) else torch.tensor(0.0)
    torch.testing.assert_close(global_mean(values, torch.tensor(valid), ALONE), wanted)


def test_low_precision_inputs_are_computed_in_fp32() -> None:
    prediction, target = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 3, 4).bfloat16()
    assert Gaussian(sigma2=0.5).maps(prediction, target, ALONE).dtype == torch.float32
    loss, _ = BoltzmannClasses().loss(
        torch.randn(2, 3).bfloat16(), torch.tensor([0, 1]), torch.tensor([True, True]), ALONE
    )
    assert loss.dtype == torch.float32


# ---------------------------------------------------------------- a long queue, a block of rows at a time


@pytest.mark.parametrize("block", [1, 7, 40, 10_000])
def test_blocks_of_rows_give_the_plain_sum_and_its_gradient(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(distributions, "_BLOCK", block)
    query = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    queue, mask = torch.randn(20, 4, dtype=torch.float64), torch.zeros(20, dtype=torch.float64)
    mask[13:] = -1e30

    def ours(query: torch.Tensor) -> torch.Tensor:
        return _LogSumExp.apply(query, queue, mask)

    torch.testing.assert_close(ours(query), (query @ queue[:13].T).logsumexp(dim=1))
    assert torch.autograd.gradcheck(ours, (query,))
    assert not ours(query.detach()).requires_grad


def test_large_cosines_over_a_small_temperature_stay_finite() -> None:
    query = torch.full((2, 4), 100.0, requires_grad=True)
    total = _LogSumExp.apply(query, torch.ones(3, 4), torch.zeros(3))
    torch.testing.assert_close(total, torch.full((2,), 400.0 + math.log(3)))
    total.sum().backward()
    torch.testing.assert_close(query.grad, torch.ones(2, 4))


@pytest.mark.parametrize("temperature", [0.01, 0.024, 0.025, 0.2])
def test_opposite_and_equal_targets_in_a_queue_at_any_temperature(temperature: float) -> None:
    query = F.normalize(torch.randn(4, 6), dim=1).requires_grad_()
    p = Boltzmann(temperature=temperature)
    for rows in (-query.detach(), query.detach(), torch.cat([query.detach(), -query.detach()])):
        loss, _ = p.among_queue(query, query.detach().flip(0), rows, torch.tensor(len(rows)))
        logits = query.double() @ torch.cat([query.detach().flip(0), rows]).double().T / temperature
        own = (query.double() * query.detach().flip(0).double()).sum(dim=1) / temperature
        wanted = (torch.cat([own[:, None], logits[:, 4:]], dim=1).logsumexp(dim=1) - own).mean()
        torch.testing.assert_close(loss.double(), wanted, atol=1e-4, rtol=1e-4)
        (gradient,) = torch.autograd.grad(loss, query)
        assert torch.isfinite(gradient).all()
