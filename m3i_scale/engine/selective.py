"""Selective activation checkpointing: keep the results of expensive operations and recompute everything else.

The list and the recomputation of every second matrix product come from torchtitan
(`distributed/activation_checkpoint.py`). Products with a bias and deformable sampling are added.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_ATTENTION = (
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
_PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default})


_KEPT = _PRODUCTS | {
    *(getattr(torch.ops.aten, name).default for name in _ATTENTION if hasattr(torch.ops.aten, name)),
    torch.ops.aten._embedding_bag.default,
}


class _OnlyKept(TorchDispatchMode):
    """A dispatch mode that passes only the operations in `_KEPT` to torch's mode.

    During recomputation, torch's mode raises an error for operations that it did not see in the forward pass. Under
    ZeRO-3 weights are gathered inside the layer, and the number of gathers depends on the parameters still gathered.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inner = inner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _KEPT:
            return self.inner.__torch_dispatch__(func, types, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def selective_contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Return contexts for `torch.utils.checkpoint` that keep attention and every second matrix product of a layer."""
    products: Counter[bool] = Counter()

    def policy(context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if func in _PRODUCTS:
            products[context.is_recompute] += 1
            if products[context.is_recompute] % 2 == 0:
                return CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_SAVE

    forward, backward = create_selective_checkpoint_contexts(policy)
    return _OnlyKept(forward), _OnlyKept(backward)
