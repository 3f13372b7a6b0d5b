"""Rules on values: settings that are known but would do nothing, or something else than they say, are refused.

Every rule names the reason, and was checked against DeepSpeed's source: what the rule calls ineffective is read by no
code path that this trainer takes with the given stage, precision and optimizer.
"""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import Any

from m3i_scale.errors import ConfigError, did_you_mean

STAGES = (1, 2, 3)

STAGE3_ONLY = frozenset(
    {
        "sub_group_size",
        "offload_param",
        "memory_efficient_linear",
        "override_module_apply",
        "log_trace_cache_warnings",
        "enable_sanity_checks",
        "leaf_module",
        "zero_hpz_partition_size",
        "zero_quantized_weights",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_gradients",
    }
)
"""Keys that only the stage-3 optimizer reads, besides those that are spelt stage3_…"""

STAGE12_ONLY = frozenset(
    {
        "use_multi_rank_bucket_allreduce",
        "allgather_bucket_size",
        "ignore_unused_parameters",
        "round_robin_gradients",
        "parameter_alignment",
    }
)
"""Keys that only the optimizer of stages 1 and 2 reads."""

BF16_OPTIMIZER_KEYS = frozenset({"stage", "allgather_bucket_size", "offload_optimizer"})
"""What is still read when DeepSpeed takes its BF16 optimizer (stage 1, bf16, fp32 accumulation, no offload)."""

NVME_ONLY = frozenset(
    {
        "nvme_path",
        "buffer_count",
        "buffer_size",
        "max_in_cpu",
        "pipeline_read",
        "pipeline_write",
        "fast_init",
    }
)

_NVME = {
    "offload_optimizer": "checkpoints read and write master weights and moments in memory, and a momentum target would "
    "read every group of them from the disk once per parameter and step",
    "offload_param": "exports, checkpoints and the momentum target read and write shards of parameters in memory",
}
"""Why nothing goes to NVMe."""

DYNAMIC_SCALE_ONLY = frozenset(
    {
        "initial_scale_power",
        "loss_scale_window",
        "hysteresis",
        "consecutive_hysteresis",
        "min_loss_scale",
    }
)

_SWITCHED = ("bf16", "fp16", "flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet")
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}


def check_rules(raw: dict[str, Any], *, where: str) -> None:
    """Refuse ineffective or contradictory values. Keys and types must have been checked.

    Raises:
        ConfigError: names the setting, why it has no effect, and what to write instead.
    """
    _check_switches(raw, where)
    stage = _check_stage(raw, where)
    _check_precision(raw, stage, where)
    _check_offload(raw["zero_optimization"], stage, where)
    _check_reduction(raw, stage, where)
    _check_optimizer(raw, where)
    if "gradient_clipping" not in raw:
        raise ConfigError(
            "'gradient_clipping' is left out",
            where=where,
            why="DeepSpeed then clips at 1.0, whatever the run file says",
            fix='write "gradient_clipping": "auto" to take optim.clip_grad_norm',
        )


def precision(config: dict[str, Any]) -> str:
    """`bf16`, `fp16` or `fp32`: what parameters are computed in."""
    for name in ("bf16", "fp16"):
        if config.get(name, {}).get("enabled") is True:
            return name
    return "fp32"


def accumulation(config: dict[str, Any]) -> str:
    """`bf16`, `fp16` or `fp32`: what gradients are accumulated in."""
    return str(config.get("data_types", {}).get("grad_accum_dtype", precision(config)))


def offloads_optimizer(config: dict[str, Any]) -> bool:
    """The optimizer step runs on the CPU, next to the states."""
    block = config["zero_optimization"].get("offload_optimizer") or {}
    return bool(block.get("device", "none") == "cpu")


def takes_bf16_optimizer(config: dict[str, Any]) -> bool:
    """DeepSpeed chooses its BF16 optimizer instead of the ZeRO one."""
    mixed = precision(config) == "bf16" and accumulation(config) == "fp32"
    return mixed and config["zero_optimization"].get("stage") == 1 and not offloads_optimizer(config)


def _refuse(path: str, why: str, fix: str | None, where: str) -> ConfigError:
    return ConfigError(f"'{path}' has no effect here", where=where, why=why, fix=fix or f"remove '{path}'")


def _check_switches(raw: dict[str, Any], where: str) -> None:
    for name in _SWITCHED:
        section = raw.get(name)
        if section is None:
            continue
        if not isinstance(section.get("enabled"), bool):
            why = "DeepSpeed takes a missing or 'auto' switch for off, and goes on"
            raise ConfigError(f"'{name}.enabled' must be true or false", where=where, why=why)
        idle = [key for key in section if key != "enabled"]
        if idle and not section["enabled"]:
            raise _refuse(f"{name}.{idle[0]}", f"{name}.enabled is false", f"remove it, or enable {name}", where)
        if section["enabled"] and find_spec(_PACKAGES.get(name, "deepspeed")) is None:
            fix = f"pip install {_PACKAGES[name]}, or remove the section"
            raise ConfigError(f"'{name}' needs a package that is not installed", where=where, fix=fix)
    if raw.get("comms_logger", {}).get("enabled", True) is not True:
        why = "DeepSpeed logs communication as soon as the section is there, whatever 'enabled' says"
        raise _refuse("comms_logger.enabled", why, "remove the whole section 'comms_logger'", where)


def _check_stage(raw: dict[str, Any], where: str) -> int:
    zero = raw.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if zero is None or isinstance(stage, bool) or stage not in STAGES:
        raise ConfigError(
            f"'zero_optimization.stage' must be 1, 2 or 3 (got {stage!r})",
            where=where,
            why="checkpoints and the momentum target live on the partitioned optimizer; stage 0 has none",
            fix="on a single device take 1: it costs nothing there",
        )
    for key in zero:
        if stage != 3 and (key.startswith("stage3_") or key in STAGE3_ONLY):
            why = f"only stage 3 reads it, and the stage is {stage}"
            raise _refuse(f"zero_optimization.{key}", why, "remove it, or set stage to 3", where)
        if stage == 3 and key in STAGE12_ONLY:
            fix = "write stage3_prefetch_bucket_size in its place" if key == "allgather_bucket_size" else None
            raise _refuse(f"zero_optimization.{key}", "only stages 1 and 2 read it, and the stage is 3", fix, where)
        if takes_bf16_optimizer(raw) and key not in BF16_OPTIMIZER_KEYS:
            why = "stage 1 with bf16 and fp32 accumulation is served by DeepSpeed's BF16 optimizer, which ignores it"
            raise _refuse(f"zero_optimization.{key}", why, None, where)
    return int(stage)


def _check_precision(raw: dict[str, Any], stage: int, where: str) -> None:
    bf16, fp16 = raw.get("bf16", {}), raw.get("fp16", {})
    if bf16.get("enabled") and fp16.get("enabled"):
        raise ConfigError("bf16 and fp16 are both enabled", where=where, fix="keep one of the two sections")
    bf16_optimizer = takes_bf16_optimizer(raw)
    if "immediate_grad_update" in bf16 and not bf16_optimizer:
        why = "only the BF16 optimizer reads it (stage 1 with data_types.grad_accum_dtype fp32)"
        raise _refuse("bf16.immediate_grad_update", why, None, where)
    if "check_grad_overflow" in bf16 and (stage == 3 or bf16_optimizer):
        why = "only the ZeRO optimizer of stages 1 and 2 reads it; stage 3 checks fp16 alone"
        raise _refuse("bf16.check_grad_overflow", why, None, where)
    if bf16_optimizer and bf16.get("bf16_master_weights_and_grads"):
        why = "DeepSpeed's BF16 optimizer (stage 1 with fp32 accumulation) keeps fp32 master weights"
        raise _refuse("bf16.bf16_master_weights_and_grads", why, "remove data_types.grad_accum_dtype", where)
    if bf16.get("bf16_optimizer_states") and not bf16.get("bf16_master_weights_and_grads"):
        raise ConfigError(
            "'bf16.bf16_optimizer_states' needs 'bf16.bf16_master_weights_and_grads'",
            where=where,
            fix="set both, or neither",
        )
    if fp16.get("fp16_master_weights_and_grads") and not offloads_optimizer(raw):
        raise ConfigError(
            "'fp16.fp16_master_weights_and_grads' needs the CPU optimizer",
            where=where,
            fix="add zero_optimization.offload_optimizer with device cpu, or remove it",
        )
    idle = DYNAMIC_SCALE_ONLY & fp16.keys()
    if idle and fp16.get("loss_scale", 0) != 0:
        why = "fp16.loss_scale is fixed; this belongs to dynamic scaling (loss_scale 0)"
        raise _refuse(f"fp16.{sorted(idle)[0]}", why, None, where)
    wanted = raw.get("data_types", {}).get("param_dtype")
    if wanted is not None and wanted != precision(raw):
        why = f"parameters are {precision(raw)}: the sections bf16 and fp16 decide"
        fix = f"remove it, to compute in {precision(raw)}; or " + (
            "disable both sections" if wanted == "fp32" else f'write "{wanted}": {{"enabled": true}}'
        )
        raise ConfigError(f"'data_types.param_dtype' is {wanted}", where=where, why=why, fix=fix)


def _check_offload(zero: dict[str, Any], stage: int, where: str) -> None:
    for name in ("offload_optimizer", "offload_param"):
        if name not in zero:
            continue
        block, path = zero[name], f"zero_optimization.{name}"
        if "device" not in block:
            why = "DeepSpeed then takes none, and offloads nothing"
            raise ConfigError(f"'{path}.device' is left out", where=where, why=why, fix='write "device": "cpu"')
        device = block["device"]
        if device == "nvme":
            raise ConfigError(
                f"'{path}.device' is nvme",
                where=where,
                why=_NVME[name],
                fix="take cpu; bf16 states (zero3_bf16_lean, zero3_cpu_lean) halve what has to be held",
            )
        if device not in ("cpu", "none"):
            raise ConfigError(f"'{path}.device' must be cpu or none (got {device!r})", where=where)
        idle = [key for key in block if key != "device" and (device == "none" or key in NVME_ONLY)]
        if idle:
            why = f"the device is {device}" + (" and only nvme offload reads it" if device == "cpu" else "")
            fix = f"set '{path}.device' to cpu, or remove '{path}'" if device == "none" else None
            raise _refuse(f"{path}.{idle[0]}", why, fix, where)
        if "ratio" in block and stage != 3:
            raise _refuse(f"{path}.ratio", f"only stage 3 reads it, and the stage is {stage}", None, where)


def check_groups(raw: dict[str, Any], *, world_size: int | None, where: str) -> None:
    """Refuse second copies of the parameters within groups of ranks that this number of ranks does not make up.

    Raises:
        ConfigError: `zero_hpz_partition_size` that does not divide the number of ranks.
    """
    size = raw["zero_optimization"].get("zero_hpz_partition_size", 1)
    if size < 1 or (world_size is not None and world_size % size):
        raise ConfigError(
            f"'zero_optimization.zero_hpz_partition_size' is {size}"
            + ("" if world_size is None else f", with {world_size} ranks"),
            where=where,
            why="every group of this many ranks, as a rule those of one machine, holds a second copy of the parameters",
            fix="a divisor of the number of ranks, e.g. the GPUs of a machine",
        )


def quantized(config: dict[str, Any]) -> list[str]:
    """Which settings of ZeRO++ need the kernels that quantise."""
    zero = config["zero_optimization"]
    names = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
    return [name for name in names if zero.get(name)]


def _check_reduction(raw: dict[str, Any], stage: int, where: str) -> None:
    scatter = raw["zero_optimization"].get("reduce_scatter", True)
    for key, neutral in (("prescale_gradients", False), ("gradient_predivide_factor", 1)):
        if stage > 1 and scatter and raw.get(key, neutral) != neutral:
            raise ConfigError(
                f"'{key}' cannot be {raw[key]!r} here",
                where=where,
                why=f"DeepSpeed does not scale gradients beforehand with stage {stage} and reduce_scatter",
                fix="remove it, or set zero_optimization.reduce_scatter to false",
            )
    if raw["zero_optimization"].get("allgather_bucket_size", 2) % 2:
        raise ConfigError("'zero_optimization.allgather_bucket_size' must be even", where=where)


def _check_optimizer(raw: dict[str, Any], where: str) -> None:
    block = raw.get("optimizer", {})
    if not isinstance(block.get("params"), dict):
        raise ConfigError(
            "'optimizer' is missing or has no 'params'",
            where=where,
            why="the optimizer is built from this file",
            fix='"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", '
            '"weight_decay": "auto"}}',
        )
    if str(block.get("type")).lower() != "adamw":
        why = "DeepSpeed's 'Adam' is AdamW too" if str(block.get("type")).lower() == "adam" else None
        why = why or "the section optim of the run file (betas, eps, decoupled weight decay) describes AdamW"
        raise ConfigError(
            f"'optimizer.type' must be AdamW (got {block.get('type')!r})", where=where, why=why, fix='write "AdamW"'
        )
    params = block["params"]
    for key in ("lr", "betas", "eps", "weight_decay"):
        if key not in params:
            why = "DeepSpeed would take its own default instead of the run file's value"
            raise ConfigError(f"'optimizer.params.{key}' is left out", where=where, why=why, fix='write "auto"')
    if params.get("adam_w_mode", True) is not True:
        why = "type AdamW always decouples the weight decay"
        raise _refuse("optimizer.params.adam_w_mode", why, None, where)
    if "fp32_optimizer_states" in params and raw.get("bf16", {}).get("bf16_optimizer_states"):
        fix = "remove bf16.bf16_optimizer_states" if params["fp32_optimizer_states"] is True else None
        raise _refuse("optimizer.params.fp32_optimizer_states", "bf16.bf16_optimizer_states decides", fix, where)
    _check_optimizer_keys(raw, where)


def _check_optimizer_keys(raw: dict[str, Any], where: str) -> None:
    params, known = raw["optimizer"]["params"], _optimizer_keys(raw)
    for key, value in params.items():
        if key == "max_grad_norm":
            fix = "use gradient_clipping"
            raise ConfigError("'optimizer.params.max_grad_norm' is refused by DeepSpeed", where=where, fix=fix)
        if key == "amsgrad" and value and params.get("torch_adam") is not True:
            fix = "remove it, or set torch_adam to true"
            raise ConfigError("DeepSpeed's own Adam has no amsgrad", where=where, fix=fix)
        if key == "foreach" and value and params.get("fused"):
            raise ConfigError("torch's AdamW is either fused or foreach", where=where, fix="remove one of the two")
        if key not in known:
            raise ConfigError(
                f"unknown key 'optimizer.params.{key}' for {_optimizer_class(raw).__name__}",
                where=where,
                why="DeepSpeed drops it without a word, or stops while building the optimizer",
                fix=did_you_mean(key, known),
            )


def _optimizer_class(raw: dict[str, Any]) -> type[Any]:
    """The class that DeepSpeed will build, by its own rule."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from torch.optim import AdamW

    if raw["optimizer"]["params"].get("torch_adam") is True:
        return AdamW
    found: type[Any] = DeepSpeedCPUAdam if offloads_optimizer(raw) else FusedAdam
    return found


def _optimizer_keys(raw: dict[str, Any]) -> set[str]:
    kind = _optimizer_class(raw)
    own = set(inspect.signature(kind.__init__).parameters) - {"self", "params", "model_params", "adamw_mode"}
    return own | {"torch_adam", "adam_w_mode"}
