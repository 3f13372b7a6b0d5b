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
    "scheduler": "the trainer sets the learning rate at every step",
    "activation_checkpointing": "it only configures deepspeed.checkpointing.checkpoint, which no model here calls",
    "gradient_accumulation_dtype": "DeepSpeed does not read it",
    "zero_allow_untested_optimizer": _CLIENT_OPTIMIZER,
    "zero_force_ds_cpu_optimizer": _CLIENT_OPTIMIZER,
    "bfloat16": "it is the old spelling of bf16, ignored as soon as there is a 'bf16' section",
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
    "called",
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

INSTEAD: dict[str, str] = {
    "scheduler": "set optim.lr, optim.warmup_steps and optim.min_lr in the run file, and remove it",
    "activation_checkpointing": "set backbone.activation_checkpointing in the run file, and remove it",
    "gradient_accumulation_dtype": "write data_types.grad_accum_dtype in its place",
    "zero_force_ds_cpu_optimizer": "the optimizer runs on the CPU with zero_optimization.offload_optimizer.device cpu; "
    "remove it",
    "bfloat16": 'write "bf16": {"enabled": true} in its place: without a section bf16 or fp16 the run computes in fp32',
    "torch_autocast": 'write "bf16": {"enabled": true}, or the same of fp16, in its place: without either the run '
    "computes in fp32",
    "amp": 'write "bf16": {"enabled": true}, or the same of fp16, in its place: without either the run computes in '
    "fp32",
    "compile": "set backbone.compile in the run file, and remove it",
    "data_efficiency": "set data.sources and their weights in the run file, and remove it",
    "curriculum_learning": "set data.sources and their weights in the run file, and remove it",
    "elasticity": "remove it: `m3i-scale launch --with elastic` goes on with the hosts that remain",
    "nebula": "set checkpoint.background in the run file, and remove it",
    "datastates_ckpt": "set checkpoint.background in the run file, and remove it",
    "sparse_gradients": "remove it; gradients are reduced whole",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "remove it, and take the weights with "
    "`m3i-scale export`",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "remove it, and take the weights with "
    "`m3i-scale export`",
    "zero_optimization.cpu_offload": "write zero_optimization.offload_optimizer.device cpu in its place",
    "zero_optimization.cpu_offload_param": "write zero_optimization.offload_param.device cpu in its place",
    "zero_optimization.cpu_offload_use_pin_memory": "write zero_optimization.offload_optimizer.pin_memory, or that of "
    "offload_param, in its place",
    "zero_optimization.offload_optimizer.super_offload": "remove it: the states are then offloaded plainly",
    "zero_optimization.zenflow": "remove it: the states are then offloaded as zero_optimization.offload_optimizer says",
    "zero_optimization.mics_shard_size": "remove it; under stage 3 zero_optimization.zero_hpz_partition_size keeps the "
    "gathers of the backward pass within a group of ranks",
    "checkpoint.load_universal": "remove it: checkpoints load on any number of ranks and any stage",
    "checkpoint.use_node_local_storage": "remove it, and give output_dir on a shared file system",
    "checkpoint.writer": "set checkpoint.background in the run file, and remove it",
    "checkpoint.parallel_write": "remove it: all ranks write",
}
"""What does that which a refused key was to do. Where none is named, nothing here does it, and removing the key changes
nothing."""

FOREIGN: dict[str, str] = {
    "learning_rate": "write optimizer.params.lr",
    "weight_decay": "write optimizer.params.weight_decay",
    "adam_beta1": "write optimizer.params.betas",
    "adam_beta2": "write optimizer.params.betas",
    "adam_epsilon": "write optimizer.params.eps",
    "max_grad_norm": "write gradient_clipping",
    "per_device_train_batch_size": "write train_micro_batch_size_per_gpu",
    "gradient_checkpointing": "set backbone.activation_checkpointing in the run file",
    "num_train_epochs": "set optim.steps in the run file, or the epochs of a source in data.sources",
    "max_steps": "set optim.steps in the run file",
    "warmup_steps": "set optim.warmup_steps in the run file",
    "warmup_ratio": "set optim.warmup_steps in the run file",
    "lr_scheduler_type": "set optim.min_lr and optim.warmup_steps in the run file: a cosine",
    "mixed_precision": "write bf16.enabled or fp16.enabled",
    "zero_stage": "write zero_optimization.stage",
    "zero3_init_flag": "remove it: under stage 3 large models are always built partitioned",
    "zero3_save_16bit_model": "remove it, and take the weights with `m3i-scale export`",
    "offload_optimizer_device": "write zero_optimization.offload_optimizer.device",
    "offload_param_device": "write zero_optimization.offload_param.device",
    "offload_optimizer_nvme_path": "write zero_optimization.offload_optimizer.device cpu: nothing goes to NVMe",
    "offload_param_nvme_path": "write zero_optimization.offload_param.device cpu: nothing goes to NVMe",
    "distributed_type": "remove it: the launcher's rank variables decide",
    "deepspeed_config_file": "set deepspeed in the run file",
    "deepspeed_hostfile": "give `deepspeed --hostfile`",
    "deepspeed_multinode_launcher": "give `deepspeed --launcher`",
}
"""Keys of the Trainer and accelerate convention, which DeepSpeed does not read: what to do instead."""


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
            instead = INSTEAD.get(path, f"remove '{path}'")
            raise ConfigError(f"'{path}' has no effect here", where=where, why=_refused()[path], fix=instead)
        if key not in tree:
            raise _unknown(key, path, tree, where)
        subtree = tree[key]
        if subtree is None:
            continue
        if not isinstance(value, dict):
            fix = None
            if "enabled" in subtree and isinstance(value, bool):
                fix = f'"{key}": {{"enabled": {str(value).lower()}}}'
            raise ConfigError(f"'{path}' must be a section, i.e. {{…}} (got {value!r})", where=where, fix=fix)
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
        return ConfigError(f"'{path}' has no effect here", where=where, why=why, fix=FOREIGN[key])
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
