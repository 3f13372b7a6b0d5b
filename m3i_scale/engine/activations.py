"""Activation checkpointing: which layers recompute in the backward pass, and which tensors they keep.

The layers are `transformers` layers (`GradientCheckpointingLayer`): ViT, DINOv2, BERT, decoders and InternImage. All
policies use torch's non-reentrant checkpoint through the layers' switch, so gradients are the same as with `none`. The
target branch runs without gradient and stores no activations.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from m3i_scale.errors import ConfigError

_WHERE = "backbone.activation_checkpointing"
_WORDS = "use none, full, selective, offload, or every_N with N ≥ 2"


@dataclass(frozen=True)
class Policy:
    """An activation checkpointing policy from the config file."""

    kind: str
    """none | full | every | selective | offload."""
    every: int = 1
    """Recompute the first of every N layers of a stack."""

    def picks(self, depth: int) -> list[int]:
        """Return the indices of a stack's layers that recompute."""
        return [] if self.kind == "none" else list(range(0, depth, self.every))


def read_policy(text: str) -> Policy:
    """Parse `backbone.activation_checkpointing`."""
    if text in ("none", "full", "selective", "offload"):
        return Policy(text)
    if match := re.fullmatch(r"every_([2-9]|[1-9]\d+)", text):
        return Policy("every", every=int(match.group(1)))
    raise ConfigError(f"no activation checkpointing policy '{text}'", where=_WHERE, fix=_WORDS)


def check_policy(text: str) -> Policy:
    """Parse a policy, and raise ConfigError if it would have no effect on this machine's accelerator."""
    policy = read_policy(text)
    if policy.kind == "offload" and in_host_memory():
        raise ConfigError(
            "activation checkpointing 'offload' has no effect on this device",
            where=_WHERE,
            why=f"the accelerator '{get_accelerator().device_name()}' already computes in host memory",
            fix="use full, which recomputes the same layers",
        )
    return policy


def policy_of_switches(text: str, compiled: bool) -> str:
    """Return the policy for the layers' switches. For compiled layers the compiler implements `selective`."""
    return "none" if compiled and read_policy(text).kind == "selective" else text


def in_host_memory() -> bool:
    """Return whether the accelerator computes in host memory, as a CPU does."""
    return bool(get_accelerator().on_accelerator(torch.empty(0)))


def stacks(module: nn.Module) -> Iterator[list[tuple[str, Any]]]:
    """Yield every stack of layers that run their full forward, as (name, layer). Layers with `called_in_parts` are
    excluded: they compute a part of the output and are not called through their switch."""
    for prefix, stack in module.named_modules():
        if not isinstance(stack, nn.ModuleList):
            continue
        layers = [
            (f"{prefix}.{name}", layer)
            for name, layer in stack.named_children()
            if isinstance(layer, GradientCheckpointingLayer) and not getattr(layer, "called_in_parts", False)
        ]
        if layers:
            yield layers


def trained_stacks(module: nn.Module) -> Iterator[list[tuple[str, Any]]]:
    """Yield the stacks with trained parameters."""
    for layers in stacks(module):
        if any(parameter.requires_grad for _, layer in layers for parameter in layer.parameters()):
            yield layers


def apply_activation_checkpointing(module: nn.Module, text: str) -> list[str]:
    """Set the policy on every trained stack inside `module`; return the names of the layers that recompute."""
    policy = read_policy(text)
    chosen = []
    for layers in trained_stacks(module):
        picked = set(policy.picks(len(layers)))
        for index, (name, layer) in enumerate(layers):
            layer.gradient_checkpointing = index in picked
            layer._gradient_checkpointing_func = _FUNCTIONS.get(policy.kind, _recompute)
            chosen += [name] if index in picked else []
    return chosen


def describe_policy(text: str, *, compiled: bool) -> str:
    """Return a policy for the log; `off` without recomputation."""
    kind = read_policy(text).kind
    if compiled and kind == "selective":
        return f"{text} (compiled layers keep about half of the activations)"
    return "off" if kind == "none" else text


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
"""Operations whose results the policy `selective` keeps. The list, and the recomputation of every second matrix
product, come from torchtitan (`distributed/activation_checkpoint.py`). Products with a bias and deformable sampling are
added."""


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


def _selective_contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
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


_recompute: Callable[..., Any] = partial(checkpoint, use_reentrant=False)


def _recompute_selectively(run: Callable[..., Any], *inputs: Any) -> Any:
    return checkpoint(run, *inputs, use_reentrant=False, context_fn=_selective_contexts)


def _recompute_from_host(run: Callable[..., Any], *inputs: Any) -> Any:
    """Offload the layer's input to host memory: a checkpoint saves only the input, before its hooks begin."""
    device_type = get_accelerator().device_name().split(":")[0]
    with save_on_cpu(pin_memory=not in_host_memory(), device_type=device_type):
        return checkpoint(run, *inputs, use_reentrant=False)


_FUNCTIONS: dict[str, Callable[..., Any]] = {"selective": _recompute_selectively, "offload": _recompute_from_host}
