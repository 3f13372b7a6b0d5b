"""Build the optimizer's parameter groups: with weight decay and without, by learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


def is_decayed(shape: torch.Size, *, tokens: bool = False) -> bool:
    """Return whether a parameter of this (full) shape has weight decay, as matrices have.

    A (1, 1, D) token or a (1, N, D) position table has the rank of a matrix, but is used as a set of vectors. With
    `tokens`, it counts as a matrix.
    """
    return len(shape) > 1 and (tokens or shape[0] > 1)


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    lr_scales: Mapping[str, float] | None = None,
    shape_of: Callable[[nn.Parameter], torch.Size] = lambda parameter: parameter.shape,
    *,
    decay_tokens: bool = False,
) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups: matrices with weight decay; biases, norms and other vectors without.

    Args:
        module: the full module; parameters without gradient are left out.
        weight_decay: applied to matrices only.
        lr_scales: learning rate multipliers by parameter name; the default is 1.
        shape_of: returns the full shape of a parameter, which ZeRO-3 partitions.
        decay_tokens: apply weight decay to tokens and position embeddings too.

    Returns:
        By group `params`, `weight_decay`, and `lr_scale`: the multiplier to apply when setting the group's `lr`.
    """
    by_scale: dict[float, dict[bool, list[nn.Parameter]]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            of_scale = by_scale.setdefault((lr_scales or {}).get(name, 1.0), {True: [], False: []})
            of_scale[is_decayed(shape_of(parameter), tokens=decay_tokens)].append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale}
        for scale, of_scale in sorted(by_scale.items(), reverse=True)
        for decays, parameters in of_scale.items()
        if parameters
    ]
