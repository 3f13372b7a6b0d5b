"""Whole recipes against the implementations that other people trust."""

from __future__ import annotations

import pytest
import torch
from open_clip.loss import ClipLoss
from tiny import random_batch, tiny_objective
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from m3i_scale.objective.information import Objective
from m3i_scale.objective.masks import hash_uniform

# ---------------------------------------------------------------- CLIP


def clip_features(objective: Objective, batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """By the stock models alone: mean patch token → LayerNorm → projection, and the text tower."""
    pixels = objective.pixel_norm(batch.images_VBCHW[0])
    hidden = objective.student.model(pixel_values=pixels).last_hidden_state
    norm = objective.decoders["pool"].norm
    pooled = torch.nn.functional.layer_norm(hidden[:, 1:].mean(dim=1), (64,), norm.weight, norm.bias, eps=1e-6)
    head = objective.heads["text"]
    image = torch.nn.functional.normalize(pooled @ head.projection.weight.T, dim=-1)
    text = objective.text(batch.text_ids_BT, batch.text_mask_BT)
    return image, text, head.log_scale.exp()


def test_the_clip_recipe_is_the_loss_and_the_gradient_of_open_clip() -> None:
    objective, batch = tiny_objective("clip"), random_batch(6)
    batch.has_text_B[:] = True
    batch.captions_B = torch.arange(1, 7)
    loss, figures = objective(batch)
    loss.backward()
    ours = {name: parameter.grad.clone() for name, parameter in objective.named_parameters()}
    objective.zero_grad()
    wanted = ClipLoss()(*clip_features(objective, batch))
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(figures["text/nats"], torch.tensor(6.0).log() - wanted.detach())
    for name, parameter in objective.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_with_captions_missing_it_is_the_loss_on_the_others() -> None:
    objective, batch = tiny_objective("clip"), random_batch(9, repeated_caption=False)
    assert 0 < int(batch.has_text_B.sum()) < 9
    image, text, scale = clip_features(objective, batch)
    kept = batch.has_text_B
    torch.testing.assert_close(objective(batch)[0], ClipLoss()(image[kept], text[kept], scale))


def test_equal_captions_in_one_batch_are_no_negatives() -> None:
    objective, batch = tiny_objective("clip"), random_batch(4)
    batch.has_text_B[:] = True
    batch.captions_B = torch.tensor([4, 9, 4, 7])
    image, text, scale = clip_features(objective, batch)
    logits = scale * image @ text.T
    for row, column in ((0, 2), (2, 0)):
        hidden = torch.zeros(4, 4, dtype=torch.bool)
        hidden[row, column] = True
        logits = logits.masked_fill(hidden, -torch.inf)
    labels = torch.arange(4)
    cross = torch.nn.functional.cross_entropy
    wanted = (cross(logits, labels) + cross(logits.T, labels)) / 2
    torch.testing.assert_close(objective(batch)[0], wanted)


# ---------------------------------------------------------------- MAE


def stock_mae(objective: Objective, *, norm_pix_loss: bool) -> ViTMAEForPreTraining:
    """ViTMAEForPreTraining with the weights of our recipe; strict, so that both have the same parameters."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    decoder = {f"decoder_{key}": value for key, value in shape.items()}
    decoder |= {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1}
    config = ViTMAEConfig(
        **shape,
        **decoder,
        image_size=32,
        patch_size=8,
        mask_ratio=0.75,
        layer_norm_eps=1e-6,
        norm_pix_loss=norm_pix_loss,
    )
    mae = ViTMAEForPreTraining(config)
    mae.decoder.initialize_weights(16)
    with torch.no_grad():
        # MAE adds no position to the class token and a fixed one to patches; here it is whatever was drawn.
        objective.student.model.embeddings.position_embeddings.copy_(
            torch.randn(1, 17, 64, generator=torch.Generator().manual_seed(1)) * 0.1
        )
    weights = {f"vit.{name}": value for name, value in objective.student.model.state_dict().items()}
    own = objective.decoders["pixels"]
    for name, value in own.state_dict().items():
        head, _, tail = name.partition(".")
        moved = {
            "embed": "decoder_embed",
            "layers": "decoder_layers",
            "norm": "decoder_norm",
            "mask_token": "mask_token",
        }
        weights[f"decoder.{moved[head]}" + (f".{tail}" if tail else "")] = value
    for name, value in objective.heads["pixels"].projection.state_dict().items():
        weights[f"decoder.decoder_pred.{name}"] = value
    weights["decoder.decoder_pos_embed"] = mae.decoder.decoder_pos_embed.detach().clone()
    mae.load_state_dict(weights, strict=True)
    return mae


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_mae_recipe_is_vitmae(norm_pix_loss: bool) -> None:
    objective = tiny_objective("mae", f"recipe.targets.0.normalize_pixels={str(norm_pix_loss).lower()}")
    objective.eval()
    mae = stock_mae(objective, norm_pix_loss=norm_pix_loss).eval()
    batch = random_batch(5, views=1)
    predictions = []
    objective.heads["pixels"].register_forward_hook(lambda module, inputs, output: predictions.append(output))
    loss, figures = objective(batch)

    pixels = objective.pixel_norm(batch.images_VBCHW[0])
    wanted = mae(pixel_values=pixels, noise=hash_uniform(batch.seeds_B, 16, 0))
    torch.testing.assert_close(loss, wanted.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(figures["pixels/loss"], wanted.loss.detach(), rtol=1e-5, atol=1e-6)
    hidden = wanted.logits[wanted.mask.bool()].view(5, 12, -1)
    torch.testing.assert_close(predictions[0], hidden, rtol=1e-4, atol=1e-5)

    loss.backward()
    wanted.loss.backward()
    stock = dict(mae.vit.named_parameters())
    for name, parameter in objective.student.model.named_parameters():
        if stock[name].requires_grad:  # ViTMAE freezes its position table
            torch.testing.assert_close(parameter.grad, stock[name].grad, rtol=1e-3, atol=1e-6)
