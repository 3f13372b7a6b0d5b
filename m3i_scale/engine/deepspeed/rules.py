"""Rules between the sections of a DeepSpeed JSON: settings that have no effect, or an unexpected one, raise an error.

Every rule was checked against DeepSpeed's source: a setting called ineffective is not read on any code path of this
trainer with the given stage, precision and optimizer. The functions take the file as a mapping with validated keys and
types.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from m3i_scale.engine.deepspeed.schema import Switched
from m3i_scale.errors import ConfigError

_BF16_OPTIMIZER_KEYS = {"stage", "allgather_bucket_size", "offload_optimizer"}
"""Keys that DeepSpeed's BF16 optimizer still reads."""
_DYNAMIC_SCALE = {
    "initial_scale_power",
    "loss_scale_window",
    "hysteresis",
    "consecutive_hysteresis",
    "min_loss_scale",
}
_SWITCHED = ("bf16", "fp16", "flops_profiler")
READ_BY = {
    "AdamW": {"fused"},
    "FusedAdam": {"bias_correction"},
    "DeepSpeedCPUAdam": {"bias_correction", "fp32_optimizer_states"},
}
"""By the class that DeepSpeed builds: keys of `optimizer.params` that only some classes read."""
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes per element by dtype."""


def precision(config: dict[str, Any]) -> str:
    """Return the compute dtype of parameters: `bf16`, `fp16` or `fp32`."""
    for name in ("bf16", "fp16"):
        if config.get(name, {}).get("enabled") is True:
            return name
    return "fp32"


def accumulation(config: dict[str, Any]) -> str:
    """Return the dtype of gradient accumulation: `bf16`, `fp16` or `fp32`."""
    return config.get("data_types", {}).get("grad_accum_dtype") or precision(config)


def communication(config: dict[str, Any]) -> str:
    """Return the dtype of the gradient reduction over ranks: `bf16`, `fp16` or `fp32`."""
    return config.get("communication_data_type") or precision(config)


def state_bytes(config: dict[str, Any]) -> tuple[int, int]:
    """Return the bytes per element of the master weights, and of each of AdamW's two moments."""
    kind, bf16 = precision(config), config.get("bf16", {})
    lean = bool(bf16.get("bf16_master_weights_and_grads")) or bool(
        config.get("fp16", {}).get("fp16_master_weights_and_grads")
    )
    moments = bf16.get("bf16_optimizer_states") or (lean and not offloads_optimizer(config) and kind != "fp32")
    return BYTES[kind] if lean else 4, 2 if moments else 4


def offloads_optimizer(config: dict[str, Any]) -> bool:
    """Return whether the optimizer step and its states are on the CPU."""
    return bool(config["zero_optimization"].get("offload_optimizer", {}).get("device") == "cpu")


def supports_trust_ratios(config: dict[str, Any]) -> bool:
    """Return whether the optimizer has whole parameters in flat groups on the device (see `scale_by_trust_ratio`)."""
    return config["zero_optimization"].get("stage") != 3 and not offloads_optimizer(config)


def takes_bf16_optimizer(config: dict[str, Any]) -> bool:
    """Return whether DeepSpeed uses its BF16 optimizer instead of the ZeRO one."""
    mixed = precision(config) == "bf16" and accumulation(config) == "fp32"
    return mixed and config["zero_optimization"].get("stage") == 1 and not offloads_optimizer(config)


def reduces_in_backward(config: dict[str, Any]) -> bool:
    """Return whether the BF16 optimizer reduces gradients during the backward pass: in place, so in their own dtype."""
    return takes_bf16_optimizer(config) and communication(config) == accumulation(config)


def optimizer_class(config: dict[str, Any]) -> Literal["AdamW", "DeepSpeedCPUAdam", "FusedAdam"]:
    """Return the optimizer class that DeepSpeed uses: torch's, or one of its compiled ones."""
    if config["optimizer"]["params"].get("torch_adam"):
        return "AdamW"
    return "DeepSpeedCPUAdam" if offloads_optimizer(config) else "FusedAdam"


def check_rules(config: dict[str, Any], *, world_size: int | None, where: str) -> None:
    """Raise ConfigError for ineffective or contradictory values of a file validated as `DeepSpeedFile`."""
    _check_switches(config, where)
    _check_precision(config, where)
    _check_zero(config, world_size, where)
    _check_optimizer(config, where)


def no_effect(path: str, why: str, where: str, fix: str | None = None) -> ConfigError:
    """Return the error for a setting without effect."""
    return ConfigError(f"'{path}' has no effect here", where=where, why=why, fix=fix or f"remove '{path}'")


def _first(keys: Iterable[str]) -> str | None:
    return min(keys, default=None)


def _check_switches(config: dict[str, Any], where: str) -> None:
    for name in _SWITCHED:
        section = config.get(name, {"enabled": False})
        idle = _first(section.keys() - Switched.model_fields)
        if idle and not section["enabled"]:
            raise no_effect(f"{name}.{idle}", f"{name}.enabled is false", where, f"remove it, or enable {name}")
    if not config.get("comms_logger", {}).get("enabled", True):
        why = "DeepSpeed logs communication as soon as the section is there, whatever 'enabled' says"
        raise no_effect("comms_logger.enabled", why, where, "remove the section 'comms_logger'")


def _check_precision(config: dict[str, Any], where: str) -> None:
    bf16, fp16 = config.get("bf16", {}), config.get("fp16", {})
    if bf16.get("enabled") and fp16.get("enabled"):
        raise ConfigError("bf16 and fp16 must not both be enabled", where=where, fix="keep one of the two sections")
    lean = bf16.get("bf16_master_weights_and_grads")
    if lean and takes_bf16_optimizer(config):
        why = "DeepSpeed's BF16 optimizer (stage 1 with fp32 accumulation) keeps fp32 master weights"
        raise no_effect("bf16.bf16_master_weights_and_grads", why, where, "remove data_types.grad_accum_dtype")
    if bf16.get("bf16_optimizer_states") and not lean:
        what = "'bf16.bf16_optimizer_states' needs 'bf16.bf16_master_weights_and_grads'"
        raise ConfigError(what, where=where, fix="set both, or neither")
    if fp16.get("fp16_master_weights_and_grads") and not offloads_optimizer(config):
        fix = "add zero_optimization.offload_optimizer with device cpu, or remove it"
        raise ConfigError("'fp16.fp16_master_weights_and_grads' needs the CPU optimizer", where=where, fix=fix)
    idle = _first(_DYNAMIC_SCALE & fp16.keys())
    if idle and fp16.get("loss_scale", 0) != 0:
        why = "fp16.loss_scale is fixed; this belongs to dynamic scaling (loss_scale 0)"
        raise no_effect(f"fp16.{idle}", why, where)


def _check_zero(config: dict[str, Any], world_size: int | None, where: str) -> None:
    zero = config["zero_optimization"]
    read = _BF16_OPTIMIZER_KEYS | ({"reduce_bucket_size"} if reduces_in_backward(config) else set())
    idle = _first(zero.keys() - read)
    if idle and takes_bf16_optimizer(config):
        why, fix = "stage 1 with bf16 and fp32 accumulation uses DeepSpeed's BF16 optimizer, which ignores it", None
        if idle == "reduce_bucket_size":
            why = "gradients are reduced in buckets only if communication_data_type is the dtype of accumulation, fp32"
            fix = f"set communication_data_type to fp32, or remove zero_optimization.{idle}"
        raise no_effect(f"zero_optimization.{idle}", why, where, fix)
    for name in ("offload_optimizer", "offload_param"):
        block, path = zero.get(name, {"device": "cpu"}), f"zero_optimization.{name}"
        idle = _first(block.keys() - {"device"})
        if idle and block["device"] == "none":
            fix = f"set '{path}.device' to cpu, or remove '{path}'"
            raise no_effect(f"{path}.{idle}", "the device is none", where, fix)
    size = zero.get("zero_hpz_partition_size", 1)
    if world_size is not None and world_size % size:
        raise ConfigError(
            f"'zero_optimization.zero_hpz_partition_size' must divide the {world_size} ranks, got {size}",
            where=where,
            why="each group of this many ranks, usually one machine, stores a second copy of the parameters",
            fix="use a divisor of the number of ranks, e.g. the number of GPUs per machine",
        )


def _check_optimizer(config: dict[str, Any], where: str) -> None:
    params = config["optimizer"]["params"]
    kind = optimizer_class(config)
    if "fp32_optimizer_states" in params and config.get("bf16", {}).get("bf16_optimizer_states"):
        fix = "remove bf16.bf16_optimizer_states" if params["fp32_optimizer_states"] else None
        raise no_effect("optimizer.params.fp32_optimizer_states", "bf16.bf16_optimizer_states decides", where, fix)
    idle = _first(params.keys() & set().union(*READ_BY.values()) - READ_BY[kind])
    if idle:
        fix = "set optimizer.params.torch_adam to true, or remove it" if idle in READ_BY["AdamW"] else None
        raise no_effect(f"optimizer.params.{idle}", f"the optimizer is {kind}, which does not read it", where, fix)
