"""After initialisation: does the engine do what the configuration says?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from m3i_scale.errors import ConfigError
from m3i_scale.scale.ds_rules import accumulation, offloads_optimizer, precision, takes_bf16_optimizer

if TYPE_CHECKING:
    from m3i_scale.scale.ds_config import Resolved

_STAGE3_SIZES = {
    "stage3_param_persistence_threshold": "zero_param_persistence_threshold",
    "stage3_max_live_parameters": "zero_max_live_parameters",
    "stage3_max_reuse_distance": "zero_max_reuse_distance",
    "stage3_prefetch_bucket_size": "zero_prefetch_bucket_size",
    "sub_group_size": "zero_sub_group_size",
}


def check_effective(engine: Any, resolved: Resolved) -> None:
    """Compare what the engine will do with what was asked for. Call it on every rank, before the first step.

    Compared are the ZeRO stage, the precision of every trainable parameter, batch arithmetic, gradient accumulation
    type, clipping, offload, the optimizer and its hyper-parameters, and bucket sizes and thresholds.

    Args:
        engine: what `deepspeed.initialize` returned.
        resolved: what it was given.

    Raises:
        ConfigError: lists every difference.
    """
    wanted, effective = _wanted(resolved.config), _effective(engine, resolved.config)
    differences = [
        f"{name}: wanted {value!r}, effective {effective[name]!r}"
        for name, value in wanted.items()
        if effective[name] != value
    ]
    if differences:
        raise ConfigError(
            "the DeepSpeed engine does something else than its configuration says",
            where=resolved.where,
            why="; ".join(differences),
            fix="check the installed DeepSpeed version, and whether the engine was given this configuration unchanged",
        )


def _wanted(config: dict[str, Any]) -> dict[str, Any]:
    zero, params = config["zero_optimization"], config["optimizer"]["params"]
    values: dict[str, Any] = {
        "zero_optimization.stage": zero["stage"],
        "precision": [precision(config)],
        "gradient accumulation type": accumulation(config),
        "train_batch_size": config["train_batch_size"],
        "train_micro_batch_size_per_gpu": config["train_micro_batch_size_per_gpu"],
        "gradient_accumulation_steps": config["gradient_accumulation_steps"],
        "gradient_clipping": config["gradient_clipping"],
        "offload_optimizer": offloads_optimizer(config),
        "offload_param": zero.get("offload_param", {}).get("device", "none") == "cpu",
        "decoupled weight decay": True,
        "optimizer.params.betas": tuple(params["betas"]),
        "optimizer.params.fused": bool(params.get("fused")),
    }
    for key in ("lr", "eps", "weight_decay"):
        values[f"optimizer.params.{key}"] = params[key]
    for key in ("reduce_bucket_size", *_STAGE3_SIZES):
        if key in zero:
            values[f"zero_optimization.{key}"] = zero[key]
    return values


def _effective(engine: Any, config: dict[str, Any]) -> dict[str, Any]:
    optimizer, basic = engine.optimizer, engine.basic_optimizer
    values: dict[str, Any] = {
        "zero_optimization.stage": int(engine.zero_optimization_stage()),
        "precision": _precisions(engine),
        "gradient accumulation type": _accumulation(engine, config),
        "train_batch_size": engine.train_batch_size(),
        "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        "gradient_clipping": optimizer.clip_grad,
        "offload_optimizer": _offloads(engine),
        "offload_param": bool(getattr(optimizer, "offload_param", False)),
        "decoupled weight decay": _decouples(basic),
        "optimizer.params.betas": tuple(basic.defaults["betas"]),
        "optimizer.params.fused": bool(basic.defaults.get("fused")),
        "zero_optimization.reduce_bucket_size": getattr(optimizer, "reduce_bucket_size", None),
    }
    for key in ("lr", "eps", "weight_decay"):
        values[f"optimizer.params.{key}"] = basic.defaults[key]
    for key, method in _STAGE3_SIZES.items():
        values[f"zero_optimization.{key}"] = getattr(engine, method)()
    if values["zero_optimization.stage"] == 3:
        # the method only repeats the configuration; this is what parameters were really sorted by
        threshold = optimizer.parameter_offload.param_numel_persistence_threshold
        values["zero_optimization.stage3_param_persistence_threshold"] = threshold
        values["zero_optimization.sub_group_size"] = optimizer.sub_group_size
    return values


def _short(dtype: Any) -> str:
    names = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}
    return names.get(str(dtype), str(dtype))


def _precisions(engine: Any) -> list[str]:
    """Types of the trainable parameters; one name when all is well."""
    trainable = (parameter for parameter in engine.module.parameters() if parameter.requires_grad)
    return sorted({_short(parameter.dtype) for parameter in trainable})


def _accumulation(engine: Any, config: dict[str, Any]) -> str:
    name = "grad_acc_dtype" if takes_bf16_optimizer(config) else "gradient_accumulation_dtype"
    return _short(getattr(engine.optimizer, name, None))


def _offloads(engine: Any) -> bool:
    """Both the states and the step are on the CPU."""
    flags = (getattr(engine.optimizer, name, False) for name in ("offload_optimizer", "cpu_offload"))
    return any(flags) and engine.zero_use_cpu_optimizer()


def _decouples(basic: Any) -> bool:
    """AdamW rather than Adam; the three classes spell it three ways."""
    mode = getattr(basic, "adam_w_mode", getattr(basic, "adamw_mode", None))
    return bool(mode) if mode is not None else type(basic).__name__ == "AdamW"
