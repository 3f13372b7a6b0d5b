"""Layer-wise trust ratios of LARS on partitioned gradients, for ZeRO stages 1 and 2."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from m3i_scale.engine.engine_state import place_of, trained


def scale_by_trust_ratio(engine: Any, coefficient: float) -> None:
    """Make every optimizer step multiply the gradient of each matrix by its trust ratio, on all ranks.

    The ratio is coefficient · ‖weights‖ / ‖gradient‖, or 1 if one of the norms is 0 (You et al., 2017; LARS of MoCo v3
    and MAE, without weight decay). Norms are those of complete matrices: squares of the parts are summed over ranks, in
    one all-reduce per call of the inner optimizer. Vectors, such as biases, are not scaled.
    """
    matrices = [parameter for _, parameter in trained(engine.module) if parameter.ndim > 1]

    @torch.no_grad()
    def scale(inner: torch.optim.Optimizer, *_: Any) -> None:
        # DeepSpeed may step the inner optimizer group by group, in the same order on all ranks.
        stepped = {id(flat) for group in inner.param_groups for flat in group["params"] if flat.grad is not None}
        parts: dict[int, tuple[Tensor, Tensor]] = {}
        for number, parameter in enumerate(matrices):
            place = place_of(engine.optimizer, parameter)
            if place is not None and id(place[0]) in stepped:
                flat, offset, _, numel = place
                parts[number] = flat.view(-1).narrow(0, offset, numel), flat.grad.view(-1).narrow(0, offset, numel)
        squares_2M = torch.zeros(2, len(matrices), device=inner.param_groups[0]["params"][0].device)
        for number, part in parts.items():
            squares_2M[:, number] = torch.stack([torch.linalg.vector_norm(one, dtype=torch.float32) for one in part])
        squares_2M.square_()
        dist.all_reduce(squares_2M)
        weights_M, gradients_M = squares_2M.sqrt()
        defined_M = (weights_M > 0) & (gradients_M > 0)
        ratios_M = torch.where(defined_M, coefficient * weights_M / gradients_M, 1.0)
        for number, (_, gradient) in parts.items():
            gradient.mul_(ratios_M[number].to(gradient.dtype))

    engine.optimizer.optimizer.register_step_pre_hook(scale)
