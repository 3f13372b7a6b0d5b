"""Sort parameters into the groups of the optimizer: with weight decay and without, by learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


def is_matrix(shape: torch.Size) -> bool:
    """Return whether a parameter of that (full) shape has weight decay.

    A (1, 1, D) token or a (1, N, D) position table is a matrix by rank and a set of vectors by use.
    """
    return len(shape) > 1 and shape[0] > 1


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    lr_scales: Mapping[str, float] | None = None,
    shape_of: Callable[[nn.Parameter], torch.Size] = lambda parameter: parameter.shape,
) -> list[dict[str, Any]]:
    """Return the groups that an optimizer is built with: matrices with weight decay; biases, norms and other vectors
    without.

    Args:
        module: the whole module; parameters without gradient are left out.
        weight_decay: of matrices.
        lr_scales: what the learning rate is multiplied by, by name of a parameter, where that is not 1.
        shape_of: gives the full shape of a parameter, which ZeRO-3 has a part of alone.

    Returns:
        By group `params`, `weight_decay`, and `lr_scale`, which whoever sets its `lr` multiplies that by.
    """
    by_scale: dict[float, dict[bool, list[nn.Parameter]]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            of_scale = by_scale.setdefault((lr_scales or {}).get(name, 1.0), {True: [], False: []})
            of_scale[is_matrix(shape_of(parameter))].append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale}
        for scale, of_scale in sorted(by_scale.items(), reverse=True)
        for decays, parameters in of_scale.items()
        if parameters
    ]
