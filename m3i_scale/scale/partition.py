"""The one file that touches DeepSpeed's partitioned parameters (`ds_tensor`, persistence, gathering).

Under ZeRO-3 a parameter is an empty tensor with a shard (`ds_tensor`) on every rank. Anything that reads or writes
weights outside a forward pass goes through here.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param
from torch import Tensor, nn
from transformers import PreTrainedModel

from m3i_scale.errors import ConfigError


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 owns the parameter."""
    return hasattr(parameter, "ds_tensor")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter, partitioned or not."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return torch.Size(shape)


def full_numel(module: nn.Module, *, trainable_only: bool = False) -> int:
    """Number of parameters of the whole module, whatever is partitioned."""
    wanted = [p for p in module.parameters() if p.requires_grad or not trainable_only]
    return sum(full_shape(parameter).numel() for parameter in wanted)


@contextlib.contextmanager
def whole(parameters: list[nn.Parameter], *, write: bool = False) -> Iterator[None]:
    """The parameters at full shape; with `write`, rank 0's values become everyone's at the end."""
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None, enabled=bool(partitioned)):
        yield


def construct(build: Callable[[], nn.Module], ds_config: dict[str, Any]) -> nn.Module:
    """`build()` with every parameter partitioned as soon as its module exists, where the configuration is ZeRO-3."""
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

    The values are a function of (seed, name of the module), so they do not depend on ranks or ZeRO stage.

    Args:
        module: the model, partitioned or not.
        initialize: `(owner, submodule)`; the owner is the nearest `transformers` model above, else the submodule.
        seed: of the run.
        skip: prefixes of submodules that get their values elsewhere.
    """
    owners = [(name, child) for name, child in module.named_modules() if isinstance(child, PreTrainedModel)]
    for name, child in module.named_modules():
        own = list(child.parameters(recurse=False))
        if not own or name.startswith(skip):
            continue
        above = [owner for prefix, owner in owners if name == prefix or name.startswith(f"{prefix}.")]
        with whole(own, write=True), torch.random.fork_rng(), torch.no_grad():
            # One number of 32 bits: torch's generator on the host drops the upper half of a seed.
            torch.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            initialize(above[-1] if above else child, child)


def copy_into(module: nn.Module, prefix: str, values: Mapping[str, Tensor | None] | None) -> None:
    """Write whole tensors into (partitioned) parameters `prefix + name`, one at a time.

    Args:
        module: the model.
        prefix: where the named tensors belong.
        values: name → whole tensor on rank 0, or None for one that keeps its value; None on other ranks, which receive
            their shards.
    """
    for name, parameter in module.named_parameters():
        if not name.startswith(prefix):
            continue
        with whole([parameter], write=True), torch.no_grad():
            value = None if values is None else values[name.removeprefix(prefix)]
            if value is not None:
                parameter.copy_(value)


def master_shard(parameter: nn.Parameter) -> Tensor:
    """This rank's part of the fp32 master weights: the shard under ZeRO-3, the whole parameter otherwise.

    Raises:
        RuntimeError: DeepSpeed holds no master copy of a low-precision parameter.
    """
    if is_partitioned(parameter):
        shard: Tensor = safe_get_local_fp32_param(parameter)
        return shard.float()
    full = safe_get_full_fp32_param(parameter) if hasattr(parameter, "_hp_mapping") else None
    if full is not None:
        return torch.as_tensor(full).float()
    if parameter.dtype != torch.float32:
        raise RuntimeError(f"no fp32 master weights behind a {parameter.dtype} parameter of shape {parameter.shape}")
    return parameter.detach()


class ShardedMomentum:
    """The exponential moving average of the online weights, shard by shard, without a gather.

    The fp32 average is the truth; the target's compute copy is refreshed from it. Averaging the bf16 copy itself would
    lose the update, since 1 − m is below half a unit in the last place.

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
        self._refuse_unsupported(engine)
        self._keep_partitioned(engine)
        self.shards = {name: master_shard(online).clone() for name, online in self._online.items()}
        self.refresh()

    def _refuse_unsupported(self, engine: Any) -> None:
        zero = engine._config.zero_config
        if zero.zero_hpz_partition_size > 1 and self._target:
            raise ConfigError(
                "zero_hpz_partition_size > 1 keeps second copies of the shards, which would go stale",
                where="zero_optimization",
                why="the momentum target is moved on its shards",
                fix="leave it at 1 for recipes with a momentum target",
            )
        for name, target in self._target.items():
            if is_partitioned(target) and target.ds_tensor.numel() == 0:
                raise ConfigError(
                    f"the shard of '{name}' is not in memory", fix="offload_param to cpu or none, not to nvme"
                )

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

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """average ← m · average + (1 − m) · online, then refresh the compute copy."""
        for name, shard in self.shards.items():
            shard.lerp_(master_shard(self._online[name]), 1.0 - momentum)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """The compute copy of the target := the fp32 average."""
        for name, shard in self.shards.items():
            target = self._target[name]
            copy = target.ds_tensor if is_partitioned(target) else target
            copy.copy_(shard.view_as(copy))

    def online_names(self) -> dict[str, str]:
        """Which parameter every averaged one follows."""
        return dict(self._follows)

    def shapes(self) -> dict[str, list[int]]:
        """Full shape of every averaged parameter, for consolidation."""
        return {name: list(full_shape(parameter)) for name, parameter in self._target.items()}

    @torch.no_grad()
    def load(self, shards: dict[str, Tensor]) -> None:
        """Take over saved shards of the same partition, and refresh.

        Raises:
            ValueError: other names or sizes than this partition's.
        """
        if shards.keys() != self.shards.keys():
            raise ValueError(f"momentum shards do not match: {sorted(shards.keys() ^ self.shards.keys())[:3]} …")
        for name, shard in self.shards.items():
            if shards[name].numel() != shard.numel():
                raise ValueError(f"momentum shard '{name}' has {shards[name].numel()} elements, not {shard.numel()}")
            shard.copy_(shards[name].view_as(shard))
        self.refresh()
