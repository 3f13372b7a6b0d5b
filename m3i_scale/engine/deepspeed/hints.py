"""Explain why an unsupported key or value of a DeepSpeed JSON has no effect, and suggest a replacement."""

from __future__ import annotations

from typing import Any

from m3i_scale.engine.deepspeed.rules import no_effect
from m3i_scale.engine.deepspeed.schema import AUTO, fields_at, known_paths
from m3i_scale.errors import ConfigError, did_you_mean

_BECAUSE: dict[str, str] = {
    "the trainer sets the learning rate at every step": "scheduler",
    "it only configures deepspeed.checkpointing.checkpoint, which no model here calls": "activation_checkpointing",
    "DeepSpeed does not read it": "gradient_accumulation_dtype",
    "it concerns an optimizer object handed to DeepSpeed; here the optimizer is built from this file": (
        "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer"
    ),
    "it is the old spelling of bf16, ignored as soon as there is a 'bf16' section": "bfloat16",
    "precision is bf16, fp16 or fp32 for the whole model; autocast is not supported": "torch_autocast",
    "the trainer relies on DeepSpeed counting the micro-steps": "managed_gradient_accumulation",
    "it takes effect only through engine.compile(), which is never called": "compile",
    "samples come from the shards of the run file, not from DeepSpeed's data loader": (
        "dataloader_drop_last data_efficiency"
    ),
    "it only triggers a warning about alignment": "vocabulary_size",
    "this trainer is data-parallel only; nothing sets the other dimensions up": (
        "pipeline tensor_parallel expert_parallel sequence_parallel_size data_parallel_size "
        "seq_parallel_communication_data_type use_data_before_expert_parallelism"
    ),
    "it is one of DeepSpeed's loggers; runs have their own": "tensorboard wandb comet csv_monitor",
    "it serves generation while training language models": "hybrid_engine",
    "it quantises linear layers of DeepSpeed's own kind, which no model here uses": "weight_quantization",
    "the autotuner is driven by the deepspeed launcher and its own loop, not by this trainer": "autotuning",
    "checkpoints are committed, verified and resumed by this trainer (docs/checkpoints.md)": (
        "datastates_ckpt checkpoint.use_node_local_storage checkpoint.writer "
        "zero_optimization.elastic_checkpoint zero_optimization.pipeline_loading_checkpoint"
    ),
    "it configures NVMe offload, which is not supported": "aio",
    "DeepSpeed stores it and never uses it": (
        "disable_allgather zero_optimization.allgather_partitions checkpoint.checkpoint_serialization"
    ),
    "it concerns save_16bit_model, which is never called": (
        "zero_optimization.stage3_gather_16bit_weights_on_model_save "
        "zero_optimization.stage3_gather_fp16_weights_on_model_save"
    ),
    "a run goes on from the fp32 weights of its checkpoint; without them from rounded ones, and with the BF16 "
    "optimizer of stage 1 from its first ones": "zero_optimization.load_from_fp32_weights",
    "it concerns the Muon optimizer; the optimizer is AdamW": "zero_optimization.save_muon_momentum_buffer_in_memory",
    "the gradient norm is logged at every step and must be computed": "zero_optimization.compute_grad_norm",
    "the EMA teacher is updated on the primary shard in memory; another copy would go stale": (
        "zero_optimization.zenflow zero_optimization.offload_optimizer.super_offload"
    ),
    "it belongs to super_offload, which is not supported": "zero_optimization.offload_optimizer.cpuadam_cores_perc",
    "only nvme offload reads it": " ".join(
        f"zero_optimization.offload_{states}.{key}"
        for states, keys in {
            "optimizer": ("nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init"),
            "param": ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu"),
        }.items()
        for key in keys
    ),
    "it is deprecated, and its successor does the same": (
        "zero_optimization.cpu_offload zero_optimization.cpu_offload_param zero_optimization.cpu_offload_use_pin_memory"
    ),
    "resuming decides it from the checkpoint and the number of ranks": "checkpoint.load_universal",
    "only the pipeline engine reads it": "checkpoint.parallel_write",
    "only the engine without ZeRO reads it": "optimizer.legacy_fusion zero_optimization.legacy_stage1",
    "DeepSpeed refuses it": "optimizer.params.max_grad_norm",
    "the feature has been removed from DeepSpeed": (
        "amp curriculum_learning nebula elasticity sparse_gradients compression_training quantize_training eigenvalue "
        "sparse_attention graph_harvesting progressive_layer_drop zero_optimization.mics_shard_size "
        "zero_optimization.mics_hierarchical_params_gather zero_optimization.zeropp_loco_param"
    ),
}
REFUSED = {path: why for why, paths in _BECAUSE.items() for path in paths.split()}
"""Keys that DeepSpeed knows (or knew), and why they have no effect here."""

_IN_FP32 = "in its place: without a section bf16 or fp16 the run computes in fp32"
_BACKGROUND = "set checkpoint.background in the run file, and remove it"
_SOURCES = "set data.datasets and their weights in the run file, and remove it"
_EXPORT = "remove it, and take the weights with `m3i-scale export`"
INSTEAD: dict[str, str] = {
    "scheduler": "set optim.lr, optim.warmup_steps and optim.min_lr in the run file, and remove it",
    "activation_checkpointing": "set backbone.activation_checkpointing in the run file, and remove it",
    "gradient_accumulation_dtype": "write data_types.grad_accum_dtype in its place",
    "zero_force_ds_cpu_optimizer": "the optimizer runs on the CPU with zero_optimization.offload_optimizer.device cpu; "
    "remove it",
    "bfloat16": f'write "bf16": {{"enabled": true}} {_IN_FP32}',
    "torch_autocast": f'write "bf16": {{"enabled": true}}, or the same of fp16, {_IN_FP32}',
    "amp": f'write "bf16": {{"enabled": true}}, or the same of fp16, {_IN_FP32}',
    "compile": "set backbone.compile in the run file, and remove it",
    "data_efficiency": _SOURCES,
    "curriculum_learning": _SOURCES,
    "elasticity": "remove it: `m3i-scale launch --with elastic` goes on with the hosts that remain",
    "nebula": _BACKGROUND,
    "datastates_ckpt": _BACKGROUND,
    "tensorboard": "set log.tensorboard in the run file, and remove it",
    "wandb": "set log.wandb in the run file, and remove it",
    "csv_monitor": "remove it: the metrics file of the run has every metric",
    "sparse_gradients": "remove it; gradients are reduced whole",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _EXPORT,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _EXPORT,
    "zero_optimization.cpu_offload": "write zero_optimization.offload_optimizer.device cpu in its place",
    "zero_optimization.cpu_offload_param": "write zero_optimization.offload_param.device cpu in its place",
    "zero_optimization.cpu_offload_use_pin_memory": "write zero_optimization.offload_optimizer.pin_memory, or that of "
    "offload_param, in its place",
    "zero_optimization.offload_optimizer.super_offload": "remove it: the states are then offloaded plainly",
    "zero_optimization.zenflow": "remove it: the states are then offloaded as zero_optimization.offload_optimizer says",
    "zero_optimization.mics_shard_size": "remove it; under stage 3 zero_optimization.zero_hpz_partition_size keeps the "
    "gathers of the backward pass within a group of ranks",
    "optimizer.params.max_grad_norm": "use gradient_clipping",
    "checkpoint.load_universal": "remove it: checkpoints load on any number of ranks and any stage",
    "checkpoint.use_node_local_storage": "remove it, and give output_dir on a shared file system",
    "checkpoint.writer": _BACKGROUND,
    "checkpoint.parallel_write": "remove it: all ranks write",
}
"""Replacements of unsupported keys. Keys that can be removed without a change have no entry."""

_OPTIMIZER = '"params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}'
_LEFT_OUT: dict[str, tuple[str, str]] = {
    "gradient_clipping": (
        "DeepSpeed then clips at 1.0, whatever the run file says",
        'write "gradient_clipping": "auto" to take optim.clip_grad_norm',
    ),
    "optimizer": ("the optimizer is built from this file", f'"optimizer": {{"type": "AdamW", {_OPTIMIZER}}}'),
    "optimizer.params": ("the optimizer is built from this file", _OPTIMIZER),
    "device": ("DeepSpeed then takes none, and offloads nothing", 'write "device": "cpu"'),
    "enabled": ("DeepSpeed takes a missing switch for off, and goes on", 'write "enabled": true or false'),
}
"""By key or by its last word: DeepSpeed's behavior without it, and the line to add."""

_ONE_OF = {
    "zero_optimization.stage": (
        "1, 2 or 3",
        "checkpoints and the EMA teacher live on the partitioned optimizer; stage 0 has none",
        "on a single device take 1: it costs nothing there",
    ),
    "optimizer.type": (
        "AdamW",
        "the section optim of the run file (betas, eps, decoupled weight decay) describes AdamW",
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
        default = ("DeepSpeed would take its own default instead of the run file's value", 'write "auto"')
        why, fix = _LEFT_OUT.get(path) or _LEFT_OUT.get(parts[-1]) or default
        return ConfigError(f"'{path}' is left out", where=where, why=why, fix=fix)
    return _wrong_value(detail, path, given, where)


def _wrong_value(detail: Any, path: str, given: Any, where: str) -> ConfigError:
    if path in _ONE_OF:
        one_of, why, fix = _ONE_OF[path]
        return ConfigError(f"'{path}' must be {one_of} (got {given!r})", where=where, why=why, fix=fix)
    if detail["type"] in ("model_type", "model_attributes_type"):
        switched = isinstance(given, bool) and "enabled" in fields_at(tuple(path.split(".")))
        hint = f'"{path}": {{"enabled": {str(given).lower()}}}' if switched else None
        return ConfigError(f"'{path}' must be a section, i.e. {{…}} (got {given!r})", where=where, fix=hint)
    if given == "nvme":
        why = "checkpoints, exports and the EMA teacher read shards in memory"
        fix = "take cpu; bf16 states (zero3_bf16_lean, zero3_cpu_lean) halve what has to be held"
        return ConfigError(f"'{path}' is nvme", where=where, why=why, fix=fix)
    return ConfigError(f"'{path}': {detail['msg']} (got {given!r})", where=where)


def _unfilled(path: str, where: str) -> ConfigError:
    why = "nothing in the run file says what it should be, and DeepSpeed drops the word or fails later"
    if path.endswith("enabled"):
        why = "DeepSpeed takes it for off and goes on"
    fix = "give a value; docs/deepspeed.md lists what is filled in"
    return ConfigError(f"'{path}' cannot be \"auto\"", where=where, why=why, fix=fix)


def _unknown(parts: tuple[str, ...], config: dict[str, Any], where: str) -> ConfigError:
    path, key = ".".join(parts), parts[-1]
    if path in REFUSED:
        return no_effect(path, REFUSED[path], where, INSTEAD.get(path))
    places = list(known_paths())
    if path in places:  # of another stage
        stage = config["zero_optimization"]["stage"]
        readers = "only stages 1 and 2 read" if stage == 3 else "only stage 3 reads"
        instead = "write stage3_prefetch_bucket_size in its place" if key == "allgather_bucket_size" else None
        fix = instead if stage == 3 else "remove it, or set stage to 3"
        return no_effect(path, f"{readers} it, and the stage is {stage}", where, fix)
    ignored = "DeepSpeed would ignore it without a word" if path == key else None
    homes = [home for home in places if home.rpartition(".")[2] == key]
    if homes:
        fix = f"it belongs at '{homes[0]}'" if len(homes) == 1 else "it belongs at one of: " + ", ".join(homes)
        return ConfigError(f"'{path}' stands at the wrong level", where=where, why=ignored, fix=fix)
    siblings = fields_at(parts[:-1])
    if f"stage3_{key}" in siblings:
        return ConfigError(f"'{path}' is not the documented spelling", where=where, fix=f"write 'stage3_{key}'")
    return ConfigError(f"unknown key '{path}'", where=where, why=ignored, fix=did_you_mean(key, siblings))
