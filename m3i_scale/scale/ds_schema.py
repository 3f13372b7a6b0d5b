"""Which keys a DeepSpeed JSON may hold, and why the others are refused.

DeepSpeed ignores most keys it does not know, and reads many that do nothing in a run of this trainer. Sections that
DeepSpeed types with pydantic are introspected, so the tree follows the installed version; the top level and the
untyped sections are listed here, and a test compares the lists with what the installed version really reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Union, get_args

from pydantic import BaseModel

from m3i_scale.errors import ConfigError, did_you_mean

Tree = dict[str, Union["Tree", None]]
"""Known keys: a section maps to its own tree, a plain value to None."""

_PLAIN_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "gradient_allreduce_op",
    "gradient_predivide_factor",
    "prescale_gradients",
    "communication_data_type",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "disable_python_gc",
    "dump_state",
    "log_level",
)

_NO_PARALLELISM = "this trainer is data-parallel only; nothing sets the other dimensions up"
_CLIENT_OPTIMIZER = "it concerns an optimizer object handed to DeepSpeed; here the optimizer is built from this file"
_OWN_LOADER = "samples come from the shards of the run file, not from DeepSpeed's data loader"
_PRIMARY_SHARD = (
    "the momentum target is updated on the primary shard in memory; a second or compressed copy would go stale"
)
_OWN_RESUME = "checkpoints are committed, verified and resumed by this trainer (docs/checkpoints.md)"
_NEVER_COMPILED = "it takes effect only through engine.compile(), which is never called"

REFUSED: dict[str, str] = {
    "scheduler": "the trainer sets the learning rate at every step (optim.lr, optim.warmup_steps, optim.min_lr)",
    "activation_checkpointing": "it only configures deepspeed.checkpointing.checkpoint, which no model here calls; "
    "use backbone.activation_checkpointing in the run file",
    "gradient_accumulation_dtype": "DeepSpeed does not read it; the key is data_types.grad_accum_dtype",
    "zero_allow_untested_optimizer": _CLIENT_OPTIMIZER,
    "zero_force_ds_cpu_optimizer": _CLIENT_OPTIMIZER,
    "bfloat16": "it is the old spelling, ignored as soon as there is a 'bf16' section; write bf16",
    "torch_autocast": "precision is bf16, fp16 or fp32 for the whole model; autocast is not supported",
    "managed_gradient_accumulation": "the trainer relies on DeepSpeed counting the micro-steps",
    "compile": _NEVER_COMPILED,
    "dataloader_drop_last": _OWN_LOADER,
    "data_efficiency": _OWN_LOADER,
    "disable_allgather": "DeepSpeed stores it and never uses it",
    "vocabulary_size": "it only triggers a warning about alignment",
    "pipeline": _NO_PARALLELISM,
    "tensor_parallel": _NO_PARALLELISM,
    "expert_parallel": _NO_PARALLELISM,
    "sequence_parallel_size": _NO_PARALLELISM,
    "data_parallel_size": _NO_PARALLELISM,
    "seq_parallel_communication_data_type": _NO_PARALLELISM,
    "use_data_before_expert_parallelism": _NO_PARALLELISM,
    "hybrid_engine": "it serves generation while training language models",
    "weight_quantization": "it quantises linear layers of DeepSpeed's own kind, which no model here uses",
    "autotuning": "the autotuner is driven by the deepspeed launcher and its own loop, not by this trainer",
    "datastates_ckpt": _OWN_RESUME,
    "aio": "it configures NVMe offload, which is not supported",
    "zero_optimization.allgather_partitions": "DeepSpeed reads it and never uses it",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "it concerns save_16bit_model, which is never "
    "called; exports gather the weights themselves",
    "zero_optimization.elastic_checkpoint": _OWN_RESUME,
    "zero_optimization.pipeline_loading_checkpoint": _OWN_RESUME,
    "zero_optimization.load_from_fp32_weights": "a run goes on from the fp32 weights of its checkpoint; without them "
    "from rounded ones, and with the BF16 optimizer of stage 1 from its first ones",
    "zero_optimization.legacy_stage1": "DeepSpeed no longer has the old stage 1",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "it concerns the Muon optimizer; the optimizer is AdamW",
    "zero_optimization.compute_grad_norm": "the gradient norm is logged at every step and must be computed",
    "zero_optimization.zenflow": _PRIMARY_SHARD,
    "zero_optimization.offload_optimizer.super_offload": _PRIMARY_SHARD,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "it belongs to super_offload, which is not supported",
    "checkpoint.load_universal": "resuming decides it from the checkpoint and the number of ranks",
    "checkpoint.use_node_local_storage": _OWN_RESUME,
    "checkpoint.parallel_write": "only the pipeline engine reads it",
    "checkpoint.checkpoint_serialization": "DeepSpeed reads it and never uses it",
    "checkpoint.writer": _OWN_RESUME,
    "optimizer.legacy_fusion": "only the engine without ZeRO reads it",
}
"""Keys that DeepSpeed knows (or knew), with the reason why they do nothing here. Dotted paths."""

FOREIGN: dict[str, str] = {
    "learning_rate": "optimizer.params.lr",
    "weight_decay": "optimizer.params.weight_decay",
    "adam_beta1": "optimizer.params.betas",
    "adam_beta2": "optimizer.params.betas",
    "adam_epsilon": "optimizer.params.eps",
    "max_grad_norm": "gradient_clipping",
    "per_device_train_batch_size": "train_micro_batch_size_per_gpu",
    "gradient_checkpointing": "backbone.activation_checkpointing in the run file",
    "num_train_epochs": "optim.steps in the run file",
    "max_steps": "optim.steps in the run file",
    "warmup_steps": "optim.warmup_steps in the run file",
    "warmup_ratio": "optim.warmup_steps in the run file",
    "lr_scheduler_type": "optim.min_lr and optim.warmup_steps in the run file",
    "mixed_precision": "bf16.enabled or fp16.enabled",
    "zero_stage": "zero_optimization.stage",
    "zero3_init_flag": "nothing: large models are always built partitioned under stage 3",
    "zero3_save_16bit_model": "`m3i-scale export`",
    "offload_optimizer_device": "zero_optimization.offload_optimizer.device",
    "offload_param_device": "zero_optimization.offload_param.device",
    "offload_optimizer_nvme_path": "zero_optimization.offload_optimizer (cpu only)",
    "offload_param_nvme_path": "zero_optimization.offload_param (cpu only)",
    "distributed_type": "nothing: the launcher's rank variables decide",
    "deepspeed_config_file": "`deepspeed:` in the run file",
    "deepspeed_hostfile": "`deepspeed --hostfile`",
    "deepspeed_multinode_launcher": "`deepspeed --launcher`",
}
"""Keys of the Trainer and accelerate convention, which DeepSpeed does not read: what to use instead."""


@lru_cache(maxsize=1)
def known_tree() -> Tree:
    """Every key that may stand in the file or has an explained refusal, section by section."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime import constants
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    tree: Tree = dict.fromkeys(_PLAIN_KEYS)
    tree |= tree_of(DeepSpeedMonitorConfig)
    tree |= {
        "zero_optimization": tree_of(DeepSpeedZeroConfig),
        "bf16": tree_of(DeepSpeedBF16Config),
        "fp16": tree_of(DeepSpeedFP16Config),
        "comms_logger": tree_of(CommsLoggerConfig),
        "timers": {"throughput": tree_of(DeepSpeedThroughputTimerConfig)},
        "flops_profiler": dict.fromkeys(vars(DeepSpeedFlopsProfilerConfig({}))),
        "data_types": dict.fromkeys(
            getattr(constants, name)
            for name in ("GRAD_ACCUM_DTYPE", "PARAM_DTYPE", "BUFFER_DTYPE", "KEEP_IN_FP32_MODULES")
            if hasattr(constants, name)
        ),
        "checkpoint": {"tag_validation": None},
        "optimizer": {"type": None, "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"))},
    }
    return tree


def tree_of(model: type[BaseModel]) -> Tree:
    """The keys of a pydantic model under the spelling of its aliases, nested models included."""
    tree: Tree = {}
    for name, field in model.model_fields.items():
        nested = _model_in(field.annotation)
        tree[field.alias or name] = tree_of(nested) if nested else None
    return tree


def _model_in(annotation: Any) -> type[BaseModel] | None:
    for item in (annotation, *get_args(annotation)):
        if isinstance(item, type) and issubclass(item, BaseModel):
            return item
    return None


@lru_cache(maxsize=1)
def _refused() -> dict[str, str]:
    """REFUSED plus what the installed version itself calls removed or deprecated."""
    from deepspeed.runtime import config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    removed: dict[str, str] = {}
    for table, prefix in (("_REMOVED_TOP_LEVEL_CONFIG_KEYS", ""), ("_REMOVED_ZERO_CONFIG_KEYS", "zero_optimization.")):
        for key in getattr(config, table, {}):
            removed[prefix + key] = "the feature has been removed from DeepSpeed"
    for name, field in DeepSpeedZeroConfig.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("deprecated"):
            reason = f"it is deprecated; DeepSpeed's name for it is now {extra.get('new_param')}"
            removed.setdefault(f"zero_optimization.{field.alias or name}", reason)
    return removed | REFUSED


def check_keys(raw: dict[str, Any], *, where: str) -> None:
    """Refuse every key, at any depth, that DeepSpeed would ignore or that has no effect in this trainer.

    `optimizer.params` is left to the optimizer rules: what it may hold depends on the optimizer that is built.

    Raises:
        ConfigError: an unknown key (with the nearest known one, or the section it belongs to), a key with no effect,
            or a section that is not a mapping.
    """
    _check_section(raw, known_tree(), "", where)


def _check_section(section: dict[str, Any], tree: Tree, prefix: str, where: str) -> None:
    for key, value in section.items():
        path = prefix + key
        if path in _refused():
            raise ConfigError(f"'{path}' has no effect here", where=where, why=_refused()[path], fix=f"remove '{path}'")
        if key not in tree:
            raise _unknown(key, path, tree, where)
        subtree = tree[key]
        if subtree is None:
            continue
        if not isinstance(value, dict):
            raise ConfigError(f"'{path}' must be a section, i.e. {{…}} (got {value!r})", where=where)
        if path != "optimizer.params":
            _check_section(value, subtree, path + ".", where)


def _unknown(key: str, path: str, tree: Tree, where: str) -> ConfigError:
    ignored = "DeepSpeed would ignore it without a word" if path == key else None
    homes = [home for home in _paths(known_tree()) if home.rpartition(".")[2] == key and home != path]
    if homes:
        fix = f"it belongs at '{homes[0]}'" if len(homes) == 1 else "it belongs at one of: " + ", ".join(homes)
        return ConfigError(f"'{path}' stands at the wrong level", where=where, why=ignored, fix=fix)
    if f"stage3_{key}" in tree:
        return ConfigError(f"'{path}' is not the documented spelling", where=where, fix=f"write 'stage3_{key}'")
    if key in FOREIGN:
        why = "it is a key of the Trainer or accelerate convention, which DeepSpeed does not read"
        return ConfigError(f"'{path}' has no effect here", where=where, why=why, fix=f"use {FOREIGN[key]}")
    return ConfigError(f"unknown key '{path}'", where=where, why=ignored, fix=did_you_mean(key, tree))


def _paths(tree: Tree, prefix: str = "") -> Iterator[str]:
    """Dotted paths of all keys that are not refused."""
    for key, subtree in tree.items():
        path = prefix + key
        if path in _refused():
            continue
        yield path
        if subtree:
            yield from _paths(subtree, path + ".")
