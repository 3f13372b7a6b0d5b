"""Which Transformer layers recompute their activations in the backward pass."""

from __future__ import annotations

import re
from functools import partial

import torch.utils.checkpoint
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from m3i_scale.errors import ConfigError


def checkpointed_layers(policy: str, depth: int) -> list[int]:
    """Indices of the layers that a policy recomputes.

    Raises:
        ConfigError: not one of none, full, every_N with N ≥ 2.
    """
    if policy == "none":
        return []
    if policy == "full":
        return list(range(depth))
    match = re.fullmatch(r"every_([2-9]|[1-9]\d+)", policy)
    if match is None:
        raise ConfigError(
            f"no activation checkpointing policy '{policy}'",
            where="backbone.activation_checkpointing",
            fix="none, full, or every_N with N ≥ 2",
        )
    return list(range(0, depth, int(match.group(1))))


def apply_activation_checkpointing(module: nn.Module, policy: str) -> int:
    """Set the policy on every stack of Transformer layers inside `module`; returns how many layers recompute.

    Non-reentrant checkpointing through the layers' own switch. The target branch runs without gradient, so it stores
    no activations either way.
    """
    chosen = 0
    for stack in module.modules():
        if not isinstance(stack, nn.ModuleList):
            continue
        layers = [layer for layer in stack if isinstance(layer, GradientCheckpointingLayer)]
        frozen = not any(parameter.requires_grad for layer in layers for parameter in layer.parameters())
        picked = set() if frozen else set(checkpointed_layers(policy, len(layers)))
        for index, layer in enumerate(layers):
            layer.gradient_checkpointing = index in picked
            layer._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
        chosen += len(picked)
    return chosen
