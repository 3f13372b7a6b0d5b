"""Access to DeepSpeed's partitioned parameters (`ds_tensor`, persistence, gathering), only from this file.

Under ZeRO-3 a parameter is an empty tensor with a shard (`ds_tensor`) on every rank. All code that reads or writes
weights outside a forward pass uses this module.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import stage3
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from m3i_scale.backbones.build import Initialize, draw_first_values
from m3i_scale.engine.device import compute_dtype
from m3i_scale.errors import ConfigError


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Return whether the parameter is partitioned by ZeRO-3."""
    return hasattr(parameter, "ds_tensor")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the unpartitioned shape of the parameter."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return torch.Size(shape)


@contextlib.contextmanager
def gathered(parameters: list[nn.Parameter], *, write: bool = False) -> Iterator[None]:
    """Gather the parameters at full shape. With `write`, the values of rank 0 are broadcast at the end."""
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None, enabled=bool(partitioned)):
        yield


def construct(build: Callable[[], nn.Module], ds_config: dict[str, Any]) -> nn.Module:
    """Call `build` and create its parameters on this rank's device in the dtype of the run, partitioned under ZeRO-3.
    The model is never in host memory (9 GB in fp32 for `m3i_vit_g14`), and never on the device in fp32."""
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    if stage != 3:
        dtype = compute_dtype(ds_config)

        def cast(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            if parameter is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)

        hook = register_module_parameter_registration_hook(cast)
        try:
            with torch.device(get_accelerator().current_device_name()):
                return build()
        finally:
            hook.remove()
    # No explicit dtype: DeepSpeed ignores float32 here and uses bf16 or fp16.
    with deepspeed.zero.Init(config_dict_or_path=ds_config):
        return build()


def initialize_sharded(module: nn.Module, initialize: Initialize, *, seed: int, skip: tuple[str, ...] = ()) -> None:
    """Initialize all parameters except submodules with a prefix in `skip`, gathering one module at a time under ZeRO-3.

    The values come from `draw_first_values`. They do not depend on the device, the number of ranks or the ZeRO stage.
    """
    draw_first_values(module, initialize, seed=seed, skip=skip, whole=partial(gathered, write=True))


def local_range(parameter: nn.Parameter) -> tuple[int, int]:
    """Return (first element, elements) of the shard that this rank saves of a parameter without optimizer state: under
    ZeRO-3 its shard without padding, otherwise an even share of the replicated values."""
    numel = full_shape(parameter).numel()
    if is_partitioned(parameter):
        share = local_values(parameter).numel()
        rank = dist.get_rank(group=getattr(parameter, "ds_process_group", None))
    else:
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        share = math.ceil(numel / world)
    start = min(share * rank, numel)
    return start, min(share, numel - start)


def local_values(parameter: Any) -> Tensor:
    """Return the live local values of a parameter: its shard with padding, or the full parameter."""
    values: Tensor = parameter.ds_tensor if is_partitioned(parameter) else parameter
    return values.detach()


def local_shard(parameter: nn.Parameter) -> Tensor:
    """Return the live values of `local_range`, flat."""
    start, numel = local_range(parameter)
    begin = 0 if is_partitioned(parameter) else start
    return local_values(parameter).view(-1)[begin : begin + numel]


def load_frozen(parameter: nn.Parameter, read: Callable[[int, Tensor], None]) -> None:
    """Fill a parameter that has no optimizer state: `read(first element, out)` fills a flat tensor. Under ZeRO-3
    gathered copies are stale until all are partitioned again."""
    forget_copy(parameter)
    values = local_values(parameter).view(-1)
    start, numel = local_range(parameter) if is_partitioned(parameter) else (0, values.numel())
    read(start, values[:numel])


def forget_copy(parameter: Any) -> None:
    """Drop the secondary copy within a group of zero_hpz_partition_size ranks; the next gather recreates it."""
    if getattr(parameter, "ds_secondary_tensor", None) is not None:
        parameter.ds_secondary_tensor = None


def lay_values(parameter: Any, flat: Tensor) -> None:
    """Make `flat` the storage of a parameter's local values, without copying the previous values."""
    if is_partitioned(parameter):
        parameter.ds_tensor.data = flat
    else:
        parameter.data = flat.view(parameter.shape)


def keep_partitioned(engine: Any, parameters: Iterable[Any]) -> None:
    """Remove parameters from ZeRO-3's persistent set, which keeps small parameters gathered: a write to the shard would
    silently leave the gathered copy stale."""
    partitioned = {id(parameter): parameter for parameter in parameters if is_partitioned(parameter)}
    if not partitioned:
        return
    persistent = engine.optimizer.persistent_parameters
    persistent[:] = [parameter for parameter in persistent if id(parameter) not in partitioned]
    for parameter in partitioned.values():
        parameter.ds_persist = False
    first, *_ = partitioned.values()
    first.partition(list(partitioned.values()))


@contextlib.contextmanager
def gradients_by_parameter() -> Iterator[None]:
    """Make an engine that is started inside reduce every gradient when it is complete, also in leaf modules.

    DeepSpeed reduces the gradients of a leaf at the end of a call's backward pass (`stage3.py`,
    `reduce_leaf_module_grads`). If the layer is called twice, as a decoder is by two targets, they are not complete
    then and would enter a bucket twice.
    """
    with mock.patch.object(stage3, "z3_leaf_parameter", return_value=False):
        yield


_GATHER_STREAM = "_PartitionedParameterCoordinator__allgather_stream"


def gather_stream(engine: Any) -> Any:
    """Return the stream of ZeRO-3's gathers; None under other stages and on devices without streams."""
    if engine.zero_optimization_stage() != 3:
        return None
    coordinator = engine.optimizer.parameter_offload.param_coordinator
    if not hasattr(coordinator, _GATHER_STREAM):
        raise ConfigError(
            f"DeepSpeed {deepspeed.__version__} gathers partitioned parameters on an unknown stream",
            why="they could be gathered before they are written",
            fix="install the version of requirements.txt, or use ZeRO stage 1 or 2",
        )
    return getattr(coordinator, _GATHER_STREAM)


def order_gathers(engine: Any) -> None:
    """Make ZeRO-3 gather shards only after all work queued on the current stream, which may write them.

    DeepSpeed copies shards on a separate stream that waits for no other, neither for our writes nor for its optimizer.
    Other stages gather on the current stream. The CPU does not wait here.
    """
    stream = gather_stream(engine)
    if stream is not None:
        stream.wait_stream(get_accelerator().current_stream())


def end_recorded_step(engine: Any) -> None:
    """End ZeRO-3's record of the last step, so that later module calls are not attributed to it. ZeRO-3 records the
    module order to prefetch, and ends the record only when the root module is called."""
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.parameter_offload.get_param_coordinator().reset_step()


_KEPT = "kept_in_checkpoints"


def keep_in_checkpoints(module: nn.Module) -> None:
    """Mark the frozen parameters of a module to be saved in checkpoints, in their compute dtype."""
    for parameter in module.parameters():
        setattr(parameter, _KEPT, True)


def saved_frozen(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the frozen parameters that are saved in checkpoints, by name."""
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if getattr(parameter, _KEPT, False) and not parameter.requires_grad
    }
