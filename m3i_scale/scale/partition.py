"""This is the one file that touches DeepSpeed's partitioned parameters (`ds_tensor`, persistence, gathering).

Under ZeRO-3 a parameter is an empty tensor with a shard (`ds_tensor`) on every rank. Anything that reads or writes
weights outside a forward pass goes through here.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param
from torch import Tensor, nn
from transformers import PreTrainedModel

from m3i_scale.errors import ConfigError
from m3i_scale.scale.split_float import join, split


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Return whether ZeRO-3 owns the parameter."""
    return hasattr(parameter, "ds_tensor")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the whole parameter, partitioned or not."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return torch.Size(shape)


def full_numel(module: nn.Module, *, trainable_only: bool = False) -> int:
    """Return the number of elements of all parameters of the module, whatever is partitioned."""
    wanted = [p for p in module.parameters() if p.requires_grad or not trainable_only]
    return sum(full_shape(parameter).numel() for parameter in wanted)


@contextlib.contextmanager
def whole(parameters: list[nn.Parameter], *, write: bool = False) -> Iterator[None]:
    """Gather the parameters at full shape; with `write`, rank 0's values become everyone's at the end."""
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None, enabled=bool(partitioned)):
        yield


def construct(build: Callable[[], nn.Module], ds_config: dict[str, Any]) -> nn.Module:
    """Call `build` with every parameter partitioned as soon as its module exists, where the configuration is ZeRO-3."""
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    if stage != 3:
        return build()
    # The type is left to the configuration: DeepSpeed ignores an explicit float32 here and takes bf16 or fp16.
    with deepspeed.zero.Init(config_dict_or_path=ds_config):
        return build()


def initialize_sharded(
    module: nn.Module, initialize: Callable[[nn.Module, nn.Module], None], *, seed: int, skip: tuple[str, ...] = ()
) -> None:
    """Give all parameters their first values, one module's parameters at a time: no rank ever holds the whole model.

    The values are a function of (seed, name of the module), so they do not depend on ranks or ZeRO stage, nor on the
    type of the parameters but for its rounding.

    Args:
        module: the model, partitioned or not.
        initialize: `(owner, submodule)`; the owner is the nearest `transformers` model above, else the submodule.
        seed: of the run.
        skip: prefixes of submodules that get their values elsewhere.
    """
    owners = [(name, child) for name, child in module.named_modules() if isinstance(child, PreTrainedModel)]
    for name, child in module.named_modules():
        parameters = list(child.parameters(recurse=False))
        if not parameters or name.startswith(skip):
            continue
        above = [owner for prefix, owner in owners if name == prefix or name.startswith(f"{prefix}.")]
        with whole(parameters, write=True), torch.random.fork_rng(), torch.no_grad():
            # One number of 32 bits: torch's generator on the host drops the upper half of a seed.
            torch.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            with _drawn_in_fp32(parameters):
                initialize(above[-1] if above else child, child)


@contextlib.contextmanager
def _drawn_in_fp32(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Have the parameters in fp32 inside, and round them to their own type at the end.

    A uniform number that rounds to the upper bound becomes the lower one in torch: in bf16 one weight of a thousand
    would have the wrong sign, at its largest.
    """
    originals = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    yield
    for parameter, values in zip(parameters, originals, strict=True):
        parameter.data = values.copy_(parameter.data)


def master_shard(parameter: nn.Parameter) -> Tensor:
    """Return this rank's part of the fp32 master weights: the shard under ZeRO-3, the whole parameter otherwise.

    Raises:
        RuntimeError: DeepSpeed holds no master copy of a low-precision parameter.
    """
    if is_partitioned(parameter):
        shard: Tensor = safe_get_local_fp32_param(parameter)
        return shard.float()
    if parameter.dtype == torch.float32:
        return parameter.detach()  # every rank has it whole already: no collective
    full = safe_get_full_fp32_param(parameter) if hasattr(parameter, "_hp_mapping") else None
    if full is not None:
        return torch.as_tensor(full).float()
    raise RuntimeError(f"no fp32 master weights behind a {parameter.dtype} parameter of shape {parameter.shape}")


_KEPT = "kept_in_checkpoints"


def keep_in_checkpoints(module: nn.Module) -> None:
    """Have checkpoints hold the parameters of a module that does not learn, in the type that is computed in."""
    for parameter in module.parameters():
        setattr(parameter, _KEPT, True)


def kept_frozen(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return what does not learn and is in checkpoints all the same, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if getattr(parameter, _KEPT, False)}


def own_range(parameter: nn.Parameter) -> tuple[int, int]:
    """Return (first element, elements) of what this rank has to save of a parameter that no optimizer has: its shard
    without padding under ZeRO-3; otherwise an even share of what all ranks hold alike."""
    numel = full_shape(parameter).numel()
    if is_partitioned(parameter):
        share = own_values(parameter).numel()
        rank = dist.get_rank(group=getattr(parameter, "ds_process_group", None))
    else:
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        share = math.ceil(numel / world)
    start = min(share * rank, numel)
    return start, min(share, numel - start)


def own_values(parameter: Any) -> Tensor:
    """Return the live values that this rank holds of a parameter: its shard, padding included, or all of it."""
    values: Tensor = parameter.ds_tensor if is_partitioned(parameter) else parameter
    return values.detach()


def own_piece(parameter: nn.Parameter) -> Tensor:
    """Return the live values of `own_range`, flat."""
    start, numel = own_range(parameter)
    begin = 0 if is_partitioned(parameter) else start
    return own_values(parameter).view(-1)[begin : begin + numel]


def load_frozen(parameter: nn.Parameter, read: Callable[[int, Tensor], None]) -> None:
    """Fill a parameter that no optimizer has. Under ZeRO-3 gathered copies are stale until all are partitioned again.

    Args:
        parameter: to be filled.
        read: `(first element, out)` fills a flat tensor with that range of the values.
    """
    _forget_copy(parameter)
    values = own_values(parameter).view(-1)
    start, numel = own_range(parameter) if is_partitioned(parameter) else (0, values.numel())
    read(start, values[:numel])


def _forget_copy(parameter: Any) -> None:
    """Forget the copy within the group of zero_hpz_partition_size ranks, which the next gather makes anew."""
    if getattr(parameter, "ds_secondary_tensor", None) is not None:
        parameter.ds_secondary_tensor = None


def refuse_unwritable(engine: Any, parameters: dict[str, nn.Parameter], what: str) -> None:
    """Refuse an engine configuration under which the shards of what does not learn cannot be written in place.

    Args:
        engine: the DeepSpeed engine.
        parameters: that are written, by name.
        what: they are, in words.

    Raises:
        ConfigError: names the setting.
    """
    if engine._config.zero_config.zero_quantized_nontrainable_weights and parameters:
        raise ConfigError(
            f"'zero_optimization.zero_quantized_nontrainable_weights' cannot hold {what}",
            why="it keeps what is not trained in 8 bits, and other values are written there",
            fix="remove it, or take zero_quantized_weights, which quantises what is sent",
        )
    for name, parameter in parameters.items():
        if is_partitioned(parameter) and own_values(parameter).numel() == 0:
            raise ConfigError(
                f"the shard of '{name}' is not in memory", fix="offload_param to cpu or none, not to nvme"
            )


class ShardedMomentum:
    """Keeps the exponential moving average (EMA) of the online weights, shard by shard, without a gather.

    The average is fp32, which is more than the target computes in: averaging a bf16 copy would lose the update, since
    1 − m is below half a unit in the last place. It is stored beside the target's compute copy: nothing in fp32 (the
    copy is the average), the lower 16 bits in bf16 (the copy has the upper ones), a whole fp32 shard in fp16.

    Args:
        engine: the DeepSpeed engine that holds online and target parameters.
        pairs: (online, target) parameter names.

    Raises:
        ConfigError: an engine configuration under which the target's shards cannot be written in place.
    """

    def __init__(self, engine: Any, pairs: list[tuple[str, str]]) -> None:
        named = dict(engine.module.named_parameters())
        self._follows = {target: online for online, target in pairs}
        self._online = {target: named[online] for online, target in pairs}
        self._target = {target: named[target] for _, target in pairs}
        refuse_unwritable(engine, self._target, "a momentum target")
        self._keep_partitioned(engine)
        self._beside: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, online in self._online.items():
                self._store(name, master_shard(online))

    def _keep_partitioned(self, engine: Any) -> None:
        """Take the targets out of persistence: DeepSpeed keeps small parameters gathered, so that a write to the shard
        would leave the gathered copy stale, silently."""
        targets = [parameter for parameter in self._target.values() if is_partitioned(parameter)]
        if not targets:
            return
        identities = {id(parameter) for parameter in targets}
        persistent = engine.optimizer.persistent_parameters
        persistent[:] = [parameter for parameter in persistent if id(parameter) not in identities]
        for parameter in targets:
            parameter.ds_persist = False
        targets[0].partition(targets)

    @property
    def sharded(self) -> bool:
        """Return whether a rank has its part of the averages only, as under ZeRO-3, and not the whole of them."""
        return any(is_partitioned(target) for target in self._target.values())

    def names(self) -> list[str]:
        """Return the names of the averaged parameters."""
        return list(self._target)

    @torch.no_grad()
    def shard(self, name: str) -> Tensor:
        """Return this rank's part of an average in fp32: a copy where the target is bf16, else a live view."""
        copy = own_values(self._target[name])
        if copy.dtype == torch.float32:
            return copy
        return join(copy, self._beside[name]) if copy.dtype == torch.bfloat16 else self._beside[name]

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Update average ← m · average + (1 − m) · online, and the compute copy with it."""
        for name, online in self._online.items():
            average = self.shard(name)
            self._store(name, average.lerp_(master_shard(online).view_as(average), 1.0 - momentum))

    def _store(self, name: str, average: Tensor) -> None:
        copy = own_values(self._target[name])
        _forget_copy(self._target[name])
        if copy.dtype == torch.float32:
            copy.copy_(average.view_as(copy))  # nothing to do where it is the copy itself
            return
        kept = torch.int16 if copy.dtype == torch.bfloat16 else torch.float32
        if name not in self._beside:
            self._beside[name] = torch.empty_like(copy, dtype=kept)
        if kept == torch.int16:
            split(average, copy, self._beside[name])
        else:
            self._beside[name].copy_(average.view_as(copy))
            copy.copy_(self._beside[name])

    def online_names(self) -> dict[str, str]:
        """Return, by averaged parameter, the name of the online parameter that it follows."""
        return dict(self._follows)

    def shapes(self) -> dict[str, list[int]]:
        """Return the full shape of every averaged parameter, for consolidation."""
        return {name: list(full_shape(parameter)) for name, parameter in self._target.items()}

    def pieces(self) -> list[tuple[str, int, int]]:
        """Return (name, first element, elements) of what this rank has to save of every average."""
        return [(name, *own_range(target)) for name, target in self._target.items()]

    def parts(self, name: str, start: int, numel: int) -> tuple[Tensor, ...]:
        """Return the live tensors that a piece is made of, flat: the fp32 values, or two halves for
        `split_float.join`."""
        copy, beside = own_values(self._target[name]), self._beside.get(name)
        held = (copy, beside) if copy.dtype == torch.bfloat16 else (copy if beside is None else beside,)
        begin = 0 if is_partitioned(self._target[name]) else start
        return tuple(part.view(-1)[begin : begin + numel] for part in held if part is not None)

    @torch.no_grad()
    def load(self, read: Callable[[str, int, Tensor], None]) -> None:
        """Take over saved averages.

        Args:
            read: `(name, first element, out)` fills a flat fp32 tensor with that range of the average.
        """
        for name, start, numel in self.pieces():
            copy = own_values(self._target[name])
            values = torch.zeros(copy.numel())
            if is_partitioned(self._target[name]):
                read(name, start, values[:numel])  # the rest is padding
            else:
                read(name, 0, values)
            self._store(name, values.to(copy.device))
