"""Distributions over prototypes, of whole views and hidden patches, and KoLeo, against packages that publish them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss, SwaVLoss
from lightly.loss.swav_loss import sinkhorn
from tiny import MULTI_CROP, random_batch, tiny_objective
from torch import Tensor

from m3i_scale.backbones.base import gather_tokens
from m3i_scale.data.batch import Batch
from m3i_scale.objective.distributions import Boltzmann, assigned
from m3i_scale.objective.information import Objective
from m3i_scale.objective.ranks import SingleProcess
from m3i_scale.objective.regularizers import Memory
from m3i_scale.objective.regularizers.pooled import KoLeo
from m3i_scale.objective.regularizers.prototypes import Centering, MeanEntropy, PrototypeRegularizer, Sinkhorn
from m3i_scale.objective.targets.base import Encoded
from m3i_scale.objective.targets.prototypes import share_of_hidden

RANKS, NOTHING, P = SingleProcess(), Memory(1), Boltzmann(temperature=0.1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosines(*shape: int, seed: int = 0) -> Tensor:
    return noise(*shape, seed=seed).tanh()


def same(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Value and gradient."""
    results = []
    for loss in (ours, theirs):
        leaf = x.clone().requires_grad_()
        value = loss(leaf)
        results.append((value.detach().squeeze(), *torch.autograd.grad(value, leaf)))
    (value, gradient), (wanted, wanted_gradient) = results
    assert float(wanted_gradient.abs().max()) > 0
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------- parts


def test_koleo() -> None:
    same(lambda x: KoLeo().loss(x, RANKS), KoLeoLoss(), noise(9, 6))


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_of_swav(iterations: int) -> None:
    codes = Sinkhorn(target_temperature=0.05, iterations=iterations)
    target = cosines(12, 7)
    found = codes.assign(P, target, NOTHING, RANKS, None)
    torch.testing.assert_close(found, sinkhorn(target, iterations, 0.05), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(12))
    peer = SwaVLoss(temperature=0.1, sinkhorn_iterations=iterations, sinkhorn_epsilon=0.05)
    views = [cosines(12, 7, seed=seed) for seed in (1, 2)]

    def ours(one: Tensor) -> Tensor:
        pairs = ((one, views[1]), (views[1], one.detach()))
        wanted = [(p, assigned(codes.assign(P, target.detach(), NOTHING, RANKS, None), RANKS)) for p, target in pairs]
        return sum(codes.loss(P, p / 0.1, q, RANKS).value for p, q in wanted) / 2

    same(ours, lambda one: peer([one, views[1]], []), views[0])


def test_sinkhorn_at_its_lowest_temperature_assigns_what_is_near_no_prototype() -> None:
    target = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [1.0, -1.0]])
    found = Sinkhorn(target_temperature=0.025).assign(P, target, NOTHING, RANKS, None)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(3))


def test_rows_without_a_share_take_no_part() -> None:
    """Values, assignments, what is remembered and nats are those of the other rows alone."""
    masked = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    counted = masked.flatten()
    share = share_of_hidden(masked).flatten()
    target, logits = cosines(9, 5), cosines(9, 5, seed=1) / 0.1
    for regularizer in (Centering(), Sinkhorn(), MeanEntropy()):
        memory = regularizer.memory(4, 5)
        if isinstance(regularizer, Centering):
            memory.center_K.copy_(0.1 * noise(5, seed=3))
        for changed in (target, torch.where(counted[:, None], target, -target)):
            mixed = torch.where(counted[:, None], logits, logits.flip(1))
            all_rows = regularizer.assign(P, changed, memory, RANKS, share)
            some = regularizer.assign(P, target[counted], memory, RANKS, share[counted])
            torch.testing.assert_close(all_rows[counted], some)
            loss = regularizer.loss(P, mixed, assigned(all_rows, RANKS, share), RANKS)
            wanted = regularizer.loss(P, logits[counted], assigned(some, RANKS, share[counted]), RANKS)
            torch.testing.assert_close(loss.value, wanted.value)
            torch.testing.assert_close(loss.nats, wanted.nats)
            kept = regularizer.remembered(changed, memory, RANKS, share)
            if kept is not None:
                torch.testing.assert_close(kept[0], (share[:, None] * target).sum(dim=0) / share.sum())
        nothing = regularizer.assign(P, target, memory, RANKS, 0 * share)
        loss = regularizer.loss(P, logits.requires_grad_(), assigned(nothing, RANKS, 0 * share), RANKS)
        assert bool(torch.stack([loss.value, loss.nats]).isfinite().all())
        logits = logits.detach()
    assert torch.equal(Centering().remembered(target, memory_of(7), RANKS, 0 * share)[0], memory_of(7).center_K)


def memory_of(seed: int) -> Memory:
    memory = Centering().memory(4, 5)
    memory.center_K.copy_(noise(5, seed=seed))
    return memory


def test_the_patch_loss_of_ibot_with_its_center() -> None:
    """Images hide different numbers of patches, one hides none."""
    mask = (
        torch.rand(4, 3, 3, generator=torch.Generator().manual_seed(5))
        < torch.tensor([0.8, 0.0, 0.4, 0.6])[:, None, None]
    )
    rows = mask.flatten()
    target, peer = cosines(36, 6), IBOTPatchLoss(output_dim=6, teacher_temp=0.05, student_temp=0.1)
    memory = Centering().memory(4, 6)
    memory.center_K.copy_(0.1 * noise(6, seed=9))
    peer.center.value.copy_(memory.center_K)
    share = share_of_hidden(mask.flatten(1)).flatten()
    centering = Centering(target_temperature=0.05)
    wanted = assigned(centering.assign(P, target, memory, RANKS, share), RANKS, share)
    same(
        lambda x: centering.loss(P, x / 0.1, wanted, RANKS).value,
        lambda x: peer_at(peer, memory)(target[rows], x[rows], mask),
        cosines(36, 6, seed=1),
    )


def peer_at(peer: IBOTPatchLoss, memory: Memory) -> IBOTPatchLoss:
    """With the center of before, which a call moves."""
    peer.center.value.copy_(memory.center_K)
    return peer


# ---------------------------------------------------------------- recipes


def logits(objective: Objective, head: str, vectors: Tensor, *, averaged: bool) -> Tensor:
    """Head and prototypes, step by step; of the average without gradient."""
    module = objective.momentum.heads[head] if averaged else objective.image_heads[head]
    found = F.normalize(module.projector(vectors), dim=-1) @ F.normalize(module.prototypes.weight, dim=-1).T
    return found.detach() if averaged else found


def averaged_tokens(objective: Objective, batch: Batch) -> list[Tensor]:
    """By the stock model alone."""
    model = objective.momentum.backbone.model
    return [model(pixel_values=objective.pixel_norm(batch.view(n))).last_hidden_state.detach() for n in (1, 2)]


def online_parts(objective: Objective, batch: Batch) -> tuple[list[Encoded], list[Encoded]]:
    """Parts of the large and of the small views."""
    inputs = objective._encode(batch).inputs
    return inputs["global"], inputs["local"]


def masks_of(part: Encoded, grid: int = 4) -> Tensor:
    """Which patches of an input are hidden: bool (B, rows, columns)."""
    where = part.where
    mask = torch.zeros(len(where.hidden_BM), grid * grid).scatter(1, where.hidden_BM, where.masked_BM.float())
    return mask.bool().unflatten(1, (grid, grid))


def ibot(objective: Objective, batch: Batch, temperature: float) -> Tensor:
    """lightly's DINO loss of all pairs of views but those of a view with itself, and its patch loss."""
    views, (large, small) = averaged_tokens(objective, batch), online_parts(objective, batch)
    dino = DINOLoss(output_dim=12, teacher_temp=temperature, student_temp=0.1)
    dino.center = objective.states["prototypes"].center_K.clone()[None, None]
    loss = dino(
        [logits(objective, "prototypes", tokens[:, 0], averaged=True) for tokens in views],
        [logits(objective, "prototypes", part.cls_BND[:, -1], averaged=False) for part in (*large, *small)],
    )
    for tokens, part in zip(views, large, strict=True):
        patch = IBOTPatchLoss(output_dim=12, teacher_temp=temperature, student_temp=0.1)
        patch.center.value.copy_(objective.states["prototypes/patches"].center_K)
        mask = masks_of(part)
        hidden = [
            logits(objective, "prototypes", side[mask.flatten(1)], averaged=averaged)
            for side, averaged in ((tokens[:, 1:], True), (part.tokens_BLD, False))
        ]
        loss = loss + patch(*hidden, mask) / 2
    return loss


def dinov2(objective: Objective, batch: Batch, temperature: float) -> Tensor:
    """Sinkhorn of each view, written out; lightly's KoLeo."""
    views, (large, small) = averaged_tokens(objective, batch), online_parts(objective, batch)
    loss, parts = torch.zeros(()), [*large, *small]
    for own, tokens in enumerate(views):
        assigned = sinkhorn(logits(objective, "global", tokens[:, 0], averaged=True), 3, temperature)
        for number, part in enumerate(parts):
            if number != own:
                found = logits(objective, "global", part.cls_BND[:, -1], averaged=False) / 0.1
                loss = loss + F.cross_entropy(found, assigned) / (2 * (len(parts) - 1))
        mask = masks_of(large[own]).flatten(1)
        assigned = sinkhorn(logits(objective, "patches", tokens[:, 1:][mask], averaged=True), 3, temperature)
        found = logits(objective, "patches", large[own].tokens_BLD[mask], averaged=False) / 0.1
        share = (mask / mask.sum(dim=1, keepdim=True).clamp(min=1))[mask] / len(mask)
        loss = loss + (F.cross_entropy(found, assigned, reduction="none") * share).sum() / 2
        loss = loss + 0.1 * KoLeoLoss()(large[own].cls_BND[:, -1])
    return loss


@pytest.mark.parametrize(("recipe", "published", "warm"), [("ibot", ibot, 0.0375), ("dinov2", dinov2, 0.06)])
@pytest.mark.parametrize("share", [0.0, 0.5, 2.0])
def test_a_recipe_is_the_published_loss_with_its_gradients(
    recipe: str, published: Callable[[Objective, Batch, float], Tensor], warm: float, share: float
) -> None:
    objective = tiny_objective(recipe)
    with torch.no_grad():  # an average that equals the model would hide which of the two is used
        for parameter in objective.momentum.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    objective(random_batch(8, seed=1))  # fills centers
    objective.eval()
    objective.progress = share * warm
    batch = random_batch(8)
    hidden = [int(masks_of(part).flatten(1).any(dim=1).sum()) for part in online_parts(objective, batch)[0]]
    assert all(0 < count < 8 for count in hidden)
    loss, _ = objective(batch)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    wanted = published(objective, batch, 0.04 + 0.03 * min(share, 1.0))
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    largest = max(float(p.grad.abs().max()) for p in objective.parameters() if p.grad is not None)
    for name, parameter in objective.named_parameters():
        if parameter.grad is None:
            assert name not in ours or not ours[name].any(), name
            continue
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5 * largest, msg=name)


def test_a_head_remembers_patches_apart_from_whole_views() -> None:
    objective, batch = tiny_objective("ibot"), random_batch(8)
    objective(batch)
    views, (large, _) = averaged_tokens(objective, batch), online_parts(objective, batch)
    classes = torch.cat([logits(objective, "prototypes", tokens[:, 0], averaged=True) for tokens in views])
    torch.testing.assert_close(objective.states["prototypes"].center_K, 0.1 * classes.mean(dim=0))
    means = []
    for tokens, part in zip(views, large, strict=True):
        cosine = logits(objective, "prototypes", gather_tokens(tokens[:, 1:], part.where.hidden_BM), averaged=True)
        share = share_of_hidden(part.where.masked_BM)
        means.append((share[..., None] * cosine).sum(dim=(0, 1)) / share.sum())
    torch.testing.assert_close(objective.states["prototypes/patches"].center_K, 0.1 * torch.stack(means).mean(dim=0))


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_targets_of_a_view_are_assigned_once_for_masked_patches_only(
    norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch norm needs the same number of rows on every rank, so it also gets patches that are not masked."""
    calls: list[int] = []
    plain = Sinkhorn.assign

    def assign(self: PrototypeRegularizer, p: Boltzmann, target: Tensor, *rest: object) -> Tensor:
        calls.append(len(target))
        return plain(self, p, target, *rest)

    monkeypatch.setattr(Sinkhorn, "assign", assign)
    objective, batch = tiny_objective("dinov2", f"recipe.heads.patches.norm={norm}"), random_batch(4)
    objective(batch)
    masks = [part.where.masked_BM for part in online_parts(objective, batch)[0]]
    assert 0 < int(masks[0].sum()) < masks[0].numel()
    assert calls == [4, 4, *(mask.numel() if norm == "batch" else int(mask.sum()) for mask in masks)]


def test_a_batch_without_masked_patches_gives_heads_zero_gradients() -> None:
    """Another rank may have masked patches: all ranks must reduce the same gradients."""
    objective, batch = tiny_objective("dinov2", "recipe.inputs.0.mask.share=1e-9"), random_batch(4)
    loss, figures = objective(batch)
    loss.backward()
    assert loss.isfinite()
    assert figures["patches1/loss"] == 0
    gradients = [parameter.grad for parameter in objective.image_heads["patches"].parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_small_views_cost_no_further_collectives() -> None:
    """Assignments, and what all ranks know of them, are those of the target."""

    class Counting(SingleProcess):
        def __init__(self) -> None:
            self.calls = 0

        def sum(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().sum(x)

    calls = []
    for count in (1, 2):
        fewer = [text.replace("{count: 2, size", f"{{count: {count}, size") for text in MULTI_CROP]
        fewer = [text.replace("view: 3, views: 2", f"view: 3, views: {count}") for text in fewer]
        objective = tiny_objective("global_distillation", *fewer)
        objective.ranks = counting = Counting()
        objective(random_batch(4))
        calls.append(counting.calls)
    assert calls[0] == calls[1] > 0
