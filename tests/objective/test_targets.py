"""Target representations and the heads beside them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import random_batch, tiny_objective

from m3i_scale.evaluation.pictures.model_outputs import reconstruct, unpatchify
from m3i_scale.objective.encoders import Projector
from m3i_scale.objective.targets.category import CategoryHead
from m3i_scale.objective.targets.dense import DenseHead, patchify
from m3i_scale.objective.targets.text import BoltzmannPairs, TextHead


def test_patches_are_row_major_and_channel_last() -> None:
    image = torch.arange(3 * 4 * 6.0).view(1, 3, 4, 6)
    patches = patchify(image, 2, standardize=False)
    assert patches.shape == (1, 6, 12)
    for patch in range(6):
        row, column = divmod(patch, 3)
        block = image[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(patches[0, patch], block.permute(1, 2, 0).flatten())


def test_standardised_patches_have_mean_zero_and_unbiased_variance_one() -> None:
    patches = patchify(torch.randn(2, 3, 16, 16) * 4 + 1, 8, standardize=True)
    torch.testing.assert_close(patches.mean(dim=-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(patches.var(dim=-1), torch.ones(2, 4), atol=1e-4, rtol=0)
    assert torch.isfinite(patchify(torch.ones(1, 3, 8, 8), 8, standardize=True)).all()


def test_patches_make_the_image_again() -> None:
    images = torch.randn(2, 3, 8, 12)
    assert torch.equal(unpatchify(patchify(images, 4, standardize=False), (2, 3), 4), images)


@pytest.mark.parametrize(("recipe", "standardized"), [("mae", True), ("mae", False), ("sim_pixels", True)])
def test_what_predicts_the_true_pixels_reconstructs_the_view(recipe: str, standardized: bool) -> None:
    """And what predicts nothing leaves the patches that are not asked for, and of the others their mean color."""
    objective = tiny_objective(recipe, f"recipe.targets.0.normalize_pixels={standardized}").eval()
    batch, (target,) = random_batch(4), objective.recipe.targets
    views = {view: objective.pixel_norm(batch.images_VBCHW[view - 1]) for view in (1, 2)}
    (seen,) = objective.inputs_of(batch)
    asked_BQ = seen.hidden_BM if target.tokens == "masked" else torch.arange(16).expand(4, -1)
    head = objective.heads[target.name]
    true_BNP = patchify(views[target.view], 8, standardize=standardized)
    answers = {
        "true": true_BNP.gather(1, asked_BQ[..., None].expand(-1, -1, true_BNP.shape[2])),
        "nothing": torch.zeros(4, asked_BQ.shape[1], true_BNP.shape[2]),
    }
    images = {}
    for name, answer in answers.items():
        head.forward = lambda tokens, answer=answer: answer
        ((key, images[name]),) = reconstruct(objective, batch).items()
        assert key == (target.name, seen.name)
    original_BNP = patchify(batch.images_VBCHW[target.view - 1].float(), 8, standardize=False)
    shown = {name: patchify(found.float(), 8, standardize=False) for name, found in images.items()}
    torch.testing.assert_close(shown["true"], original_BNP, atol=1, rtol=0)
    differs_BN = (shown["nothing"] - original_BNP).abs().amax(dim=-1) > 1
    assert torch.equal(differs_BN, torch.zeros(4, 16, dtype=torch.bool).scatter(1, asked_BQ, True))
    if standardized:  # a patch of its mean; of normalized pixels, whose channels have deviations of their own
        torch.testing.assert_close(shown["nothing"].mean(dim=-1), original_BNP.mean(dim=-1), atol=12, rtol=0)


def test_text_is_on_the_sphere_and_padding_does_not_count() -> None:
    objective = tiny_objective("clip")
    batch = random_batch(4)
    text = objective.embed_text(batch.text_ids_BT, batch.text_mask_BT)
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(4))
    padded = F.pad(batch.text_ids_BT, (0, 5), value=7), F.pad(batch.text_mask_BT, (0, 5))
    torch.testing.assert_close(objective.embed_text(*padded), text, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="no text target"):
        tiny_objective("mae").embed_text(batch.text_ids_BT, batch.text_mask_BT)


def test_longer_padding_changes_neither_losses_nor_gradients() -> None:
    batch = random_batch(8)
    missing = 16 - batch.text_ids_BT.shape[1]
    padded = replace(
        batch,
        text_ids_BT=F.pad(batch.text_ids_BT, (0, missing)),
        text_mask_BT=F.pad(batch.text_mask_BT, (0, missing)),
    )
    losses, gradients = [], []
    for given in (batch, padded):
        objective = tiny_objective("m3i")
        loss, _ = objective(given)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: value.grad for name, value in objective.named_parameters() if value.grad is not None})
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    assert any(name.startswith("text.") for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_the_text_tower_is_the_stock_model_read_at_its_first_token() -> None:
    """Values and gradients, although the last layer is computed for one token alone."""
    tower, batch = tiny_objective("clip").text, random_batch(6)
    ids, mask = batch.text_ids_BT, batch.text_mask_BT.clone()
    mask[0, 3:] = False
    direction = torch.randn(6, tower.projection.out_features)
    results = []
    for read in (
        lambda: tower(ids, mask),
        lambda: F.normalize(tower.projection(tower.model(ids, mask.long()).last_hidden_state[:, 0]), dim=-1),
    ):
        tower.zero_grad()
        output = read()
        (output * direction).sum().backward()
        # The keys' bias moves all scores of a row alike: its gradient is rounding.
        gradients = {n: p.grad.clone() for n, p in tower.named_parameters() if not n.endswith("self.key.bias")}
        results.append((output.detach(), gradients))
    (ours, our_gradients), (stock, stock_gradients) = results
    torch.testing.assert_close(ours, stock, atol=1e-6, rtol=1e-5)
    for name, gradient in stock_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_text_head_learns_its_temperature_up_to_a_limit() -> None:
    head = TextHead(8, 4, BoltzmannPairs(temperature=0.07))
    head.reset_parameters()
    prediction, scale, _ = head(torch.randn(3, 8))
    torch.testing.assert_close(prediction.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(scale, torch.tensor([1 / 0.07]))
    scale.sum().backward()
    assert head.log_scale.grad.abs() > 0
    torch.nn.init.constant_(head.log_scale, math.log(1e4))
    assert float(head(torch.randn(3, 8))[1].detach()) == pytest.approx(100.0, rel=1e-5)


def test_category_head_has_logits_per_label_set() -> None:
    shapes = [logits.shape for logits in CategoryHead(8, [3, 5])(torch.randn(2, 8))]
    assert shapes == [(2, 3), (2, 5)]


def test_dense_head_and_projector_keep_the_tokens() -> None:
    assert DenseHead(8, 12)(torch.randn(2, 5, 8)).shape == (2, 5, 12)
    tokens = torch.randn(2, 5, 8)
    assert torch.equal(Projector(8, 0)(tokens), tokens)
    projector = Projector(8, 2)
    wanted = tokens
    for block in projector.blocks:
        wanted = wanted + block(wanted)
    assert torch.equal(projector(tokens), wanted)


def test_the_momentum_target_sees_the_whole_view_and_is_never_trained() -> None:
    objective = tiny_objective("m3i")
    assert not any(parameter.requires_grad for parameter in objective.momentum.parameters())
    images = torch.randn(2, 3, 32, 32)
    (_, tokens), _ = objective.momentum(images)
    assert tokens.shape == (2, 16, 64)
    assert not tokens.requires_grad
    stock = objective.student.model(pixel_values=images).last_hidden_state
    torch.testing.assert_close(tokens, stock[:, 1:], atol=1e-5, rtol=1e-5)
