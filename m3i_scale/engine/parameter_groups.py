"""Settings of the optimizer by parameter: weight decay, learning rate multipliers, and trust ratios."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m3i_scale.engine.engine_state import place_of, trained


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


def scale_by_trust_ratio(engine: Any, coefficient: float) -> None:
    """Make every optimizer step multiply the gradient of each matrix by its trust ratio, on all ranks.

    The ratio is coefficient · ‖weights‖ / ‖gradient‖, or 1 if one of the norms is 0 (You et al., 2017; LARS of MoCo v3
    and MAE, without weight decay). Norms are those of complete matrices: squares of the parts are summed over ranks, in
    one all-reduce per call of the inner optimizer. Vectors, such as biases, are not scaled.
    """
    matrices: list[nn.Parameter] = [parameter for _, parameter in trained(engine.module) if parameter.ndim > 1]

    @torch.no_grad()
    def scale(inner: torch.optim.Optimizer, *arguments: Any) -> None:
        # DeepSpeed may step the inner optimizer group by group, in the same order on all ranks.
        stepped = {id(flat) for group in inner.param_groups for flat in group["params"] if flat.grad is not None}
        parts: dict[int, tuple[Tensor, Tensor]] = {}
        for number, matrix in enumerate(matrices):
            place = place_of(engine.optimizer, matrix)
            if place is not None and id(place[0]) in stepped:
                flat, offset, _, numel = place
                weights, gradient = (one.view(-1).narrow(0, offset, numel) for one in (flat, cast(Tensor, flat.grad)))
                parts[number] = weights, gradient
        squares_2M = torch.zeros(2, len(matrices), device=inner.param_groups[0]["params"][0].device)
        for number, both in parts.items():
            squares_2M[:, number] = torch.stack([torch.linalg.vector_norm(one, dtype=torch.float32) for one in both])
        squares_2M.square_()
        dist.all_reduce(squares_2M)
        weights_M, gradients_M = squares_2M.sqrt()
        defined_M = (weights_M > 0) & (gradients_M > 0)
        ratios_M = torch.where(defined_M, coefficient * weights_M / gradients_M, 1.0)
        for number, (_, part) in parts.items():
            part.mul_(ratios_M[number].to(part.dtype))

    engine.optimizer.optimizer.register_step_pre_hook(scale)
