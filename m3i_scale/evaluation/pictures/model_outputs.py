"""Outputs of a model that only pictures need: attention of the class token, and reconstructed pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

from m3i_scale.backbones.base import Backbone, Tokens, gather_tokens, split_heads
from m3i_scale.backbones.families.base import Angles
from m3i_scale.backbones.families.dino import Dinov3
from m3i_scale.backbones.tokens import TokenBackbone
from m3i_scale.data.batch import Batch
from m3i_scale.objective.information import Objective
from m3i_scale.objective.inputs import PixelNorm
from m3i_scale.objective.targets.base import Context, Encoded, TargetModules
from m3i_scale.objective.targets.dense import Pixels, patch_moments, patchify


def encode_attending(backbone: Backbone, images_BCHW: Tensor) -> tuple[Tokens, Tensor | None]:
    """Encode as `encode_whole`. Also return the class token's attention in the last layer by head: fp32 (B, H, N), or
    None without class token. The rest of 1 is attention to the class token itself and to registers."""
    if not isinstance(backbone, TokenBackbone) or not backbone.has_class_token:
        return backbone.encode_whole(images_BCHW), None
    attention: list[Tensor] = []
    # Inside the layer's call, before any other hook: under ZeRO-3 its parameters are gathered then, and a compiled
    # layer is not affected.
    hook = backbone.layers[-1].register_forward_hook(
        lambda layer, inputs, output: attention.append(_class_attention(backbone, layer, *inputs)), prepend=True
    )
    try:
        tokens = backbone.encode_whole(images_BCHW)
    finally:
        hook.remove()
    return tokens, attention[0]


def _class_attention(
    backbone: TokenBackbone, layer: Any, tokens_BSD: Tensor, mask: Tensor | None = None, angles: Angles | None = None
) -> Tensor:
    """Return softmax(QKᵀ/√D) of the first token for the patches: fp32 (B, H, N)."""
    norm, query = (backbone.family.parts[part].partition(".{}.")[2] for part in ("norm1", "q"))
    attention = layer.get_submodule(query.rpartition(".")[0])
    heads = int(backbone.model.config.num_attention_heads)
    normed_BSD = layer.get_submodule(norm)(tokens_BSD)
    query_BH1D = split_heads(attention.q_proj(normed_BSD[:, :1]), heads).float()  # the prefix is not rotated
    key_BHSD = split_heads(attention.k_proj(normed_BSD), heads)
    if angles is not None:
        if not isinstance(backbone.family, Dinov3):
            raise NotImplementedError("a rotation of positions other than DINOv3's")
        key_BHSD = apply_rotary_pos_emb(key_BHSD, key_BHSD, *angles)[1]
    scores_BH1S = query_BH1D @ key_BHSD.float().transpose(2, 3) * query_BH1D.shape[-1] ** -0.5
    attention_BHS: Tensor = scores_BH1S.softmax(dim=-1)[:, :, 0]
    return attention_BHS[:, :, backbone.prefix :]


@torch.no_grad()
def reconstruct(objective: Objective, batch: Batch) -> dict[tuple[str, str], Tensor]:
    """Return the predictions of pixel targets as images, uint8 (B, 3, H, W), by target and input. For an input of
    several parts, the first one counts. Runs without collectives."""
    targets = [target for target in objective.recipe.targets if isinstance(target, Pixels)]
    if not targets:
        return {}
    views = objective.views_of(batch)
    context = Context(batch, views, objective.encode_inputs(objective.inputs_of(batch), views), {}, {}, {})
    images: dict[tuple[str, str], Tensor] = {}
    grid = objective.student.grid_of(batch.images_VBCHW)
    for target in targets:
        for part in reversed(target.sources(context)):
            pixels_BCHW = _predicted_view(target, objective.target_modules(target, grid), context, part)
            images[target.name, part.where.name] = _bytes_of(pixels_BCHW, objective.pixel_norm)
    return images


def _predicted_view(target: Pixels, given: TargetModules, context: Context, encoded: Encoded) -> Tensor:
    """Return the target view as predicted from one input: normalized (B, 3, H, W), fp32. Other patches show the true
    pixels. Standardized patches get the mean and std of the true pixels."""
    query_BQ, decoded_BQD = target.decode(given, context, encoded)
    true_BNP = patchify(context.views[target.view], given.patch_size, standardize=False)
    predicted_BQP = given.head(decoded_BQD).float()
    if target.normalize_pixels:
        mean_BQ1, std_BQ1 = patch_moments(gather_tokens(true_BNP, query_BQ))
        predicted_BQP = predicted_BQP * std_BQ1 + mean_BQ1
    shown_BNP = true_BNP.scatter(1, query_BQ[..., None].expand_as(predicted_BQP), predicted_BQP)
    return unpatchify(shown_BNP, given.grid, given.patch_size)


def unpatchify(pixels_BNP: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Reverse `patchify`: return the images (B, 3, H, W)."""
    blocks = pixels_BNP.unflatten(2, (patch, patch, 3)).unflatten(1, grid)
    images_BCHW: Tensor = blocks.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return images_BCHW


def _bytes_of(pixels_BCHW: Tensor, pixel_norm: PixelNorm) -> Tensor:
    """Undo the normalization: (B, 3, H, W) → uint8. Values out of range are clamped."""
    mean_C11, std_C11 = (255.0 * values_C[:, None, None] for values_C in (pixel_norm.mean_C, pixel_norm.std_C))
    return (pixels_BCHW.float() * std_C11 + mean_C11).round().clamp(0, 255).to(torch.uint8)
