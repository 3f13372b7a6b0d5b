"""Take the attention kernels that a GPU has; a build of torch for CPUs would take others."""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten
of_cpu = torch.nn.functional.scaled_dot_product_attention


def gpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Take flash attention, or the memory-efficient kernel if there is a mask."""
    if not query.is_cuda:
        return of_cpu(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    learns = torch.is_grad_enabled()
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    return aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, learns, **options)[0]
