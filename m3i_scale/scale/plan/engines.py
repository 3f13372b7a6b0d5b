"""Select the simulation of the optimizer that DeepSpeed uses."""

from __future__ import annotations

from m3i_scale.scale.plan.ledger import Ledger
from m3i_scale.scale.plan.partitioned import PartitionedEngine
from m3i_scale.scale.plan.replay import Engine
from m3i_scale.scale.plan.settings import Parameter, Settings
from m3i_scale.scale.plan.trace import Trace
from m3i_scale.scale.plan.unpartitioned import Bf16Engine, ZeroEngine


def engine_for(
    parameters: tuple[Parameter, ...], trace: Trace, settings: Settings, device: Ledger, host: Ledger
) -> Engine:
    """Return the simulation of the optimizer that DeepSpeed uses with these settings."""
    if settings.stage == 3:
        return PartitionedEngine(parameters, trace, settings, device, host)
    if settings.bf16_optimizer:
        return Bf16Engine(parameters, trace, settings, device, host)
    return ZeroEngine(parameters, trace, settings, device, host)
