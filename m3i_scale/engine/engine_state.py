"""This rank's shards of an engine's master weights and moments, at any ZeRO stage.

A piece is a range of a flattened parameter. Stage 3 partitions every parameter over the ranks; stages 1 and 2 partition
the concatenated parameters. Both give ranges, so each stage can read the checkpoints of the others. Only this file and
`partition.py` use internals of DeepSpeed's optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m3i_scale.engine.partition import full_shape, is_partitioned, order_gathers

MASTER, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


@dataclass(frozen=True)
class Piece:
    """This rank's shard of a flattened parameter."""

    name: str
    start: int
    """First element of the range."""
    numel: int
    tensors: dict[str, Tensor]
    """Live flat views by kind: the master weights, and the moments once the optimizer has taken a step."""


def pieces(engine: Any) -> Iterator[Piece]:
    """Yield this rank's shards of all trained parameters without padding, in module order."""
    states = engine.optimizer.optimizer.state
    for name, parameter in trained(engine.module):
        place = place_of(engine.optimizer, parameter)
        if place is None:
            continue
        flat, offset, start, numel = place
        moments = states.get(flat, {})
        held = {MASTER: flat.data, **{kind: moments[kind].data for kind in MOMENTS if kind in moments}}
        views = {kind: tensor.view(-1).narrow(0, offset, numel) for kind, tensor in held.items()}
        yield Piece(name, start, numel, views)


def trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of every trained parameter."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def moment_kinds(engine: Any) -> list[str]:
    """Return the kinds of moments in the optimizer, the same on all ranks; empty before its first step."""
    states = engine.optimizer.optimizer.state
    flats = _flat_tensors(engine.optimizer)
    return [kind for kind in MOMENTS if any(kind in states.get(flat, {}) for flat in flats)]


@dataclass(frozen=True)
class MasterGroup:
    """A flat group of concatenated parameters, and this rank's part of its master weights."""

    master: Tensor
    """Flat tensor: the full group, or this rank's part of it."""
    first: int
    """First element of the part within the group."""
    numel: int
    """Elements of the group, padding included."""
    offsets: dict[str, int]
    """By parameter name. Under ZeRO-3 the group contains this rank's shards."""


def master_groups(engine: Any) -> list[MasterGroup]:
    """Return the flat groups of the optimizer. Under stages 1 and 2, fp32 parameters are the master weights themselves,
    and every rank has all of them."""
    optimizer, named = engine.optimizer, dict(trained(engine.module))
    groups: list[MasterGroup] = []
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        places = {name: optimizer.grad_position[optimizer.get_param_id(p)] for name, p in named.items()}
        for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            offsets = {name: offset for name, (group, offset, _) in places.items() if group == number}
            groups.append(MasterGroup(flat.detach(), 0, flat.numel(), offsets))
        return groups
    fulls = getattr(optimizer, "bf16_groups_flat", None) or getattr(optimizer, "bit16_groups_flat", [])
    for number, full in enumerate(fulls):
        offsets = {
            name: parameter.storage_offset() - full.storage_offset()
            for name, parameter in named.items()
            if parameter.untyped_storage().data_ptr() == full.untyped_storage().data_ptr()
        }
        master = full if full.dtype == torch.float32 else _flat_tensors(optimizer)[number]
        first = 0 if master is full else dist.get_rank() * master.numel()
        groups.append(MasterGroup(master.detach(), first, full.numel(), offsets))
    return groups


def optimizer_steps(engine: Any) -> int:
    """Return the number of steps that the optimizer has taken. Adam's bias correction depends on it."""
    for moments in engine.optimizer.optimizer.state.values():
        if "step" in moments:
            return int(moments["step"])
    return 0


@torch.no_grad()
def make_moments(engine: Any, steps: int) -> None:
    """Create the optimizer's missing moments and set its step count. With 0 steps existing moments are set to zero."""
    optimizer = engine.optimizer.optimizer
    counts_in_tensors = isinstance(optimizer, torch.optim.AdamW)
    # As in torch's `Optimizer.load_state_dict`: fused kernels need the count on the device. All others would have to
    # read it back from the device. Between two steps of ZeRO-3, groups have no parameters.
    counts_on_device = bool(optimizer.defaults.get("fused"))
    for flat in _flat_tensors(engine.optimizer):
        moments = optimizer.state[flat]
        # DeepSpeedCPUAdam may use fp32 moments with bf16 master weights.
        dtype = torch.float32 if getattr(optimizer, "fp32_optimizer_states", False) else flat.dtype
        for kind in MOMENTS if steps else ():
            if kind not in moments:
                moments[kind] = torch.zeros_like(flat.data, dtype=dtype)
        for kind in () if steps else moments.keys() & MOMENTS:
            moments[kind].zero_()
        if moments:
            place = flat.device if counts_on_device else None
            moments["step"] = torch.tensor(float(steps), device=place) if counts_in_tensors else steps


@torch.no_grad()
def publish(engine: Any) -> None:
    """Update the model weights from the master weights, on all ranks. Collective."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.update_lp_params()
        for group in range(len(getattr(optimizer, "round_robin_bit16_groups", []))):
            optimizer._update_model_bit16_weights(group)
        return
    optimizer.checkpoint_event_prologue()
    for number, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        optimizer.fp16_partitioned_groups_flat[number].data.copy_(master.data)
        optimizer._unflatten_partitioned_parameters(number)
    optimizer.checkpoint_event_epilogue()
    order_gathers(engine)


def counters(engine: Any) -> dict[str, Any]:
    """Return step counts and loss scale as JSON: the non-tensor engine state that a resume needs."""
    counts: dict[str, Any] = {name: int(getattr(engine, name)) for name in _COUNTERS}
    counts["optimizer_steps"] = optimizer_steps(engine)
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if engine.fp16_enabled():
        counts["loss_scaler"] = {name: getattr(scaler, name) for name in _SCALER_STATE if hasattr(scaler, name)}
    return counts


def count_micro_batches(engine: Any) -> None:
    """Reset the engine's micro-batch counter to the start of a step, as if all steps had the current accumulation
    steps. DeepSpeed uses it to detect the last micro-batch of a step."""
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()


def restore_counters(engine: Any, saved: dict[str, Any]) -> None:
    """Restore the result of `counters`. A run that resumes in fp16 from another precision starts with the initial scale
    of its settings."""
    for name in _COUNTERS:
        setattr(engine, name, saved[name])
    count_micro_batches(engine)
    if engine.fp16_enabled():
        scaler = engine.optimizer.loss_scaler
        for name, value in saved.get("loss_scaler", {}).items():
            # a static scale is a setting; only a dynamic one is state
            if scaler.dynamic and hasattr(scaler, name):
                setattr(scaler, name, value)
        if scaler.dynamic:
            # The settings may have changed since the save: a scale below the minimum would rise at the next overflow.
            # Hysteresis above its limit would delay the next halving for longer than configured.
            scaler.cur_scale = max(scaler.cur_scale, scaler.min_scale)
            scaler.cur_hysteresis = min(scaler.cur_hysteresis, scaler.delayed_shift)


def _flat_tensors(optimizer: Any) -> list[Tensor]:
    for name in ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups"):
        if hasattr(optimizer, name):
            flats: list[Tensor] = list(getattr(optimizer, name))
            return flats
    raise TypeError(f"no master weights are known in {type(optimizer).__name__}")


def place_of(optimizer: Any, parameter: nn.Parameter) -> tuple[Tensor, int, int, int] | None:
    """Return (flat tensor of the optimizer, offset in it, first element of the parameter, elements) of a piece; None if
    this rank has no piece of the parameter."""
    if is_partitioned(parameter):
        group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = numel * optimizer._get_param_partition_rank(parameter)
        held = max(0, min(numel, full_shape(parameter).numel() - start))
        return (optimizer.fp32_partitioned_groups_flat[group], offset, start, held) if held else None
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None or not mapping.hp_fragment_address.numel:
        return None
    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
    return _flat_tensors(optimizer)[mapping.param_group_index], high.start, low.start, high.numel


def scale_by_trust_ratio(engine: Any, coefficient: float) -> None:
    """Make every optimizer step multiply the gradient of each matrix by its trust ratio, on all ranks.

    The ratio is coefficient · ‖weights‖ / ‖gradient‖, or 1 if one of the norms is 0 (You et al., 2017; LARS of MoCo v3
    and MAE, without weight decay). Both norms are of the complete matrix: the squares of its parts are summed over
    ranks, in one all-reduce per call of the inner optimizer. Vectors, such as biases, are not scaled.

    Raises:
        ValueError: parameters are partitioned (ZeRO-3).
    """
    matrices: list[nn.Parameter] = [parameter for _, parameter in trained(engine.module) if parameter.ndim > 1]
    if any(is_partitioned(parameter) for _, parameter in trained(engine.module)):
        raise ValueError("trust ratios need whole parameters: ZeRO stage 1 or 2")

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
