"""Check, after initialization, that the engine follows its configuration."""

from __future__ import annotations

from typing import Any

from m3i_scale.engine.deepspeed.resolve import ResolvedConfig
from m3i_scale.engine.deepspeed.rules import (
    accumulation,
    communication,
    offloads_optimizer,
    precision,
    takes_bf16_optimizer,
)
from m3i_scale.engine.device import dtype_name
from m3i_scale.errors import ConfigError

_STAGE3_SIZES = {
    "stage3_param_persistence_threshold": "zero_param_persistence_threshold",
    "stage3_max_live_parameters": "zero_max_live_parameters",
    "stage3_max_reuse_distance": "zero_max_reuse_distance",
    "stage3_prefetch_bucket_size": "zero_prefetch_bucket_size",
    "sub_group_size": "zero_sub_group_size",
}


def check_effective(engine: Any, resolved: ResolvedConfig) -> None:
    """Raise ConfigError if the engine differs from its configuration. Call it on every rank, before the first step.

    It compares the ZeRO stage, the precision of every trainable parameter, batch arithmetic, gradient accumulation and
    reduction dtypes, clipping, offload, the optimizer and its hyperparameters, and bucket sizes and thresholds.
    """
    config = resolved.config
    differences = [
        f"{name}: wanted {wanted!r}, effective {effective!r}"
        for name, wanted, effective in [*_compared(engine, config), *_sizes(engine, config["zero_optimization"])]
        if wanted != effective
    ]
    if differences:
        raise ConfigError(
            "the DeepSpeed engine does not use its configuration",
            where=resolved.where,
            why="; ".join(differences),
            fix="install the DeepSpeed version of requirements.txt, and do not change the configuration before "
            "deepspeed.initialize",
        )


def _compared(engine: Any, config: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    zero, params = config["zero_optimization"], config["optimizer"]["params"]
    optimizer, basic = engine.optimizer, engine.basic_optimizer
    offloads_parameters = zero.get("offload_param", {}).get("device") == "cpu"
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return [
        ("zero_optimization.stage", zero["stage"], int(engine.zero_optimization_stage())),
        ("precision", [precision(config)], _precisions(engine)),
        ("gradient accumulation type", accumulation(config), _accumulation(engine, config)),
        ("communication_data_type", communication(config), dtype_name(engine.communication_data_type)),
        *((name, config[name], getattr(engine, name)()) for name in batch),
        ("gradient_clipping", config["gradient_clipping"], optimizer.clip_grad),
        ("offload_optimizer", offloads_optimizer(config), _offloads(engine)),
        ("offload_param", offloads_parameters, bool(getattr(optimizer, "offload_param", False))),
        ("decoupled weight decay", True, _decouples(basic)),
        ("optimizer.params.betas", tuple(params["betas"]), tuple(basic.defaults["betas"])),
        ("optimizer.params.fused", bool(params.get("fused")), bool(basic.defaults.get("fused"))),
        *((f"optimizer.params.{key}", params[key], basic.defaults[key]) for key in ("lr", "eps", "weight_decay")),
    ]


def _sizes(engine: Any, zero: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    optimizer = engine.optimizer
    effective = {key: getattr(engine, method)() for key, method in _STAGE3_SIZES.items()}
    effective["reduce_bucket_size"] = getattr(optimizer, "reduce_bucket_size", None)
    if engine.zero_optimization_stage() == 3:
        # the method only repeats the configuration; this is the threshold that was applied
        threshold = optimizer.parameter_offload.param_numel_persistence_threshold
        effective |= {"stage3_param_persistence_threshold": threshold, "sub_group_size": optimizer.sub_group_size}
    return [(f"zero_optimization.{key}", zero[key], size) for key, size in effective.items() if key in zero]


def _precisions(engine: Any) -> list[str]:
    """Return the distinct dtypes of the trainable parameters; a correct engine has one."""
    trainable = (parameter for parameter in engine.module.parameters() if parameter.requires_grad)
    return sorted({dtype_name(parameter.dtype) for parameter in trainable})


def _accumulation(engine: Any, config: dict[str, Any]) -> str:
    name = "grad_acc_dtype" if takes_bf16_optimizer(config) else "gradient_accumulation_dtype"
    return dtype_name(getattr(engine.optimizer, name, None))


def _offloads(engine: Any) -> bool:
    """Return whether both the states and the step are on the CPU."""
    flags = (getattr(engine.optimizer, name, False) for name in ("offload_optimizer", "cpu_offload"))
    return any(flags) and engine.zero_use_cpu_optimizer()


def _decouples(basic: Any) -> bool:
    """Return whether the optimizer is AdamW rather than Adam; the three classes name it differently."""
    mode = getattr(basic, "adam_w_mode", getattr(basic, "adamw_mode", None))
    return bool(mode) if mode is not None else type(basic).__name__ == "AdamW"
