"""Explain errors of the schema of a DeepSpeed JSON: unsupported keys, missing keys and wrong values."""

from __future__ import annotations

from typing import Any

from m3i_scale.engine.deepspeed.rules import no_effect
from m3i_scale.engine.deepspeed.schema import AUTO, fields_at, known_paths
from m3i_scale.errors import ConfigError, did_you_mean

_BF16 = 'write "bf16": {"enabled": true}'
_NO_SECTION = "in its place: without a section bf16 or fp16 the run computes in fp32"
_EITHER = f"{_BF16}, or the same of fp16, {_NO_SECTION}"
_ONE_COPY = "the EMA teacher is updated on the primary shard in memory; another copy would become stale"
_LOGGER = "it is one of DeepSpeed's loggers; runs have their own"
_OBJECT = "it concerns an optimizer object passed to DeepSpeed; here the optimizer is built from this file"
_EXPORT = ("it concerns save_16bit_model, which is never called", "remove it; `m3i-scale export` writes the weights")
_DATASETS = (
    "samples come from the shards of the config file",
    "set data.datasets and their weights there, and remove it",
)
UNSUPPORTED: dict[str, tuple[str, str | None]] = {
    "scheduler": (
        "the trainer sets the learning rate at every step",
        "set optim.lr, optim.warmup_steps and optim.min_lr in the config file, and remove it",
    ),
    "activation_checkpointing": (
        "it configures deepspeed.checkpointing, which no model here calls",
        "set backbone.activation_checkpointing in the config file, and remove it",
    ),
    "gradient_accumulation_dtype": ("DeepSpeed does not read it", "write data_types.grad_accum_dtype in its place"),
    "data_types.param_dtype": ("the sections bf16 and fp16 decide the dtype of parameters", _EITHER),
    "bfloat16": ("it is the old spelling of bf16", f"{_BF16} {_NO_SECTION}"),
    "amp": ("it was removed from DeepSpeed", _EITHER),
    "torch_autocast": ("precision is bf16, fp16 or fp32 for the full model; autocast is not supported", _EITHER),
    "compile": (
        "it takes effect only through engine.compile(), which is never called",
        "set backbone.compile in the config file, and remove it",
    ),
    "zero_allow_untested_optimizer": (_OBJECT, None),
    "zero_force_ds_cpu_optimizer": (
        _OBJECT,
        "the optimizer runs on the CPU with zero_optimization.offload_optimizer.device cpu; remove it",
    ),
    "tensorboard": (_LOGGER, "set log.tensorboard in the config file, and remove it"),
    "wandb": (_LOGGER, "set log.wandb in the config file, and remove it"),
    "csv_monitor": (_LOGGER, "remove it: the metrics file of the run has every metric"),
    "comet": (_LOGGER, None),
    "data_efficiency": _DATASETS,
    "curriculum_learning": _DATASETS,
    "elasticity": (
        "it was removed from DeepSpeed",
        "remove it; `m3i-scale launch --with elastic` continues on the remaining hosts",
    ),
    "aio": ("it configures NVMe offload, which is not supported", None),
    "checkpoint": (
        "checkpoints are saved, verified and resumed by this trainer (docs/explanation/checkpoints.md)",
        "remove it: checkpoints load on any number of ranks and any stage; the config file has checkpoint.background",
    ),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _EXPORT,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _EXPORT,
    "zero_optimization.allgather_partitions": ("DeepSpeed stores it and never uses it", None),
    "zero_optimization.load_from_fp32_weights": ("weights are initialized or loaded by this trainer", None),
    "zero_optimization.cpu_offload": (
        "it is deprecated",
        "write zero_optimization.offload_optimizer.device cpu in its place",
    ),
    "zero_optimization.cpu_offload_param": (
        "it is deprecated",
        "write zero_optimization.offload_param.device cpu in its place",
    ),
    "zero_optimization.cpu_offload_use_pin_memory": (
        "it is deprecated",
        "write zero_optimization.offload_optimizer.pin_memory, or the same of offload_param, in its place",
    ),
    "zero_optimization.zenflow": (_ONE_COPY, "remove it: zero_optimization.offload_optimizer offloads the states"),
    "zero_optimization.offload_optimizer.super_offload": (_ONE_COPY, "remove it: the states are still offloaded"),
    "optimizer.params.max_grad_norm": ("DeepSpeed raises an error for it", "use gradient_clipping"),
}
"""Keys that DeepSpeed files of other projects often have: why they have no effect here, and a replacement if removing
the key would change the run."""

_OPTIMIZER = '"params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}'
_LEFT_OUT: dict[str, tuple[str, str]] = {
    "gradient_clipping": (
        "DeepSpeed then clips at 1.0, whatever the config file says",
        'write "gradient_clipping": "auto" to take optim.clip_grad_norm',
    ),
    "optimizer": ("the optimizer is built from this file", f'"optimizer": {{"type": "AdamW", {_OPTIMIZER}}}'),
    "optimizer.params": ("the optimizer is built from this file", _OPTIMIZER),
    "device": ("DeepSpeed then takes none, and offloads nothing", 'write "device": "cpu"'),
    "enabled": ("DeepSpeed continues silently as if a missing switch were off", 'write "enabled": true or false'),
}
"""By key or by its last word: DeepSpeed's behavior without it, and the line to add."""

_ONE_OF = {
    "zero_optimization.stage": (
        "1, 2 or 3",
        "checkpoints and the EMA teacher need the partitioned optimizer; stage 0 has none",
        "use 1 on a single device: it costs nothing there",
    ),
    "optimizer.type": (
        "AdamW",
        "the section optim of the config file (betas, eps, decoupled weight decay) describes AdamW",
        'write "AdamW"',
    ),
}


def schema_error(detail: Any, config: dict[str, Any], where: str) -> ConfigError:
    """Return the ConfigError for `detail`, one of the details of a pydantic error."""
    parts = tuple(part for part in detail["loc"] if isinstance(part, str) and part not in ("str", "list[str]"))
    path, given = ".".join(parts), detail["input"]
    if detail["type"] == "extra_forbidden":
        return _unknown(parts, config, where)
    if path == "zero_optimization" and isinstance(config.get(path, {}), dict):
        path, given = f"{path}.stage", config.get(path, {}).get("stage")
    if isinstance(given, str) and given == AUTO:
        return _unfilled(path, where)
    if detail["type"] == "missing" and path not in _ONE_OF:
        default = ("DeepSpeed would take its own default instead of the config file's value", 'write "auto"')
        why, fix = _LEFT_OUT.get(path) or _LEFT_OUT.get(parts[-1]) or default
        return ConfigError(f"'{path}' is missing", where=where, why=why, fix=fix)
    return _wrong_value(detail, path, given, where)


def _wrong_value(detail: Any, path: str, given: Any, where: str) -> ConfigError:
    if path in _ONE_OF:
        one_of, why, fix = _ONE_OF[path]
        return ConfigError(f"'{path}' must be {one_of} (got {given!r})", where=where, why=why, fix=fix)
    if detail["type"] in ("model_type", "model_attributes_type"):
        switched = isinstance(given, bool) and "enabled" in fields_at(tuple(path.split(".")))
        hint = f'write "{path}": {{"enabled": {str(given).lower()}}}' if switched else "write {…}, or remove it"
        return ConfigError(f"'{path}' must be a section, i.e. {{…}} (got {given!r})", where=where, fix=hint)
    if given == "nvme":
        why = "checkpoints, exports and the EMA teacher read shards in memory"
        fix = "use cpu; bf16 states (zero3_bf16_lean, zero3_cpu_lean) halve the states"
        return ConfigError(f"'{path}' must not be nvme", where=where, why=why, fix=fix)
    return ConfigError(f"'{path}': {detail['msg']} (got {given!r})", where=where, fix=f"correct the value of '{path}'")


def _unfilled(path: str, where: str) -> ConfigError:
    why = "it does not follow from the config file, and DeepSpeed ignores the word or fails later"
    if path.endswith("enabled"):
        why = "DeepSpeed continues silently as if it were off"
    fix = 'set a value; docs/reference/deepspeed.md lists the keys that can be "auto"'
    return ConfigError(f"'{path}' cannot be \"auto\"", where=where, why=why, fix=fix)


def _unknown(parts: tuple[str, ...], config: dict[str, Any], where: str) -> ConfigError:
    path, key = ".".join(parts), parts[-1]
    if path in UNSUPPORTED:
        why, fix = UNSUPPORTED[path]
        return no_effect(path, why, where, fix)
    places = list(known_paths())
    if path in places:  # of another stage
        stage = config["zero_optimization"]["stage"]
        readers = "only stages 1 and 2 read" if stage == 3 else "only stage 3 reads"
        instead = "write stage3_prefetch_bucket_size in its place" if key == "allgather_bucket_size" else None
        fix = instead if stage == 3 else "remove it, or set stage to 3"
        return no_effect(path, f"{readers} it, and the stage is {stage}", where, fix)
    why = "DeepSpeed would ignore it, or do something that this trainer does not support"
    homes = [home for home in places if home.rpartition(".")[2] == key]
    if homes:
        fix = f"move it to '{homes[0]}'" if len(homes) == 1 else "move it to one of: " + ", ".join(homes)
        return ConfigError(f"'{path}' is at the wrong level", where=where, why=why, fix=fix)
    siblings = fields_at(parts[:-1])
    if f"stage3_{key}" in siblings:
        return ConfigError(f"'{path}' is an undocumented spelling", where=where, fix=f"write 'stage3_{key}'")
    near = did_you_mean(key, siblings)
    fix = near if near.startswith("did you mean") else f"remove '{path}'"
    return ConfigError(f"unknown key '{path}'", where=where, why=why, fix=fix)
