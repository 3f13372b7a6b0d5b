"""Gradients of a step: add them up in fp32, reduce them, compute their norm, and clip them, with few kernels and
without host synchronization.

DeepSpeed launches kernels per parameter for each of these, and its helpers for clipping (`deepspeed/runtime/utils.py`)
synchronize in every step: one copies a constant from pageable memory, the other reads back whether the norm is above
the bound. The replacements below compute the same values on the device.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from deepspeed import comm as dist
from deepspeed.runtime import bf16_optimizer, utils
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero import stage3, stage_1_and_2
from torch import Tensor


@dataclass
class _Bucket:
    """Consecutive parameters of an optimizer group. Their gradients are reduced in one all-reduce."""

    group: int
    indices: range
    """Positions of the parameters in the group."""
    sums: Tensor
    """Their part of the group's flat fp32 sums."""
    missing: set[int]
    """Positions without a gradient in the current backward pass."""
    work: Any = None
    """The reduction in progress."""


class ForeachBF16Optimizer(BF16_Optimizer):  # type: ignore[misc]  # DeepSpeed has no types
    """DeepSpeed's optimizer of ZeRO-1 in bf16, with one call for the gradients of all parameters instead of one each,
    and optionally with reductions during the backward pass.

    The fp32 sums of a step are those of DeepSpeed, except for the sign of zeros. They are not cleared after a step: the
    next one overwrites them.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        pairs = zip(self.bf16_groups, self.fp32_groups_gradients, strict=True)
        self._sums = [[flat.view_as(p) for p, flat in zip(*pair, strict=True)] for pair in pairs]
        self._is_first = True
        self.reduce_bucket_size: int | None = None
        self._buckets: list[_Bucket] = []
        self._launched = 0

    def reduce_in_backward(self, bucket_size: int) -> None:
        """Reduce gradients during the last backward pass of a step instead of after it. Call it once, on every rank.

        A bucket has up to `bucket_size` elements, or one larger parameter. When all its gradients are computed, they
        are added to the sums and reduced in place; DeepSpeed copies all sums first. All ranks reduce the buckets in the
        same order, that of the last parameters first. Each bucket waits for the previous ones, so a parameter without
        a gradient delays those after it. Remaining buckets are reduced after the backward pass. The process group is a
        new one: on another rank, other collectives of the backward pass may come between other buckets.
        """
        self.reduce_bucket_size = bucket_size
        if dist.get_world_size(self.dp_process_group) == 1:
            return
        self._reduction_group = torch.distributed.new_group()
        places = {id(p): place for place, p in enumerate(self.param_names)}  # usually as in the forward pass
        for group, parameters in enumerate(self.bf16_groups):
            stop, numel = len(parameters), 0
            for index in reversed(range(len(parameters))):
                if numel and numel + parameters[index].numel() > bucket_size:
                    self._buckets.append(self._bucket(group, range(index + 1, stop)))
                    stop, numel = index + 1, 0
                numel += parameters[index].numel()
            self._buckets.append(self._bucket(group, range(stop)))
        self._buckets.sort(key=lambda bucket: -places[id(self.bf16_groups[bucket.group][bucket.indices[0]])])
        # NCCL allocates its buffers in the first collective: now, not while the backward pass holds its activations.
        largest = max((bucket.sums for bucket in self._buckets), key=torch.numel)
        dist.all_reduce(largest, group=self._reduction_group)  # the first micro-batch overwrites it

    def _bucket(self, group: int, indices: range) -> _Bucket:
        """Return a bucket, and let the gradients of its parameters start its reduction."""
        first, last = (self.fp32_groups_gradients[group][index] for index in (indices[0], indices[-1]))
        start, stop = first.storage_offset(), last.storage_offset() + last.numel()
        bucket = _Bucket(group, indices, self.fp32_groups_gradients_flat[group][start:stop], set(indices))
        for index in indices:
            hook = functools.partial(self._on_gradient, bucket, index)
            self._grad_acc_hooks.append(self.bf16_groups[group][index].register_post_accumulate_grad_hook(hook))
        return bucket

    def _on_gradient(self, bucket: _Bucket, index: int, parameter: Tensor) -> None:
        """In the last backward pass of a step, reduce the next buckets if their gradients are complete."""
        if not self.is_gradient_accumulation_boundary():
            return
        if bucket.work is not None:
            name = self.param_names[parameter]
            raise RuntimeError(f"'{name}' must get one gradient per backward pass, got another after its reduction")
        bucket.missing.discard(index)
        while self._launched < len(self._buckets) and not self._buckets[self._launched].missing:
            self._reduce_next()

    @torch.no_grad()
    def _reduce_next(self) -> None:
        """Add the gradients of the next bucket to its sums, and start the reduction of the sums."""
        bucket = self._buckets[self._launched]
        self._add([(bucket.group, bucket.indices)])
        bucket.work = dist.all_reduce(bucket.sums, group=self._reduction_group, async_op=True)
        self._launched += 1

    @torch.no_grad()
    def get_grads_for_reduction(self) -> Any:
        """Return the gradients that DeepSpeed has to reduce. Wait for those that are being reduced, and average them:
        on GPUs the stream waits, not the host."""
        if self.reduce_bucket_size is None:
            return super().get_grads_for_reduction()
        for bucket in self._buckets:
            bucket.work.wait()
            bucket.work = None
            bucket.missing.update(bucket.indices)
        if self._buckets:
            sums = [bucket.sums for bucket in self._buckets]
            torch._foreach_mul_(sums, 1.0 / dist.get_world_size(self.dp_process_group))
        self._launched = 0
        return [], {}

    def backward_prologue(self) -> None:
        """Free gradients that an interrupted backward pass left."""
        self.clear_lp_grads(set_to_none=True)

    @torch.no_grad()
    def update_hp_grads(self, clear_lp_grads: bool = False) -> None:
        """Add the bf16 gradients of a micro-batch to the fp32 sums, and free them. In the last one of a step, start the
        reductions that its backward pass has not started."""
        if self._buckets and self.is_gradient_accumulation_boundary():
            while self._launched < len(self._buckets):
                self._reduce_next()
        else:
            self._add([(group, range(len(parameters))) for group, parameters in enumerate(self.bf16_groups)])
        self._is_first = False

    def _add(self, spans: Iterable[tuple[int, range]]) -> None:
        """Add the bf16 gradients of parameters, given as groups and indices in the group, to the fp32 sums.

        The first micro-batch of a step copies them and zeroes the other sums. On GPUs a copy between dtypes launches
        few kernels for all tensors; an addition launches one per tensor (`can_use_fast_route` in torch).
        """
        sums: list[Tensor] = []
        gradients: list[Tensor] = []
        unused: list[Tensor] = []
        for group, indices in spans:
            parameters, totals, has = self.bf16_groups[group], self._sums[group], self.fp32_groups_has_gradients[group]
            for index in indices:
                if parameters[index].grad is None:
                    unused.append(totals[index])
                    continue
                sums.append(totals[index])
                gradients.append(parameters[index].grad)
                parameters[index].grad, has[index] = None, True
        if self._is_first and unused:
            torch._foreach_zero_(unused)
        if gradients:
            (torch._foreach_copy_ if self._is_first else torch._foreach_add_)(sums, gradients)

    def clear_hp_grads(self) -> None:
        """Let the next micro-batch overwrite the sums. DeepSpeed calls this after a step."""
        self.fp32_groups_has_gradients = [[False] * len(group) for group in self.bf16_groups]
        self._is_first = True

    def get_grads_for_norm(self, for_clipping: bool = False) -> Any:
        """Return the flat sums of all groups to clip; for the norm, the sums of parameters that have a gradient.

        On several ranks, return all sums for the norm, because a parameter may have a gradient on another rank only.
        DeepSpeed leaves it out; then ranks clip by different norms, and may differ in skipping a step. The zeros of a
        parameter without any gradient may change the last bit of the norm.
        """
        if for_clipping:
            return self.fp32_groups_gradients_flat
        if dist.get_world_size(self.dp_process_group) > 1:
            return [total for sums in self.fp32_groups_gradients for total in sums], {}
        pairs = zip(self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True)
        return [total for sums, has in pairs for total, is_used in zip(sums, has, strict=True) if is_used], {}


def mark_invalid_norm(norm: Tensor, device: Any = None, val: float = -1.0) -> None:
    """Replace a NaN or infinite norm by `val` in place, as DeepSpeed's `mask_nan_or_inf_with_val_inplace`."""
    norm.masked_fill_(~norm.isfinite(), val)


def norm_of_all(input_tensors: Iterable[Tensor], norm_type: float = 2, mpu: Any = None) -> Tensor:
    """Return the L2 norm of all tensors together in fp32, as DeepSpeed's `get_global_norm_of_tensors` without model
    parallelism; -1 if it is not finite.

    Each tensor has its norm. That of a flat group would sum in another order, and differ in the last bits.
    """
    norms = torch._foreach_norm(list(input_tensors), norm_type, dtype=torch.float32)
    norm = torch.stack(norms).pow(norm_type).sum().pow(1.0 / norm_type)
    mark_invalid_norm(norm)
    return norm


def clip_by_norm(
    input_tensors: Iterable[Tensor],
    max_norm: float = 1.0,
    global_norm: Any = None,
    mpu: Any = None,
    eps: float = 1e-6,
) -> Any:
    """Scale tensors in place to a global norm of at most `max_norm`, as DeepSpeed's `clip_tensors_by_global_norm`;
    return the norm before clipping. Below the bound DeepSpeed skips the multiplication; this multiplies by 1, which
    changes no bit."""
    tensors = [tensor.detach() for tensor in input_tensors]
    if global_norm is None:
        global_norm = norm_of_all(tensors)
    factor = torch.as_tensor(max_norm / (global_norm + eps))
    torch._foreach_mul_(tensors, factor.masked_fill(~(factor < 1), 1.0))
    return global_norm


_REPLACEMENTS = {
    "mask_nan_or_inf_with_val_inplace": mark_invalid_norm,
    "clip_tensors_by_global_norm": clip_by_norm,
    "get_global_norm_of_tensors": norm_of_all,
}


@contextlib.contextmanager
def clipping_on_device() -> Iterator[None]:
    """Make DeepSpeed optimizers that step inside use the replacements. A helper that the DeepSpeed version lacks is not
    replaced."""
    with contextlib.ExitStack() as stack:
        for module in (utils, bf16_optimizer, stage_1_and_2, stage3):
            for name, replacement in _REPLACEMENTS.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, replacement))
        yield
