"""Attention of a subset of the queries, with the kernel of the surrounding stock layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def split_heads(x_BLD: Tensor, heads: int) -> Tensor:
    """Split channels into heads: (B, L, H·D) → (B, H, L, D)."""
    x_BHLD: Tensor = x_BLD.unflatten(-1, (heads, -1)).transpose(1, 2)
    return x_BHLD


def attend(
    query_BHQD: Tensor,
    key_BHLD: Tensor,
    value_BHLD: Tensor,
    kernel: str,
    *,
    mask_B11L: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return softmax(QKᵀ/√D)V: (B, H, Q, D). `kernel` is sdpa (fused) or eager. Each row of the bool mask needs at
    least one True key; False keys are masked."""
    if kernel == "sdpa":
        return F.scaled_dot_product_attention(query_BHQD, key_BHLD, value_BHLD, attn_mask=mask_B11L, dropout_p=dropout)
    scores_BHQL = query_BHQD @ key_BHLD.transpose(2, 3) * query_BHQD.shape[-1] ** -0.5
    if mask_B11L is not None:
        scores_BHQL = scores_BHQL.masked_fill(~mask_B11L, -torch.inf)
    return F.dropout(scores_BHQL.softmax(dim=-1), dropout) @ value_BHLD
